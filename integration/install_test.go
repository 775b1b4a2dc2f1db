package integration

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	goruntime "runtime"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// machine is the root filesystem of a machine on which things are installed: this one's, with all changes in memory, as the root of a
// mount namespace of its own.
type machine struct{ holder int } // a process that keeps it

// boot makes the machine's root filesystem and waits for ever.
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

// unit is containerd's own, as far as it matters here.
const unit = `[Unit]
Description=containerd container runtime

[Service]
ExecStart=/usr/local/bin/containerd
Type=notify
`

// systemd starts what containerd.service says, after its drop-ins.
const systemd = `#!/bin/sh
cd /usr/lib/systemd/system
command=$(cat containerd.service containerd.service.d/*.conf 2>/dev/null | sed -n 's/^ExecStart=\(..*\)/\1/p' | tail -n 1)
exec $command
`

// bootMachine makes a machine with a stock containerd for a node.
func bootMachine(n *harness.Node, stock string) (*machine, error) {
	holder := osexec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", boot, "boot", n.Dir()+"/", filepath.Dir(n.Attack()))
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

// path is where this machine sees a file of m.
func (m *machine) path(path string) string { return fmt.Sprintf("/proc/%d/root%s", m.holder, path) }

// run runs a program on the machine and returns what it has printed.
func (m *machine) run(command ...string) (string, error) {
	out, err := osexec.Command("nsenter", append([]string{"--target", fmt.Sprint(m.holder), "--mount", "--"}, command...)...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%q on the machine: %w: %s", command, err, out)
	}
	return string(out), err
}

// do is run, which has to work.
func (m *machine) do(t *testing.T, command ...string) string {
	t.Helper()
	out, err := m.run(command...)
	require.NoError(t, err)
	return out
}

// mounts are those of the machine.
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

// configure writes the machine's config.toml: the node's, without the handler that the package brings, and as edited.
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

// criOf is the section that has the runtime handlers.
func criOf(config map[string]any) map[string]any {
	return config["plugins"].(map[string]any)["io.containerd.cri.v1.runtime"].(map[string]any)["containerd"].(map[string]any)
}

// pack makes packages of built binaries for an architecture, and returns the paths of the tarball and of the Debian package.
func pack(t *testing.T, arch, binaries string) (tarball, deb string) {
	t.Helper()
	nfpm, err := harness.BuildNFPM(t.Context())
	require.NoError(t, err)
	dir := t.TempDir()
	out, err := osexec.CommandContext(t.Context(), "../deploy/package/pack", "v1.2.3-4-gabcdef0", "1795529540", arch, binaries, nfpm, dir).CombinedOutput()
	require.NoError(t, err, "%s", out)
	return filepath.Join(dir, "podfsm-1.2.3-4-gabcdef0-linux-"+arch+".tar.gz"), filepath.Join(dir, "podfsm_1.2.3-4-gabcdef0_"+arch+".deb")
}

// packages are the tarball and the Debian package for this machine: what make dist builds in full, else the daemon that all tests run.
func packages(t *testing.T) (tarball, deb string) {
	t.Helper()
	if full() {
		dir := dist(t)
		return only(t, dir, "*-linux-"+goruntime.GOARCH+".tar.gz"), only(t, dir, "*_"+goruntime.GOARCH+".deb")
	}
	daemon, err := harness.BuildDaemon(t.Context(), harness.Podfsm)
	require.NoError(t, err)
	binaries := t.TempDir()
	for _, name := range []string{"containerd-podfsm", "podfsm", "podfsm-init"} {
		out, err := osexec.CommandContext(t.Context(), "strip", "-o", filepath.Join(binaries, name), filepath.Join(filepath.Dir(daemon), name)).CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	return pack(t, goruntime.GOARCH, binaries)
}

// only is the one file in a directory that a pattern matches.
func only(t *testing.T, dir, pattern string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, pattern))
	require.NoError(t, err)
	require.Len(t, files, 1)
	return files[0]
}

// A node that runs stock containerd gets the package, runs pods with podfsm, and goes back. In full, with the static binaries of make
// dist.
func TestInstall(t *testing.T) {
	stock, err := harness.BuildDaemon(t.Context(), harness.Stock)
	require.NoError(t, err)
	tarball, deb := packages(t)

	var m *machine
	n := harness.StartNode(t, harness.Config{Install: func(n *harness.Node) (string, error) {
		var err error
		if m, err = bootMachine(n, stock); err != nil {
			return "", err
		}
		if err := m.configure(n, func(map[string]any) {}); err != nil {
			return "", err
		}
		start := filepath.Join(n.Dir(), "start")
		return start, os.WriteFile(start, fmt.Appendf(nil, "#!/bin/sh\nexec nsenter --target %d --mount -- /systemd\n", m.holder), 0o755)
	}})
	// The packages are outside of the machine.
	for _, file := range []*string{&tarball, &deb} {
		inside := filepath.Join(n.Dir(), filepath.Base(*file))
		content, err := os.ReadFile(*file)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(inside, content, 0o600))
		*file = inside
	}
	runs := func() string {
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", n.Pid()))
		require.NoError(t, err)
		return strings.TrimSuffix(exe, " (deleted)")
	}
	isReady := func(pod *harness.Pod) {
		t.Helper()
		now, err := pod.Status(t.Context())
		require.NoError(t, err)
		require.Equal(t, runtime.PodSandboxState_SANDBOX_READY, now.GetState())
	}

	noLedger := func() {
		t.Helper()
		for _, dir := range []string{"root", "state"} { // as config.toml has them
			require.NoDirExists(t, filepath.Join(n.Dir(), dir, "io.containerd.podsandbox.controller.v1.podfsm"))
		}
	}

	require.Equal(t, "/usr/local/bin/containerd", runs())
	old := startPod(t, n, harness.StockHandler, n.PodConfig("old"))
	startContainer(t, old, "main")
	require.NoError(t, startPod(t, n, harness.StockHandler, n.PodConfig("warm-up")).StopAndRemove(t.Context()))
	before, err := n.TidyCensus(t.Context())
	require.NoError(t, err)
	mounts := m.mounts(t)

	// Examine the node, then install, by what the preflight says is to be changed.
	preflight := func(program string) (string, error) {
		out, err := m.run(program, "doctor", "--preflight")
		return strings.Join(strings.Fields(out), " "), err // as it isn't wrapped
	}
	for dir, unpack := range map[string][]string{"/deb": {"dpkg-deb", "-x", deb, "/deb"}, "/tarball": {"tar", "-C", "/tarball", "-xzf", tarball}} {
		m.do(t, "mkdir", dir)
		m.do(t, unpack...)
		told, err := preflight(dir + "/usr/bin/podfsm")
		require.ErrorContains(t, err, "1 check has failed", "podfsm has no handler yet")
		require.Contains(t, told, `let /etc/containerd/config.toml have, at its top: imports = ["/etc/containerd/conf.d/*.toml"]`)
		require.Contains(t, told, "ok pause "+dir+"/usr/bin/podfsm-init: ")
		m.do(t, "rm", "-r", dir)
	}
	installed := m.do(t, "dpkg", "-i", deb)
	require.Contains(t, installed, `imports = ["/etc/containerd/conf.d/*.toml"]`, "it says what is missing")
	require.Contains(t, installed, "podfsm doctor --preflight")
	require.Contains(t, installed, "from now on every start of containerd.service runs containerd-podfsm")
	handler := "/etc/containerd/conf.d/podfsm.toml"
	told, err := preflight("podfsm")
	require.Error(t, err)
	require.Contains(t, told, `let /etc/containerd/config.toml have, at its top: imports = ["/etc/containerd/conf.d/*.toml"]`)
	imports := func(config map[string]any) { config["imports"] = []string{"/etc/containerd/conf.d/*.toml"} }
	require.NoError(t, m.configure(n, imports))
	told, _ = preflight("podfsm")
	require.Contains(t, told, "podfsm handler --write "+handler, "the node's runc isn't where podfsm.toml takes it to be")
	m.do(t, "podfsm", "handler", "--write", handler)
	told, err = preflight("podfsm")
	require.NoError(t, err)
	require.NotContains(t, told, "podfsm handler --write")
	dump := m.do(t, "containerd-podfsm", "config", "dump")
	require.Contains(t, dump, "sandboxer = 'podfsm'")
	require.NotContains(t, dump, "unknown key")
	verified, err := m.run("systemd-analyze", "verify", "--man=no", "/usr/lib/systemd/system/containerd.service")
	require.NoError(t, err)
	require.NotContains(t, verified, "podfsm.conf")
	require.Equal(t, "/usr/local/bin/containerd", runs(), "nothing has been restarted")
	require.NoError(t, n.Restart(t.Context()))
	require.Equal(t, "/usr/bin/containerd-podfsm", runs())
	isReady(old)
	pod := startPod(t, n, harness.PodfsmHandler, n.PodConfig("pod"))
	startContainer(t, pod, "main")
	require.Contains(t, m.do(t, "podfsm", "--address", n.Socket(), "ps"), "default/pod")

	// It can't be removed, but be upgraded, while pods live.
	refused := func() {
		t.Helper()
		_, err := m.run("dpkg", "-r", "podfsm")
		require.ErrorContains(t, err, "podfsm has 1 sandbox, which a containerd without podfsm can't stop")
		require.ErrorContains(t, err, "default/pod")
		require.FileExists(t, m.path("/usr/bin/containerd-podfsm"))
		require.FileExists(t, m.path("/usr/lib/systemd/system/containerd.service.d/podfsm.conf"))
	}
	refused()
	require.NoError(t, n.Stop(t.Context()))
	refused()
	require.NotContains(t, m.do(t, "dpkg", "-i", deb), "imports")
	require.NoError(t, n.Start(t.Context()))
	isReady(pod)

	// A containerd without podfsm can't stop the pod, and the package isn't removed below it. Once podfsm is back, all is well.
	dropIn := "/usr/lib/systemd/system/containerd.service.d/podfsm.conf"
	m.do(t, "mv", dropIn, "/podfsm.conf")
	require.NoError(t, n.Restart(t.Context()))
	require.Equal(t, "/usr/local/bin/containerd", runs())
	require.Error(t, pod.StopAndRemove(t.Context()))
	m.do(t, "cp", "/podfsm.conf", dropIn)
	refused()
	require.NoError(t, n.Restart(t.Context()))
	isReady(pod)

	// Drain.
	_, err = m.run("podfsm", "drain", "--wait=0s")
	require.ErrorContains(t, err, "1 sandbox left")
	require.NoError(t, n.Restart(t.Context()))
	_, err = n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("new"))
	require.Equal(t, codes.Unavailable, status.Code(err))
	require.ErrorContains(t, err, "podfsm drain --cancel")
	refused()
	isReady(pod)
	out := m.do(t, "podfsm", "drain", "--force")
	require.Regexp(t, `gone: \S+ default/pod\ndrained: podfsm has no sandboxes\n$`, out)
	list, err := n.Sandboxes().List(t.Context(), &podfsmv1.ListRequest{})
	require.NoError(t, err)
	require.Empty(t, list.GetSandboxes())
	require.Contains(t, m.do(t, "podfsm", "--address", n.Socket(), "leaks"), "SANDBOX")

	// Back to stock, once nothing but podfsm's handlers needs it.
	require.NoError(t, m.configure(n, func(config map[string]any) {
		imports(config)
		config["plugins"].(map[string]any)["io.containerd.cri.v1.images"].(map[string]any)["snapshotter"] = "podfsm"
		criOf(config)["default_runtime_name"] = harness.PodfsmHandler
	}))
	_, err = m.run("dpkg", "-r", "podfsm")
	require.ErrorContains(t, err, "change snapshotter in [plugins.'io.containerd.cri.v1.images'] and default_runtime_name in [")
	require.FileExists(t, m.path("/usr/bin/containerd-podfsm"))
	require.NoError(t, m.configure(n, imports))
	m.do(t, "dpkg", "-r", "podfsm")
	require.NoFileExists(t, m.path("/usr/bin/containerd-podfsm"))
	require.FileExists(t, m.path(handler), "as it was edited, dpkg keeps it until it is purged")
	require.NoError(t, n.Restart(t.Context()))
	require.Equal(t, "/usr/local/bin/containerd", runs())
	isReady(old)
	_, err = n.RunPod(t.Context(), harness.PodfsmHandler, n.PodConfig("nobody's"))
	require.ErrorContains(t, err, "podfsm", "nobody has that sandboxer")
	m.do(t, "dpkg", "-P", "podfsm")
	require.NoFileExists(t, m.path(handler))
	noLedger()
	require.NoError(t, n.Restart(t.Context()))
	isReady(old)
	again := startPod(t, n, harness.StockHandler, n.PodConfig("again"))
	startContainer(t, again, "main")
	require.NoError(t, again.StopAndRemove(t.Context()))
	n.RequireClean(t, before)
	require.Equal(t, mounts, m.mounts(t))

	// The same by the tarball.
	m.do(t, "tar", "-C", "/", "-xzf", tarball)
	require.NoError(t, n.Restart(t.Context()))
	require.Equal(t, "/usr/bin/containerd-podfsm", runs())
	_, err = m.run("/usr/share/podfsm/uninstall")
	require.ErrorContains(t, err, "takes new pods")
	m.do(t, "podfsm", "drain")
	m.do(t, "/usr/share/podfsm/uninstall")
	noLedger()
	require.NoError(t, n.Restart(t.Context()))
	require.Equal(t, "/usr/local/bin/containerd", runs())
	require.Empty(t, strings.TrimSpace(m.do(t, "sh", "-c", "find /usr /etc -xdev -path '*podfsm*' -not -path '*/.build/*' -newer /systemd")))
	n.RequireClean(t, before)
	require.NoError(t, old.StopAndRemove(t.Context()))
}

// The same input gives the same packages, whenever and by whomever they are made. In full, two builds of one commit, in two places, are
// the same, and say what they are.
func TestPackagesAreReproducible(t *testing.T) {
	if !full() {
		binaries := t.TempDir()
		for _, name := range []string{"containerd-podfsm", "podfsm", "podfsm-init"} {
			require.NoError(t, os.WriteFile(filepath.Join(binaries, name), []byte(name), 0o600))
		}
		for _, arch := range []string{"amd64", "arm64"} {
			tarball, deb := pack(t, arch, binaries)
			again, debAgain := pack(t, arch, binaries)
			require.Equal(t, digest(t, tarball), digest(t, again))
			require.Equal(t, digest(t, deb), digest(t, debAgain))
			field, err := osexec.CommandContext(t.Context(), "dpkg-deb", "--field", deb, "Architecture").Output()
			require.NoError(t, err)
			require.Equal(t, arch+"\n", string(field))
			require.NotEqual(t, digest(t, tarball), digest(t, deb))
			requirePages(t, tarball)
		}
		return
	}
	dists := []string{dist(t), dist(t)}
	sums, err := os.ReadFile(filepath.Join(dists[0], "SHA256SUMS"))
	require.NoError(t, err)
	again, err := os.ReadFile(filepath.Join(dists[1], "SHA256SUMS"))
	require.NoError(t, err)
	require.Equal(t, string(sums), string(again))
	require.Len(t, strings.Split(strings.TrimSpace(string(sums)), "\n"), 4)

	tarball := only(t, dists[0], "*-linux-"+goruntime.GOARCH+".tar.gz")
	dir := t.TempDir()
	for _, program := range []string{"podfsm", "containerd-podfsm", "podfsm-init"} {
		require.NoError(t, osexec.CommandContext(t.Context(), "tar", "-C", dir, "-xzf", tarball, "usr/bin/"+program).Run())
		version, err := osexec.CommandContext(t.Context(), filepath.Join(dir, "usr/bin", program), "--version").Output()
		require.NoError(t, err)
		require.Regexp(t, `v?0\.0\.0-1-g[0-9a-f]{7,}`, string(version))
	}
}

// requirePages fails unless the pages in a tarball are all there and lead to each other.
func requirePages(t *testing.T, tarball string) {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, osexec.CommandContext(t.Context(), "tar", "-C", dir, "-xzf", tarball, "usr/share/doc/podfsm").Run())
	root := filepath.Join(dir, "usr/share/doc/podfsm")
	for page, text := range pages(t) {
		in := filepath.Join(root, "docs")
		if page == "README.md" {
			in = root
		}
		require.FileExists(t, filepath.Join(in, page))
		for _, link := range regexp.MustCompile(`\]\(([^):#]+)[)#]`).FindAllStringSubmatch(text, -1) {
			if target := filepath.Join(in, link[1]); strings.HasPrefix(target, filepath.Join(root, "docs")) {
				require.FileExists(t, target, "linked in %s", page)
			}
		}
	}
}

// dist runs make dist on a copy of this repository that is a commit of its own, the same each time.
func dist(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	script := `set -e
tar -C .. --exclude=./.git --exclude=./.build --exclude=./bin --exclude=./dist -c . | tar -C "$1" -x
cd "$1"
git init -q
git add -A
git -c user.name=dist -c user.email=dist@localhost commit -qm dist
make dist
`
	cmd := osexec.CommandContext(t.Context(), "bash", "-c", script, "dist", dir)
	cmd.Env = append(os.Environ(), "GIT_AUTHOR_DATE=1795529540 +0000", "GIT_COMMITTER_DATE=1795529540 +0000")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return filepath.Join(dir, "dist")
}

func digest(t *testing.T, file string) string {
	t.Helper()
	content, err := os.ReadFile(file)
	require.NoError(t, err)
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}
