package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	runtimespec "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// Several handlers of podfsm at a time, each with its own runtime options, annotations and network,
// also after a restart.
func TestHandlersAtOnce(t *testing.T) {
	dir := t.TempDir()
	var toml string
	handlers := []string{"fast", "slow"}
	for _, handler := range handlers {
		toml += fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.%s]
  runtime_type = "io.containerd.runc.v2"
  sandboxer = "podfsm"
  pod_annotations = ["%s.example.com/*"]
  options = {Root = %q}
`, handler, handler, filepath.Join(dir, handler))
	}
	n := harness.StartNode(t, harness.Config{TOML: toml})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	t.Run("pods", func(t *testing.T) {
		pods, mains := map[string]*harness.Pod{}, map[string]string{}
		for _, handler := range append(handlers, harness.PodfsmHandler) {
			pods[handler] = startPod(t, n, handler, n.PodConfig("on-"+handler, func(c *runtime.PodSandboxConfig) {
				c.Annotations = map[string]string{"fast.example.com/a": "1", "slow.example.com/a": "2"}
			}))
			mains[handler] = startContainer(t, pods[handler], "main").ID
		}
		check := func() {
			t.Helper()
			for handler, pod := range pods {
				status, err := pod.Status(t.Context())
				require.NoError(t, err)
				require.Equal(t, runtime.PodSandboxState_SANDBOX_READY, status.GetState())
				require.Equal(t, handler, status.GetRuntimeHandler())
				info, err := pod.Info(t.Context())
				require.NoError(t, err)
				var verbose struct {
					RuntimeOptions struct {
						Root string `json:"root"`
					}
					RuntimeSpec struct{ Annotations map[string]string }
				}
				require.NoError(t, json.Unmarshal([]byte(info["info"]), &verbose))
				for _, other := range handlers {
					passed := verbose.RuntimeSpec.Annotations[other+".example.com/a"]
					require.Equal(t, other == handler, passed != "", "%s has %s's annotation: %q", handler, other, passed)
					if other == handler {
						require.Equal(t, filepath.Join(dir, handler), verbose.RuntimeOptions.Root)
						require.DirExists(t, filepath.Join(dir, handler, "k8s.io", mains[handler]), "runc's record of the container")
					} else {
						require.NoDirExists(t, filepath.Join(dir, other, "k8s.io", mains[handler]))
					}
				}
			}
		}
		check()
		require.NoError(t, n.Stop(t.Context()))
		require.NoError(t, n.Start(t.Context()))
		check()
		for _, pod := range pods {
			startContainer(t, pod, "later")
		}
	})
	n.RequireClean(t, before)
	for _, handler := range handlers {
		left, err := filepath.Glob(filepath.Join(dir, handler, "k8s.io", "*"))
		require.NoError(t, err)
		require.Empty(t, left)
	}
}

// containerd uses a handler's base_runtime_spec for the containers of a pod, never for its sandbox:
// its hooks run with any handler.
func TestBaseRuntimeSpec(t *testing.T) {
	dir := t.TempDir()
	hooked, base := filepath.Join(dir, "hooked"), filepath.Join(dir, "base.json")
	spec, err := oci.GenerateSpec(namespaces.WithNamespace(t.Context(), "k8s.io"), nil, &containers.Container{ID: "base"})
	require.NoError(t, err)
	spec.Hooks = &runtimespec.Hooks{CreateRuntime: []runtimespec.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "echo x >> " + hooked}}}}
	text, err := json.Marshal(spec)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(base, text, 0o644))
	n := harness.StartNode(t, harness.Config{TOML: fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.hooks]
  runtime_type = "io.containerd.runc.v2"
  sandboxer = "podfsm"
  base_runtime_spec = %q
  options = {Root = %q}
`, base, filepath.Join(dir, "runc"))})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	pod := startPod(t, n, "hooks", n.PodConfig("pod"))
	require.NoFileExists(t, hooked)
	startContainer(t, pod, "main")
	require.FileExists(t, hooked)
	require.NoError(t, pod.StopAndRemove(t.Context()))
	n.RequireClean(t, before)
}

// podfsm does not support runtimes with their own sandboxes: such pods are refused with the reason,
// and those of stock handlers run.
func TestRuntimeWithItsOwnSandbox(t *testing.T) {
	n := harness.StartNode(t, harness.Config{TOML: `
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]
  runtime_type = "io.containerd.kata.v2"
  sandboxer = "podfsm"
`})
	for _, handler := range []string{"kata", harness.PodfsmHandler} {
		err := failRun(t, n, handler, n.PodConfig("pod"))
		require.Equal(t, codes.Unavailable, status.Code(err), "%v", err)
		require.ErrorContains(t, err, `runtime handler "kata" has sandboxer = "podfsm", but its runtime "io.containerd.kata.v2" (Kata Containers) makes a sandbox of its own`)
	}
	pod, err := n.RunPod(t.Context(), harness.StockHandler, n.PodConfig("stock"))
	require.NoError(t, err)
	require.NoError(t, pod.StopAndRemove(t.Context()))
}
