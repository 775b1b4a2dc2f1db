package integration

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// failingHandler is a handler of podfsm with the shim of containerd's own tests, which injects the
// faults of the annotations of a pod.
const failingHandler = "podfsm-fp"

// A single wrong answer of a shim fails no stop. The faults are those of containerd's own tests.
func TestShimFailsOnce(t *testing.T) {
	t.Parallel()
	const annotation = "io.containerd.runtime.v2.shim.failpoint."
	n := harness.StartNode(t, harness.Config{TOML: fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.%s]
  runtime_type = "io.containerd.runc-fp.v1"
  sandboxer = "podfsm"
  pod_annotations = [%q]
`, failingHandler, annotation+"*")})
	before, err := n.WarmUp(t.Context(), failingHandler)
	require.NoError(t, err)
	for _, method := range []string{"Kill", "Delete", "Shutdown"} {
		t.Run(method, func(t *testing.T) {
			pod, err := n.RunPod(t.Context(), failingHandler, n.PodConfig("pod", func(c *runtime.PodSandboxConfig) {
				c.Annotations[annotation+method] = fmt.Sprintf("1*error(no %s yet)", method)
			}))
			require.NoError(t, err)
			startContainer(t, pod, "main")
			require.NoError(t, pod.StopAndRemove(t.Context()))
			require.Regexp(t, `[^(]no `+method+` yet`, n.Log(), "the fault was met, which is in brackets in an annotation")
			n.RequireClean(t, before)
		})
	}
}
