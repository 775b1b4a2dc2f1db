package integration

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// Several handlers are podfsm's at once, each with runtime options, annotations and a network of its own, also after a restart.
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
		pods := map[string]*harness.Pod{}
		for _, handler := range append(handlers, harness.PodfsmHandler) {
			pods[handler] = startPod(t, n, handler, n.PodConfig("on-"+handler, func(c *runtime.PodSandboxConfig) {
				c.Annotations = map[string]string{"fast.example.com/a": "1", "slow.example.com/a": "2"}
			}))
			startContainer(t, pods[handler], "main")
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
						require.DirExists(t, filepath.Join(dir, handler, "k8s.io", pod.ID), "runc's record of pause")
					} else {
						require.NoDirExists(t, filepath.Join(dir, other, "k8s.io", pod.ID))
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
