package integration

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// beforePodfsm is a node with a running stock containerd. podfsm's package was installed and
// configured, and containerd was not restarted yet.
type beforePodfsm struct {
	*harness.Node
	cli    string // beside containerd-podfsm
	config string // containerd's configuration file
	dropIn string // the one with podfsm's handler
}

func startBeforePodfsm(t *testing.T) beforePodfsm {
	t.Helper()
	daemon, err := harness.BuildDaemon(t.Context(), harness.Podfsm)
	require.NoError(t, err)
	b := beforePodfsm{cli: filepath.Join(filepath.Dir(daemon), "podfsm")}
	b.Node = harness.StartNode(t, harness.Config{Daemon: harness.Stock, Install: func(n *harness.Node) (string, error) {
		b.config, b.dropIn = filepath.Join(n.Dir(), "config.toml"), filepath.Join(n.Dir(), "conf.d/podfsm.toml")
		stock, err := harness.BuildDaemon(t.Context(), harness.Stock)
		if err != nil {
			return "", err
		}
		return stock, b.withoutHandler()
	}})
	require.NoError(t, os.Mkdir(filepath.Dir(b.dropIn), 0o755))
	out, err := osexec.CommandContext(t.Context(), b.cli, "handler", "--config", b.config).Output()
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(b.dropIn, out, 0o644))
	return b
}

// withoutHandler restores the configuration before podfsm, except for the import of drop-ins.
func (b *beforePodfsm) withoutHandler() error {
	text, err := os.ReadFile(b.config)
	if err != nil {
		return err
	}
	var config map[string]any
	if err := toml.Unmarshal(text, &config); err != nil {
		return err
	}
	delete(criOf(config)["runtimes"].(map[string]any), harness.PodfsmHandler)
	config["imports"] = []string{filepath.Join(filepath.Dir(b.dropIn), "*.toml")}
	if text, err = toml.Marshal(config); err != nil {
		return err
	}
	return os.WriteFile(b.config, text, 0o644)
}

// preflight runs podfsm doctor --preflight, and requires the exit status of its findings.
func (b *beforePodfsm) preflight(t *testing.T) []*podfsmv1.Finding {
	t.Helper()
	return b.preflightWith(t, "--config", b.config)
}

func (b *beforePodfsm) preflightWith(t *testing.T, flags ...string) []*podfsmv1.Finding {
	t.Helper()
	cmd := osexec.CommandContext(t.Context(), b.cli, append([]string{"--address", b.Socket(), "doctor", "--preflight", "-o", "json"}, flags...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var response podfsmv1.DoctorResponse
	require.NoError(t, protojson.Unmarshal(out, &response), "%v: %s", err, &stderr)
	want := 0
	for _, f := range response.GetFindings() {
		if f.GetStatus() == "fail" {
			want = 2
		}
		require.Equal(t, f.GetStatus() == "ok", f.GetRemedy() == "", "%v", f)
	}
	require.Equal(t, want, cmd.ProcessState.ExitCode(), "%s", &stderr)
	return response.GetFindings()
}

// edited replaces old by new in a file for a while.
func edited(file func(b *beforePodfsm) string, old, new string) func(*testing.T, *beforePodfsm) func() {
	return func(t *testing.T, b *beforePodfsm) func() {
		path := file(b)
		original, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Contains(t, string(original), old)
		require.NoError(t, os.WriteFile(path, []byte(strings.ReplaceAll(string(original), old, new)), 0o644))
		return func() { require.NoError(t, os.WriteFile(path, original, 0o644)) }
	}
}

func theConfig(b *beforePodfsm) string { return b.config }
func theDropIn(b *beforePodfsm) string { return b.dropIn }

// onNode breaks any node.
func onNode(inflict func(*testing.T, *harness.Node) func()) func(*testing.T, *beforePodfsm) func() {
	return func(t *testing.T, b *beforePodfsm) func() { return inflict(t, b.Node) }
}

// unready is a defect that prevents podfsm's pods from running after the switch, or affects them.
type unready struct {
	name     string
	inflict  func(*testing.T, *beforePodfsm) (cure func())
	check    string
	status   string
	evidence string
	remedy   string
	needsUp  bool // only visible while containerd runs
}

var unreadies = []unready{
	{
		name: "no import of drop-ins", inflict: edited(theConfig, "/conf.d/*.toml", "/elsewhere/*.toml"),
		check: "configuration", status: "fail", evidence: "no runtime handler there has sandboxer", remedy: "conf.d/*.toml",
	},
	{
		name: "no configuration file", inflict: func(t *testing.T, b *beforePodfsm) func() { return away("config.toml")(t, b.Node) },
		check: "configuration", status: "fail", evidence: "so containerd reads no drop-ins", remedy: "containerd-podfsm config default >",
	},
	{
		name: "a configuration that can't be read", inflict: edited(theConfig, "version = 4", "version = 4 4"),
		check: "configuration", status: "fail", evidence: "config.toml", remedy: "correct it",
	},
	{
		name: "no CRI, as in the configuration of some packages", inflict: edited(theConfig, "disabled_plugins = [", "disabled_plugins = ['io.containerd.grpc.v1.cri', "),
		check: "configuration", status: "fail", evidence: "disables containerd's CRI service", remedy: "remove cri from disabled_plugins",
	},
	{
		name: "no drop-in yet", inflict: func(t *testing.T, b *beforePodfsm) func() { return away("conf.d/podfsm.toml")(t, b.Node) },
		check: "configuration", status: "warn", evidence: "podfsm's handler isn't there yet", remedy: "the package brings it as ",
	},
	{
		name: "another cgroup driver than the node's", inflict: edited(theDropIn, "SystemdCgroup = false", "SystemdCgroup = true"),
		check: "cgroup driver", status: "fail", evidence: `SystemdCgroup = true, but false for the node's handler "runc"`, remedy: "podfsm handler --write ",
	},
	{
		name: "another runtime than the node's", inflict: edited(theDropIn, "/bin/runc'", "/bin/bridge'"),
		check: "cgroup driver", status: "warn", evidence: "/bin/bridge", remedy: "unless it is meant to differ",
	},
	{
		name: "a configuration that containerd hasn't read yet", inflict: edited(theConfig, "SystemdCgroup = false", "SystemdCgroup = true"),
		check: "cgroup driver", status: "warn", evidence: `runs has SystemdCgroup = false for handler "runc"`, remedy: "restart the node's own containerd before podfsm's package is installed", needsUp: true,
	},
	{
		name: "a shim that is missing", inflict: edited(theDropIn, "io.containerd.runc.v2", "io.containerd.nowhere.v2"),
		check: "runtime", status: "fail", evidence: "containerd-shim-nowhere-v2", remedy: "install the shim", needsUp: true,
	},
	{
		name: "a runtime that is missing", inflict: onNode(away("bin/runc")),
		check: "runtime", status: "fail", evidence: "bin/runc", remedy: "install the runtime",
	},
	{
		name: "a runtime without idmapped mounts", inflict: onNode(replaced("bin/runc", forgetsIDMap, 0o755)),
		check: "runtime", status: "fail", evidence: "no idmapped mounts", remedy: "install runc 1.2 or later",
	},
	{
		name: "a closed directory", inflict: func(t *testing.T, b *beforePodfsm) func() {
			dir := filepath.Join(b.Dir(), "state")
			require.NoError(t, os.Chmod(dir, 0o700))
			return func() { require.NoError(t, os.Chmod(dir, 0o711)) }
		},
		check: "directories", status: "fail", evidence: "/state has mode 0700", remedy: "chmod o+x ",
	},
	{
		name: "a CNI plugin that is missing", inflict: onNode(away("cni/bin/portmap")),
		check: "networks", status: "fail", evidence: `plugin "portmap"`, remedy: "cni/bin",
	},
	{
		name: "a snapshotter without remap-ids", inflict: edited(theDropIn, "sandboxer = 'podfsm'", "sandboxer = 'podfsm'\nsnapshotter = 'native'"),
		check: "snapshotter", status: "fail", evidence: `"native" can't map ids`, remedy: `snapshotter = "overlayfs"`, needsUp: true,
	},
	{
		name: "a filesystem for snapshots that can't be mapped", inflict: onNode(covered("root/io.containerd.snapshotter.v1.overlayfs", "ramfs", "")),
		check: "overlay", status: "fail", evidence: "invalid argument", remedy: "ext4, xfs or btrfs",
	},
	{
		name: "a drain that was left over", inflict: func(t *testing.T, b *beforePodfsm) func() {
			dir := filepath.Join(b.Dir(), "root", pluginDir)
			require.NoError(t, os.Mkdir(dir, 0o700))
			require.NoError(t, os.WriteFile(filepath.Join(dir, "draining"), nil, 0o600))
			return func() { require.NoError(t, os.RemoveAll(dir)) }
		},
		check: "podfsm", status: "warn", evidence: "an earlier podfsm was drained", remedy: "podfsm drain --cancel",
	},
	{
		name: "another runtime on the network", inflict: func(t *testing.T, b *beforePodfsm) func() {
			file := filepath.Join("/var/lib/cni/results", b.Name()+"-foreign-eth0")
			require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o700))
			text := fmt.Sprintf(`{"kind": "cniCacheV1", "containerId": "foreign", "networkName": %q, "ifName": "eth0", "config": ""}`, b.Name())
			require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
			return func() { require.NoError(t, os.Remove(file)) }
		},
		check: "shared networks", status: "warn", evidence: `an attachment of "foreign"`, remedy: "remove the other runtime", needsUp: true,
	},
}

// TestPreflight examines a node with pods before podfsm is installed. It finds nothing to fix,
// until the test breaks things one by one. It changes nothing, and with containerd down it checks
// what it can. Then podfsm runs pods there.
func TestPreflight(t *testing.T) {
	b := startBeforePodfsm(t)
	pod := startPod(t, b.Node, harness.StockHandler, b.PodConfig("pod"))
	c := startContainer(t, pod, "main")
	second := startPod(t, b.Node, harness.StockHandler, b.PodConfig("host-users", harness.HostUsers()))
	before, err := b.Rest(t.Context())
	require.NoError(t, err)
	files := nodeFiles(t, b.Node)

	found := b.preflight(t)
	for _, f := range found {
		if !slices.Contains([]string{"service", "netns directory", "security modules", "inotify", "keys"}, f.GetCheck()) { // these depend on the machine
			require.Equal(t, "ok", f.GetStatus(), "%v", f)
		}
		require.NotEqual(t, "fail", f.GetStatus(), "%v", f)
	}
	require.Regexp(t, `^containerd v?2\.4\.\S+ runs, containerd-podfsm is v2\.4\.`, findingOf(t, found, "containerd", "").GetEvidence())
	require.Contains(t, findingOf(t, found, "configuration", "").GetEvidence(), "(version 4) imports ")
	require.Contains(t, findingOf(t, found, "handlers", "").GetEvidence(), "podfsm (users by kubelet)")
	require.Contains(t, findingOf(t, found, "overlay", "idmap").GetEvidence(), "root/io.containerd.snapshotter.v1.overlayfs")
	require.Equal(t, findingOf(t, found, "configuration", "").GetEvidence(), findingOf(t, b.preflightWith(t), "configuration", "").GetEvidence(),
		"the containerd that runs says which file it has")
	require.Equal(t, files, nodeFiles(t, b.Node), "it changes nothing")
	b.RequireClean(t, before)

	broken := func(t *testing.T, up bool) {
		for _, u := range unreadies {
			if u.needsUp && !up {
				continue
			}
			t.Run(u.name, func(t *testing.T) {
				cure := sync.OnceFunc(u.inflict(t, &b))
				defer cure()
				var f *podfsmv1.Finding
				for _, one := range b.preflight(t) {
					if one.GetCheck() == u.check && one.GetStatus() == u.status && strings.Contains(one.GetEvidence(), u.evidence) {
						f = one
					}
				}
				require.NotNil(t, f, "it isn't seen")
				require.Contains(t, f.GetRemedy(), u.remedy)
				cure()
				for _, one := range b.preflight(t) {
					require.NotEqual(t, "fail", one.GetStatus(), "%v", one)
				}
			})
		}
	}
	t.Run("containerd runs", func(t *testing.T) { broken(t, true) })
	b.RequireClean(t, before)
	for _, p := range []*harness.Pod{pod, second} {
		status, err := p.Status(t.Context())
		require.NoError(t, err)
		require.Equal(t, runtime.PodSandboxState_SANDBOX_READY, status.GetState())
	}
	require.Equal(t, "0\n", exec(t, c, "id", "-u"))

	require.NoError(t, b.Stop(t.Context()))
	found = b.preflight(t)
	require.Contains(t, findingOf(t, found, "containerd", "").GetEvidence(), "containerd is down")
	for _, check := range []string{"configuration", "cgroup driver", "podfsm", "runtime", "overlay", "tmpfs", "directories", "networks", "handlers"} {
		require.Equal(t, "ok", findingOf(t, found, check, "").GetStatus(), "%v", found)
	}
	t.Run("containerd is down", func(t *testing.T) { broken(t, false) })

	// Without CRI, the rest is checked.
	enable := edited(theConfig, "disabled_plugins = [", "disabled_plugins = ['io.containerd.grpc.v1.cri', ")(t, &b)
	stop := startWithoutCRI(t, &b)
	require.Regexp(t, `^containerd v?2\.4\.`, findingOf(t, b.preflight(t), "containerd", "").GetEvidence())
	stop()
	enable()

	// The preflight was right.
	require.NoError(t, b.Use(t.Context(), harness.Podfsm))
	require.NoError(t, b.Start(t.Context()))
	require.NoError(t, runAndRemove(t, b.Node, b.PodConfig("podfsm")))
	require.NoError(t, runAndRemove(t, b.Node, b.PodConfig("podfsm-host-users", harness.HostUsers())))
	require.NoError(t, runAndRemove(t, b.Node, b.PodConfig("podfsm-host-network", harness.HostUsers(), harness.HostNetwork())))
	_, errOut, code := cli(t, b.Node, "doctor", "--preflight", "--config", b.config)
	require.Equal(t, 1, code)
	require.Contains(t, errOut, "has podfsm already: run podfsm doctor without --preflight")
}

// startWithoutCRI starts the stock containerd, without waiting for CRI, which its configuration disables.
func startWithoutCRI(t *testing.T, b *beforePodfsm) (stop func()) {
	t.Helper()
	stock, err := harness.BuildDaemon(t.Context(), harness.Stock)
	require.NoError(t, err)
	cmd := osexec.CommandContext(t.Context(), stock, "--config", b.config)
	cmd.Dir = b.Dir()
	require.NoError(t, b.Inside(cmd.Start))
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		out, err := osexec.CommandContext(t.Context(), b.Program("ctr"), "--address", b.Socket(), "version").CombinedOutput()
		require.NoError(c, err, "%s", out)
	}, waitFor, tick)
	return func() {
		require.NoError(t, cmd.Process.Signal(unix.SIGTERM))
		require.NoError(t, cmd.Wait())
	}
}

// TestPreflightNeedsRoot requires an error for other users.
func TestPreflightNeedsRoot(t *testing.T) {
	daemon, err := harness.BuildDaemon(t.Context(), harness.Podfsm)
	require.NoError(t, err)
	program, err := os.ReadFile(filepath.Join(filepath.Dir(daemon), "podfsm"))
	require.NoError(t, err)
	dir, err := os.MkdirTemp("/tmp", "preflight-*")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o755))
	copied := filepath.Join(dir, "podfsm")
	require.NoError(t, os.WriteFile(copied, program, 0o755))
	out, err := osexec.CommandContext(t.Context(), "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", copied, "doctor", "--preflight").CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "only root can examine the node")
}

// nodeFiles returns the files of a node with their content, except for the log and the databases of
// containerd.
func nodeFiles(t *testing.T, n *harness.Node) map[string]string {
	t.Helper()
	files := map[string]string{}
	require.NoError(t, filepath.WalkDir(n.Dir(), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		files[path] = info.Mode().String()
		if path != n.Dir() && d.Type()&fs.ModeSymlink == 0 && mounted(t, path) { // a pod's root filesystem, a namespace
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if !d.Type().IsRegular() || strings.HasSuffix(path, ".log") || strings.HasSuffix(path, ".db") {
			return nil
		}
		text, err := os.ReadFile(path)
		files[path] += fmt.Sprintf(" %v %x", info.ModTime(), sha256.Sum256(text))
		return err
	}))
	require.NotEmpty(t, files)
	return files
}

// mounted reports whether something is mounted on a path.
func mounted(t *testing.T, path string) bool {
	t.Helper()
	var stat unix.Statx_t
	require.NoError(t, unix.Statx(unix.AT_FDCWD, path, 0, 0, &stat))
	return stat.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}
