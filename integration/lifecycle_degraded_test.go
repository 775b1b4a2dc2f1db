package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// mistake is a change of containerd's configuration that degrades podfsm.
type mistake struct {
	name     string
	old, new string // in config.toml; "" is its end
	reason   string
}

var mistakes = []mistake{
	{"an unknown option", "cni_gc = 'off'", "cni_add_timout = '3m'", "unknown option cni_add_timout"},
	{"a value of another type", "cni_gc = 'off'", "cni_gc = false", "option cni_gc has a value of the wrong type"},
	{"an unusable value", "cni_gc = 'off'", "runtime_timeout = 'soon'", `runtime_timeout = "soon" is not a positive duration`},
	{"a pool with ids of the system", fmt.Sprint("host_id = ", poolStart), "host_id = 1", "userns_pool: "},
	{"an option of the snapshotter", "strategy = 'chown'", "strategy = 1", "option strategy has a value of the wrong type"},
	{"a runtime with a sandbox of its own", "", kataTable, "(Kata Containers) makes a sandbox of its own"},
	{"no podfsm-init", "cni_gc = 'off'", "init_path = '/nowhere/podfsm-init'", `failed to load "/nowhere/podfsm-init"`},
}

// in returns the configuration with the mistake.
func (m mistake) in(t *testing.T, config string) string {
	t.Helper()
	if m.old == "" {
		return config + m.new
	}
	require.Contains(t, config, m.old)
	return strings.ReplaceAll(config, m.old, m.new)
}

// podsOfHandlers are running pods, each with a container.
type podsOfHandlers struct {
	*harness.Node
	pods       []*harness.Pod
	containers []*harness.Container
	config     string // the file
	correct    string // its content without mistakes
	seen       string // what the CRI shows of the pods
}

// startPods runs a pod per way to get a user namespace, one on podfsm's snapshotter, and a stock
// pod.
func startPods(t *testing.T, n *harness.Node) *podsOfHandlers {
	t.Helper()
	p := &podsOfHandlers{Node: n, config: filepath.Join(n.Dir(), "config.toml")}
	text, err := os.ReadFile(p.config)
	require.NoError(t, err)
	p.correct = string(text)
	for _, handler := range []string{harness.PodfsmHandler, autoHandler, remapped, harness.StockHandler} {
		var options []harness.PodOption
		if handler == autoHandler {
			options = append(options, harness.HostUsers())
		}
		pod := startPod(t, n, handler, n.PodConfig("runs-"+handler, options...))
		p.pods = append(p.pods, pod)
		p.containers = append(p.containers, startContainer(t, pod, "main"))
	}
	p.seen = sight(t, n, p.pods...)
	return p
}

// restartWith restarts containerd with another configuration.
func (p *podsOfHandlers) restartWith(t *testing.T, config string) {
	t.Helper()
	require.NoError(t, os.WriteFile(p.config, []byte(config), 0o644))
	require.NoError(t, p.Restart(t.Context()))
}

// requireUnaffected requires that the CRI shows the same of the pods as at their start, and that
// their containers run.
func (p *podsOfHandlers) requireUnaffected(t *testing.T) {
	t.Helper()
	requireSame(t, p.seen, sight(t, p.Node, p.pods...))
	for _, c := range p.containers {
		require.Equal(t, "ok\n", exec(t, c, "echo", "ok"))
	}
}

// A mistake in podfsm's configuration refuses new pods, and the error names it. Running pods stay
// ready, get new containers, and can be stopped and removed.
func TestBadConfiguration(t *testing.T) {
	n, before := startNodeOfHandlers(t)
	t.Run("pods", func(t *testing.T) {
		p := startPods(t, n)
		ending := make([]*harness.Pod, len(mistakes)) // one pod per mistake ends while podfsm is degraded
		for i := range mistakes {
			ending[i] = runPod(t, n, n.PodConfig(fmt.Sprint("ends-", i)))
		}
		for i, m := range mistakes {
			t.Run(m.name, func(t *testing.T) {
				p.restartWith(t, m.in(t, p.correct))
				p.requireUnaffected(t)
				requireRefused(t, n, n.PodConfig("refused"), codes.Unavailable, m.reason)
				require.Contains(t, n.Log(), strings.ReplaceAll(m.reason, `"`, `\"`))
				startPod(t, n, harness.StockHandler, n.PodConfig("stock"))
				late := startContainer(t, p.pods[i%len(p.pods)], fmt.Sprint("late-", i))
				require.Equal(t, "ok\n", exec(t, late, "echo", "ok"))
				require.NoError(t, ending[i].StopAndRemove(t.Context()))
			})
		}
		p.restartWith(t, p.correct)
		p.requireUnaffected(t)
		runOnce(t, n, n.PodConfig("afterwards"))
	})
	n.RequireClean(t, before)
}

// Without its ledger, podfsm knows no sandbox. The CRI answers with an error, not that a pod is gone.
// Containers run on, no sandbox is stopped or removed, and the next start adopts the pods.
func TestLedgerCannotBeOpened(t *testing.T) {
	n, before := warmNode(t)
	t.Run("pods", func(t *testing.T) {
		pod := startPod(t, n, harness.PodfsmHandler, n.PodConfig("runs"))
		container := startContainer(t, pod, "main")
		seen := sight(t, n, pod)
		require.NoError(t, n.Stop(t.Context()))
		giveBack := replaced("root/"+pluginDir, "not a directory", 0o600)(t, n)
		require.NoError(t, n.Start(t.Context()))

		requireRefused(t, n, n.PodConfig("refused"), codes.Unavailable, "failed to open the ledger")
		_, err := pod.Status(t.Context())
		requireUnavailable(t, err)
		_, err = pod.StartContainer(t.Context(), "late")
		requireUnavailable(t, err)
		now, err := container.Status(t.Context())
		require.NoError(t, err)
		require.Equal(t, runtime.ContainerState_CONTAINER_RUNNING, now.GetState())
		require.Equal(t, "ok\n", exec(t, container, "echo", "ok"))
		requireUnavailable(t, pod.Stop(t.Context())) // after its containers
		requireUnavailable(t, pod.Remove(t.Context()))

		require.NoError(t, n.Stop(t.Context()))
		giveBack()
		require.NoError(t, n.Start(t.Context()))
		requireSame(t, seen, sight(t, n, pod))
		works(t, pod, "afterwards")
	})
	n.RequireClean(t, before)
}

func requireUnavailable(t *testing.T, err error) {
	t.Helper()
	require.Equal(t, codes.Unavailable, status.Code(err), "%v", err)
	require.ErrorContains(t, err, "podfsm is degraded")
}

// startNodeOfHandlers returns a node with the handlers of startPods, and its census after the
// images of the tests were unpacked.
func startNodeOfHandlers(t *testing.T) (*harness.Node, harness.Census) {
	t.Helper()
	root, err := os.MkdirTemp("", "podfsm-snapshots-") // not t.TempDir, which pods' users can't traverse
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(root)) })
	require.NoError(t, os.Chmod(root, 0o711))
	n, _ := startNodeWithPool(t, harness.Config{Handlers: []string{autoHandler, remapped}, TOML: fmt.Sprintf(`
		[plugins.'io.containerd.podsandbox.controller.v1.podfsm']
			cni_gc = "off"
		[plugins.'io.containerd.snapshotter.v1.podfsm']
			root_path = %q
			strategy = "chown"
		[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.remapped]
			snapshotter = "podfsm"
	`, root)})
	pod, err := n.RunPod(t.Context(), remapped, n.PodConfig("unpack"))
	require.NoError(t, err)
	startContainer(t, pod, "main")
	require.NoError(t, pod.StopAndRemove(t.Context()))
	before, err := n.Settle(t.Context())
	require.NoError(t, err)
	return n, before
}
