package plugin

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/lifecycle"
)

// A build that recorded no places made a cgroup with a relative path at the root of the hierarchies.
func TestEndCgroupWithoutPlan(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	top := fmt.Sprintf("podfsm-%d", os.Getpid())
	for _, parent := range []string{top, "/" + top, top + ".slice"} {
		r := &lifecycle.Run{Key: journal.Key{Namespace: "k8s.io", ID: top}, Spec: &Spec{Config: &runtime.PodSandboxConfig{
			Linux: &runtime.LinuxPodSandboxConfig{CgroupParent: parent},
		}}}
		made, err := host.PodCgroupOf("/"+cgroupPath(r), false, nil)
		require.NoError(t, err)
		above, err := host.PodCgroupOf("/"+top, false, nil)
		require.NoError(t, err)
		t.Cleanup(func() {
			for _, cgroup := range []*host.PodCgroup{made, above} {
				require.NoError(t, cgroup.End(context.Background()))
			}
		})
		require.NotEmpty(t, made.Dirs())
		for _, dir := range made.Dirs() {
			require.NoError(t, os.MkdirAll(dir, 0o755))
		}
		require.NoError(t, (&startPause{}).endCgroup(t.Context(), r))
		for _, dir := range made.Dirs() {
			require.NoDirExists(t, dir)
		}
	}
}
