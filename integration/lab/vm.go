package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	// bootTimeout bounds the time from the start of a machine to a shell. On an idle host this
	// takes 20 s.
	bootTimeout = 5 * time.Minute
	// shutdownTimeout is somewhat longer than systemd's own timeout for a service that doesn't end.
	shutdownTimeout = 3 * time.Minute
)

// machine is a virtual machine. Its disks survive reboots.
type machine struct {
	dir     string // of its disks and logs
	base    base
	options string // for the kernel

	process *exec.Cmd // qemu, nil while the machine is off
	exited  chan struct{}
	address string // of its agent
}

// newMachine returns a machine with its own disks: changes to the root filesystem, and a copy of
// the parts.
func newMachine(ctx context.Context, dir string, base base, parts string) (*machine, error) {
	m := &machine{dir: dir, base: base}
	for name, backing := range map[string]string{"root": base.image, "parts": parts} {
		if err := run(ctx, m.path("qemu-img.log"), "qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", backing, m.path(name+".qcow2")); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

// qemu returns the command that runs the machine. It does not use KVM, which many build machines
// lack because they are virtual.
func (m *machine) qemu(ctx context.Context, more ...string) *exec.Cmd {
	emulator := emulators[m.base.arch]
	cmd := exec.CommandContext(ctx, emulator.program, slices.Concat(emulator.machine, []string{
		"-accel", "tcg,thread=multi", "-smp", "2", "-m", "4096",
		// Mitigations of processor flaws flush translated code at every system call of an emulated
		// processor.
		"-kernel", m.base.kernel, "-initrd", m.base.initrd, "-append", "console=" + emulator.console + " root=/dev/vda rw quiet mitigations=off panic=-1 " + m.options,
		"-drive", "file=" + m.path("root.qcow2") + ",if=virtio", "-drive", "file=" + m.path("parts.qcow2") + ",if=virtio",
		"-display", "none", "-no-reboot",
	}, more)...)
	// The machine is killed with the lab. The signal is bound to the starting thread, which main
	// holds.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// emulators are the programs of qemu by architecture.
var emulators = map[string]struct {
	program string
	machine []string
	console string
}{
	"amd64": {"qemu-system-x86_64", []string{"-machine", "q35", "-cpu", "max"}, "ttyS0"},
	// Emulating the specified algorithm of pointer authentication takes half of the time.
	"arm64": {"qemu-system-aarch64", []string{"-machine", "virt", "-cpu", "max,pauth-impdef=on"}, "ttyAMA0"},
}

// boots is how often a machine is booted if the emulation fails. Without KVM several processors run
// in parallel, and qemu sometimes loses a race: when the kernel patches its own code ("Oops: int3"
// before there is a root filesystem), and in its device models.
const boots = 3

var errEmulation = errors.New("emulation failed while the machine booted")

// failuresOfEmulation are the messages of such failures on the console: those of the kernel, and of
// assert(3) in qemu.
var failuresOfEmulation = []string{"Kernel panic", ": Assertion `"}

// boot starts the machine and waits until it runs commands.
func (m *machine) boot(ctx context.Context) error {
	for try := 1; ; try++ {
		err := m.bootOnce(ctx)
		if try == boots || !errors.Is(err, errEmulation) {
			return err
		}
		progress("%v: booting again", err)
	}
}

func (m *machine) bootOnce(ctx context.Context) error {
	begun := time.Now()
	port, err := freePort()
	if err != nil {
		return err
	}
	m.address = fmt.Sprintf("127.0.0.1:%d", port)
	console, err := os.OpenFile(m.path("console.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer console.Close()
	before, err := console.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	m.process = m.qemu(ctx, "-serial", "stdio", "-monitor", "none",
		"-nic", "user,model=virtio-net-pci,restrict=on,hostfwd=tcp:"+m.address+"-10.0.2.15:1024")
	m.process.Stdout, m.process.Stderr = console, console
	if err := m.process.Start(); err != nil {
		return err
	}
	m.exited = make(chan struct{})
	go func() {
		defer close(m.exited)
		_ = m.process.Wait() // the machine is off with any outcome
	}()
	ctx, cancel := context.WithTimeoutCause(ctx, bootTimeout, fmt.Errorf("the machine did not boot within %v, see %s", bootTimeout, m.path("console.log")))
	defer cancel()
	for {
		try, cancel := context.WithTimeout(ctx, 20*time.Second)
		_, err := m.output(try, "systemctl is-system-running --wait || true")
		cancel()
		if err == nil {
			progress("booted in %.0f s", time.Since(begun).Seconds())
			return nil
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-m.exited:
			return m.ended(before)
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}

// ended returns why a booting machine has ended, by its console from an offset on.
func (m *machine) ended(from int64) error {
	said, err := os.ReadFile(m.path("console.log"))
	if err != nil {
		return err
	}
	for _, failure := range failuresOfEmulation {
		if bytes.Contains(said[min(from, int64(len(said))):], []byte(failure)) {
			return fmt.Errorf("%w (%s), see %s", errEmulation, failure, m.path("console.log"))
		}
	}
	return fmt.Errorf("the machine has ended, see %s", m.path("console.log"))
}

// run runs a bash script on the machine and copies its output to out.
func (m *machine) run(ctx context.Context, out io.Writer, script string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+m.address+"/run", strings.NewReader(script))
	if err != nil {
		return err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if _, err := io.Copy(out, response.Body); err != nil {
		return fmt.Errorf("the machine has gone: %w", err)
	}
	if code := response.Trailer.Get("Exit-Code"); code != "0" {
		return fmt.Errorf("exit code %q of %.200q", code, script)
	}
	return nil
}

// output is run, but returns the output, also as a part of the error.
func (m *machine) output(ctx context.Context, script string) (string, error) {
	var out bytes.Buffer
	if err := m.run(ctx, &out, script); err != nil {
		return out.String(), fmt.Errorf("%w\n%s", err, bytes.TrimSpace(out.Bytes()))
	}
	return out.String(), nil
}

// cut cuts the power of the machine: unsynced data is lost.
func (m *machine) cut() {
	if m.process == nil {
		return
	}
	_ = m.process.Process.Kill()
	<-m.exited
	m.process = nil
}

// shutDown shuts the machine down.
func (m *machine) shutDown(ctx context.Context) error {
	if _, err := m.output(ctx, "systemctl poweroff --no-block"); err != nil {
		return err
	}
	select {
	case <-m.exited:
		m.process = nil
		return nil
	case <-time.After(shutdownTimeout):
		return errors.New("the machine did not shut down")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
