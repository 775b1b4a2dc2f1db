package integration

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// machine is the root filesystem of a machine for installations: that of this machine with all
// changes in memory, as the root of a separate mount namespace.
type machine struct{ holder int } // the process that keeps the namespace

// boot makes the machine's root filesystem and waits forever.
const boot = `set -e
node=$1 programs=$2
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root
cd /mnt/root
for dir in /proc /sys /dev "$node" "$programs"; do
	mkdir -p ".$dir"
	mount --rbind "$dir" ".$dir"
done
mount -t tmpfs tmpfs run
rm -rf etc/containerd var/lib/containerd etc/systemd/system/containerd.service*
mkdir -p etc/containerd usr/lib/systemd/system usr/local/bin .old
pivot_root . .old
umount -l .old
rmdir .old
echo booted
exec sleep infinity
`

// unit is the relevant part of containerd's own unit.
const unit = `[Unit]
Description=containerd container runtime

[Service]
ExecStart=/usr/local/bin/containerd
Type=notify
`

// systemd runs the command of containerd.service after its drop-ins.
const systemd = `#!/bin/sh
cd /usr/lib/systemd/system
command=$(cat containerd.service containerd.service.d/*.conf /run/systemd/system/containerd.service.d/*.conf 2>/dev/null | sed -n 's/^ExecStart=\(..*\)/\1/p' | tail -n 1)
exec $command
`

// bootMachine makes a machine with a stock containerd for a node.
func bootMachine(n *harness.Node, stock string) (*machine, error) {
	holder := osexec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", boot, "boot", n.Dir()+"/", filepath.Dir(n.Attack()))
	holder.Env = append(os.Environ(), "NODE="+n.Dir()+"/") // the end of the node finds the process by this
	out, err := holder.StdoutPipe()
	if err != nil {
		return nil, err
	}
	var stderr bytes.Buffer
	holder.Stderr = &stderr
	if err := holder.Start(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "booted\n" {
		return nil, errors.Join(err, holder.Wait(), fmt.Errorf("the machine doesn't boot: %s", stderr.String()))
	}
	go func() { _ = holder.Wait() }() // it ends with the node
	m := &machine{holder.Process.Pid}
	for path, content := range map[string]string{"/usr/lib/systemd/system/containerd.service": unit, "/systemd": systemd} {
		if err := os.WriteFile(m.path(path), []byte(content), 0o755); err != nil {
			return nil, err
		}
	}
	_, err = m.run("cp", stock, "/usr/local/bin/containerd")
	return m, err
}

// path returns the path of a file of m on this machine.
func (m *machine) path(path string) string { return fmt.Sprintf("/proc/%d/root%s", m.holder, path) }

// run runs a program on the machine and returns its output.
func (m *machine) run(command ...string) (string, error) {
	out, err := osexec.Command("nsenter", append([]string{"--target", fmt.Sprint(m.holder), "--mount", "--"}, command...)...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%q on the machine: %w: %s", command, err, out)
	}
	return string(out), err
}

// do is run of a program that must succeed.
func (m *machine) do(t *testing.T, command ...string) string {
	t.Helper()
	out, err := m.run(command...)
	require.NoError(t, err)
	return out
}

// mounts returns the mounts of the machine.
func (m *machine) mounts(t *testing.T) (points []string) {
	t.Helper()
	file, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", m.holder))
	require.NoError(t, err)
	defer file.Close()
	mounts, err := mountinfo.GetMountsFromReader(file, nil)
	require.NoError(t, err)
	for _, mount := range mounts {
		points = append(points, mount.Mountpoint)
	}
	slices.Sort(points)
	return points
}

// configure writes config.toml of the machine: the node's, without the handler of the package, and
// edited.
func (m *machine) configure(n *harness.Node, edit func(config map[string]any)) error {
	text, err := os.ReadFile(filepath.Join(n.Dir(), "config.toml"))
	if err != nil {
		return err
	}
	var config map[string]any
	if err := toml.Unmarshal(text, &config); err != nil {
		return err
	}
	delete(criOf(config)["runtimes"].(map[string]any), harness.PodfsmHandler)
	delete(config, "imports")
	edit(config)
	if text, err = toml.Marshal(config); err != nil {
		return err
	}
	return os.WriteFile(m.path("/etc/containerd/config.toml"), text, 0o644)
}

// criOf returns the section with the runtime handlers.
func criOf(config map[string]any) map[string]any {
	return config["plugins"].(map[string]any)["io.containerd.cri.v1.runtime"].(map[string]any)["containerd"].(map[string]any)
}

// stripped is a folder of podfsm's programs as all tests run them, without symbols.
func stripped(t *testing.T) string {
	t.Helper()
	daemon, err := harness.BuildDaemon(t.Context(), harness.Podfsm)
	require.NoError(t, err)
	binaries := t.TempDir()
	for _, name := range []string{"containerd-podfsm", "podfsm", "podfsm-init"} {
		out, err := osexec.CommandContext(t.Context(), "strip", "-o", filepath.Join(binaries, name), filepath.Join(filepath.Dir(daemon), name)).CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	return binaries
}

const (
	handlerFile = "/etc/containerd/conf.d/podfsm.toml"
	dropIn      = "/usr/lib/systemd/system/containerd.service.d/podfsm.conf"
)

// installation is a node with a pod of stock containerd on which podfsm is installed and removed.
type installation struct {
	*testing.T
	*harness.Node
	m            *machine
	tarball, deb string // in the machine
	rpm          string // the same, in full
	before       harness.Census
	mounts       []string
	old          *harness.Pod // of stock containerd
	pod          *harness.Pod // podfsm's, from the installation to the drain
}

// startMachine starts a node with a pod of stock containerd, on a machine of its own.
func startMachine(t *testing.T) *installation {
	t.Helper()
	stock, err := harness.BuildDaemon(t.Context(), harness.Stock)
	require.NoError(t, err)
	i := &installation{T: t}
	i.Node = harness.StartNode(t, harness.Config{Install: func(n *harness.Node) (string, error) {
		var err error
		if i.m, err = bootMachine(n, stock); err != nil {
			return "", err
		}
		if err := i.m.configure(n, func(map[string]any) {}); err != nil {
			return "", err
		}
		start := filepath.Join(n.Dir(), "start")
		return start, os.WriteFile(start, fmt.Appendf(nil, "#!/bin/sh\nexec nsenter --target %d --mount -- /systemd\n", i.m.holder), 0o755)
	}})
	i.requireRuns("/usr/local/bin/containerd")
	i.old = startPod(t, i.Node, harness.StockHandler, i.PodConfig("old"))
	startContainer(t, i.old, "main")
	require.NoError(t, startPod(t, i.Node, harness.StockHandler, i.PodConfig("warm-up")).StopAndRemove(t.Context()))
	i.before, err = i.TidyCensus(t.Context())
	require.NoError(t, err)
	i.mounts = i.m.mounts(t)
	return i
}

// requireRuns requires the program of the running daemon.
func (i *installation) requireRuns(program string) {
	i.Helper()
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", i.Pid()))
	require.NoError(i, err)
	require.Equal(i, program, strings.TrimSuffix(exe, " (deleted)"))
}

func (i *installation) requireReady(pod *harness.Pod) {
	i.Helper()
	now, err := pod.Status(i.Context())
	require.NoError(i, err)
	require.Equal(i, runtime.PodSandboxState_SANDBOX_READY, now.GetState())
}

func (i *installation) requireNoLedger() {
	i.Helper()
	for _, dir := range []string{"root", "state"} { // as config.toml has them
		require.NoDirExists(i, filepath.Join(i.Dir(), dir, "io.containerd.podsandbox.controller.v1.podfsm"))
	}
}
