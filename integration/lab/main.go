// Command lab runs podfsm on real nodes: virtual machines with Debian, systemd, cgroup v2 and
// AppArmor. It shows its progress. It leaves nothing behind except for its cache, and the logs of
// failures in .build/nodes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The kernel kills the machine when the thread that started it ends.
func init() { runtime.LockOSThread() }

func main() {
	smoke := flag.Bool("smoke", false, "run the scenarios of the smoke alone, in a few minutes")
	shell := flag.Bool("shell", false, "boot a machine and give a shell in it, instead of scenarios")
	pattern := flag.String("run", ".", "run the scenarios whose `name` matches")
	tests := flag.String("tests", "", "run the tests that match, instead of a scenario's own list")
	rounds := flag.Int("rounds", 3, "cut the power so many times in the scenario power-cuts")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := lab(ctx, options{*smoke, *shell, *pattern, *tests, *rounds}); err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		stop()
		os.Exit(1)
	}
}

type options struct {
	smoke, shell   bool
	pattern, tests string
	rounds         int
}

// dir is where the lab has its files, below the repository.
const dir = ".build/nodes"

func lab(ctx context.Context, o options) error {
	chosen, err := choose(o)
	if err != nil {
		return err
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	unlock, err := lock()
	if err != nil {
		return err
	}
	defer unlock()
	if o.shell {
		return shell(ctx, dir)
	}
	if slices.ContainsFunc(chosen, func(s scenario) bool { return s.critest }) {
		if err := buildConformance(ctx, dir); err != nil {
			return err
		}
	}
	var failed []string
	withCluster := slices.ContainsFunc(chosen, func(s scenario) bool { return s.cluster })
	made := map[string]string{} // the images of the parts, by architecture
	for _, s := range chosen {
		base, err := makeBase(ctx, dir, s.on)
		if err != nil {
			return err
		}
		if made[s.on.arch] == "" {
			if made[s.on.arch], err = makeParts(ctx, dir, base, withCluster); err != nil {
				return err
			}
		}
		if err := s.try(ctx, dir, base, made[s.on.arch]); err != nil {
			failed = append(failed, s.name)
			progress("--- FAIL: %s: %v", s.name, err)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	if len(failed) > 0 {
		return fmt.Errorf("failed: %s; logs are in %s", strings.Join(failed, ", "), dir)
	}
	return nil
}

func choose(o options) ([]scenario, error) {
	pattern, err := regexp.Compile(o.pattern)
	if err != nil {
		return nil, err
	}
	var chosen []scenario
	for _, s := range scenarios(o) {
		if s.smoke == o.smoke && pattern.MatchString(s.name) {
			chosen = append(chosen, s)
		}
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("no scenario matches %q", o.pattern)
	}
	return chosen, nil
}

// lock waits until no other lab runs on this machine: a virtual machine takes two processors and 4
// GiB.
func lock() (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(os.TempDir(), "podfsm-lab.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		progress("waiting for another lab")
		for err = unix.EINTR; err == unix.EINTR; {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		}
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	return func() { f.Close() }, nil
}

// shell boots a machine on this terminal. Powering it off, or ctrl-a x, ends it.
func shell(ctx context.Context, dir string) error {
	base, err := makeBase(ctx, dir, debian13)
	if err != nil {
		return err
	}
	parts, err := makeParts(ctx, dir, base, false)
	if err != nil {
		return err
	}
	dir, err = os.MkdirTemp(dir, "shell-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	m, err := newMachine(ctx, dir, base, parts)
	if err != nil {
		return err
	}
	progress("for a node with podfsm: bash -eu /lab/stock.sh systemd && bash -eu /lab/install.sh systemd")
	progress("for the end of the machine: systemctl poweroff, or ctrl-a x")
	qemu := m.qemu(ctx, "-serial", "mon:stdio", "-nic", "user,model=virtio-net-pci,restrict=on")
	qemu.Stdin, qemu.Stdout, qemu.Stderr = os.Stdin, os.Stdout, os.Stderr
	return qemu.Run()
}

// run runs a program. The error has the end of its output and the path of the whole log.
func run(ctx context.Context, log, name string, args ...string) error {
	f, err := os.Create(log)
	if err != nil {
		return err
	}
	defer f.Close()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		text, _ := os.ReadFile(log)
		return fmt.Errorf("failed to run %q: %w, see %s:\n%s", name, err, log, text[max(0, len(text)-2000):])
	}
	return nil
}

var begun = time.Now()

func progress(format string, args ...any) {
	elapsed := time.Since(begun).Round(time.Second)
	fmt.Printf("%3d:%02d  %s\n", int(elapsed.Minutes()), int(elapsed.Seconds())%60, fmt.Sprintf(format, args...))
}
