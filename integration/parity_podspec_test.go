package integration

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// Settings of the node that affect a pod without its own settings.
const otherDefaults = specConfig + `
[plugins.'io.containerd.cri.v1.runtime']
  enable_unprivileged_ports = false
  enable_unprivileged_icmp = false
  unset_seccomp_profile = "runtime/default"
`

// shapes are the pods that both handlers run. Independent settings share a pod.
func shapes(seccompFile string) []shape {
	int64Value := func(v int64) *runtime.Int64Value { return &runtime.Int64Value{Value: v} }
	return []shape{
		{"plain", func(*runtime.PodSandboxConfig) {}},
		{"host users", harness.HostUsers()},
		{"host network", harness.HostNetwork()},
		{"host network in a user namespace", hostNetworkUserNS},
		{"no user namespace, seccomp profile, hostname and DNS named", func(c *runtime.PodSandboxConfig) {
			nsOptions(c).UsernsOptions, security(c).Seccomp, c.Hostname, c.DnsConfig = nil, nil, "", nil
		}},
		{"no namespaces named", func(c *runtime.PodSandboxConfig) {
			security(c).NamespaceOptions, c.DnsConfig = nil, &runtime.DNSConfig{}
		}},
		{"neither security context nor cgroup", func(c *runtime.PodSandboxConfig) {
			c.Linux.SecurityContext, c.Linux.CgroupParent = nil, ""
		}},
		{"no Linux section", func(c *runtime.PodSandboxConfig) { c.Linux = nil }},
		{"privileged in namespaces of the node", func(c *runtime.PodSandboxConfig) {
			harness.HostUsers()(c)
			nsOptions(c).Pid, nsOptions(c).Ipc, security(c).Privileged = runtime.NamespaceMode_NODE, runtime.NamespaceMode_NODE, true
		}},
		{"privileged on the node's network", func(c *runtime.PodSandboxConfig) {
			harness.HostNetwork()(c)
			security(c).Privileged = true
		}},
		{"everything asked for", func(c *runtime.PodSandboxConfig) {
			c.Hostname = "web.shop"
			c.DnsConfig = &runtime.DNSConfig{Servers: []string{"10.0.0.1", "fd00::1"}, Searches: []string{"shop", "svc"}}
			c.Labels = map[string]string{"app": "web", "example.com/tier": ""}
			c.Annotations = map[string]string{
				"example.com/a": "1", "example.com/b/c": "2", "other.com/a": "3",
				"containerd.io/snapshot/example": "4",
			}
			c.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "2000 65000"}
			c.Linux.Overhead = &runtime.LinuxContainerResources{CpuShares: 10}
			c.Linux.Resources = &runtime.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 512, MemoryLimitInBytes: 64 << 20}
			security(c).RunAsUser, security(c).RunAsGroup = int64Value(1000), int64Value(2000)
			security(c).SelinuxOptions = &runtime.SELinuxOption{Type: "container_t", Level: "s0:c1,c2"}
			nsOptions(c).Pid = runtime.NamespaceMode_POD
		}},
		{"user without group, seccomp by file", func(c *runtime.PodSandboxConfig) {
			security(c).RunAsUser = int64Value(1000)
			security(c).Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: seccompFile}
		}},
		{"groups, seccomp by the old field", func(c *runtime.PodSandboxConfig) {
			security(c).SupplementalGroups = []int64{4000, 3000}
			//lint:ignore SA1019 older clients send it
			security(c).Seccomp, security(c).SeccompProfilePath = nil, "localhost/"+seccompFile
		}},
		{"sysctls that the node has defaults for, seccomp off", func(c *runtime.PodSandboxConfig) {
			harness.HostUsers()(c)
			security(c).Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}
			c.Linux.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "80", "net.ipv4.ping_group_range": "1 0"}
		}},
		{"annotations and labels that aren't a pod's to have", func(c *runtime.PodSandboxConfig) {
			c.Linux.Resources = &runtime.LinuxContainerResources{MemoryLimitInBytes: 64 << 20}
			c.Annotations = map[string]string{"io.kubernetes.cri.sandbox-id": "another", "io.kubernetes.cri.sandbox-memory": "999"}
			c.Labels = map[string]string{"containerd.io/restart.status": "stopped"}
		}},
	}
}

// deliberate are the intended differences between a stock pod and a podfsm pod. Any other
// difference fails.
var deliberate = []struct {
	field       string
	stock, ours string // "" is a missing field
	when        func(*runtime.PodSandboxConfig) bool
	why         string
}{
	{
		field: "spec.linux.namespaces[network].path",
		stock: "NODE/state/io.containerd.grpc.v1.cri/netns/NETNS",
		when:  func(c *runtime.PodSandboxConfig) bool { return !onNodeNetwork(c) },
		why:   "the runtime makes the network namespace, so that the pod's user namespace owns it",
	},
	{
		field: "spec.linux.namespaces[user].path",
		stock: "NODE/state/io.containerd.grpc.v1.cri/sandboxes/ID/pinned-namespaces/user",
		when:  pinsUserNS,
		why:   "the runtime makes the user namespace too, none is there before",
	},
	{
		field: "state dir/pinned-namespaces",
		stock: "drwxr-xr-x 0:0",
		when:  pinsUserNS,
		why:   "pause holds the user namespace, nothing pins it",
	},
	{
		field: "state dir/pinned-namespaces/user",
		stock: "-r--r--r-- 0:0",
		when:  pinsUserNS,
		why:   "as above",
	},
	{
		field: "spec.process.user.additionalGids",
		stock: "65535",
		ours:  "3000 4000 65535",
		when: func(c *runtime.PodSandboxConfig) bool {
			return len(c.GetLinux().GetSecurityContext().GetSupplementalGroups()) > 0
		},
		why: "stock loses the supplemental groups of a pod whose image or security context names a user",
	},
	{
		field: "spec.annotations.io.kubernetes.cri.sandbox-memory",
		stock: "999",
		ours:  "67108864",
		when: func(c *runtime.PodSandboxConfig) bool {
			return c.GetAnnotations()["io.kubernetes.cri.sandbox-memory"] != ""
		},
		why: "a pod's annotations must not replace what the runtime is told about it",
	},
	{
		field: "container.labels.containerd.io/restart.status",
		stock: "stopped",
		when:  func(c *runtime.PodSandboxConfig) bool { return c.GetLabels()["containerd.io/restart.status"] != "" },
		why:   "a pod's labels must not steer containerd's restart monitor",
	},
	{
		field: "container.extensions",
		stock: "io.cri-containerd.sandbox.metadata",
		when:  always,
		why:   "with it the stock controller would take the sandbox for its own",
	},
	{
		field: "snapshot.labels.containerd.io/gc.root",
		ours:  "TIME",
		when:  always,
		why:   "the snapshot is made before a container refers to it",
	},
}

func always(*runtime.PodSandboxConfig) bool { return true }

// pinsUserNS reports whether stock makes the user namespace of the pod before its pause.
func pinsUserNS(c *runtime.PodSandboxConfig) bool {
	users := c.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
	return users != nil && users.GetMode() == runtime.NamespaceMode_POD && !onNodeNetwork(c)
}

// confinement are the fields of what pause may do and see, independent of the pod. podfsm's pause
// has less than stock's, see TestContainersLikeStock, and has the same for each pod, except for a
// shm that is shared with the node.
var (
	confinement = regexp.MustCompile(`^spec\.(mounts|process\.capabilities|linux\.(maskedPaths|readonlyPaths|seccomp|resources\.devices))($|[.\[])`)
	ofShm       = regexp.MustCompile(`^spec\.mounts\[/dev/shm\]`)
)

func TestPauseSpecLikeStock(t *testing.T) {
	seccompFile := filepath.Join(t.TempDir(), "seccomp.json")
	require.NoError(t, os.WriteFile(seccompFile, []byte(`{"defaultAction": "SCMP_ACT_LOG"}`), 0o644))

	all := shapes(seccompFile)
	t.Run("containerd's defaults", func(t *testing.T) {
		n := harness.StartNode(t, harness.Config{TOML: specConfig})
		comparePods(t, n, all)
	})
	t.Run("other defaults", func(t *testing.T) {
		n := harness.StartNode(t, harness.Config{TOML: otherDefaults})
		// The lower bound by restrict_oom_score_adj.
		require.NoError(t, os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", n.Pid()), []byte("300"), 0o644))
		comparePods(t, n, slices.DeleteFunc(all, func(s shape) bool {
			return !slices.Contains([]string{"plain", "host network", "no user namespace, seccomp profile, hostname and DNS named", "everything asked for"}, s.name)
		}))
	})
}

// comparePods runs each pod by the stock handler and then by podfsm's.
func comparePods(t *testing.T, n *harness.Node, shapes []shape) {
	// Any network will do, and this one is fast.
	require.NoError(t, n.SetChain(t.Context(), bridge(n, "cni0", harness.Subnet)))
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	confined := factsOf(t, n, harness.PodfsmHandler, n.PodConfig("pod")).take(confinement)
	require.NotEmpty(t, confined)
	for _, s := range shapes {
		t.Run(s.name, func(t *testing.T) {
			config := n.PodConfig("pod", s.option)
			stock, ours := factsOf(t, n, harness.StockHandler, config), factsOf(t, n, harness.PodfsmHandler, config)
			stock.take(confinement)
			differs := confined.diff(ours.take(confinement))
			maps.DeleteFunc(differs, func(field string, _ [2]string) bool { return ofShm.MatchString(field) })
			require.Empty(t, differs, "pause is confined alike in every pod")
			want := map[string][2]string{}
			for _, d := range deliberate {
				if d.when(config) {
					want[d.field] = [2]string{d.stock, d.ours}
				}
			}
			require.Equal(t, want, stock.diff(ours), "fields that differ, stock's first")
		})
	}
	n.RequireClean(t, before)
	removeDefaultCgroups(t)
}

// removeDefaultCgroups removes the cgroup in which containerd puts pods without a cgroup parent, if
// it is empty.
func removeDefaultCgroups(t *testing.T) {
	t.Helper()
	for _, pattern := range []string{"/sys/fs/cgroup/*/k8s.io", "/sys/fs/cgroup/k8s.io"} {
		dirs, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, dir := range dirs {
			_ = os.Remove(dir) // fails for the one of a containerd that is in use
		}
	}
}

// factsOf runs the pod for a moment and returns its properties.
func factsOf(t *testing.T, n *harness.Node, handler string, config *runtime.PodSandboxConfig) facts {
	t.Helper()
	pod, err := n.RunPod(t.Context(), handler, config)
	require.NoError(t, err)
	defer func() { require.NoError(t, pod.StopAndRemove(t.Context())) }()

	all := facts{}
	all.addRecords(t, n, pod)
	root := filepath.Join(n.Dir(), "root/io.containerd.grpc.v1.cri/sandboxes", pod.ID)
	all.addFiles(t, "root dir", root)
	state := filepath.Join(n.Dir(), "state/io.containerd.grpc.v1.cri/sandboxes", pod.ID)
	all.addFiles(t, "state dir", state)
	all.addMount(t, "shm", filepath.Join(state, "shm"))

	normal := facts{}
	normalise := strings.NewReplacer(pod.ID, "ID", n.Dir(), "NODE")
	for field, value := range all {
		normal[normalise.Replace(field)] = aTime.ReplaceAllString(stockNetNS.ReplaceAllString(normalise.Replace(value), "NETNS"), "TIME")
	}
	return normal
}

var (
	stockNetNS = regexp.MustCompile(`cni-[0-9a-f-]{36}`)
	aTime      = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$`)
)
