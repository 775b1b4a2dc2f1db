package plugin

import (
	"encoding/json"
	"testing"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/userns"
)

// containerWith is a container whose spec maps the 64Ki ids from one up; 0 for the node's users.
func containerWith(t *testing.T, id string, first uint32) containers.Container {
	t.Helper()
	spec := specs.Spec{Linux: &specs.Linux{}}
	if first > 0 {
		spec.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: first, Size: 65536}}
		spec.Linux.GIDMappings = spec.Linux.UIDMappings
	}
	text, err := json.Marshal(spec)
	require.NoError(t, err)
	labels := map[string]string{"io.kubernetes.pod.namespace": "default", "io.kubernetes.pod.name": "web"}
	return containers.Container{ID: id, Labels: labels, Spec: &anypb.Any{Value: text}}
}

func TestUseOfProcess(t *testing.T) {
	t.Parallel()
	known := map[string][]containers.Container{}
	for id, first := range map[string]uint32{"0a0b": 131072, "0c0d": 0, "my-pod": 0} {
		known[id] = append(known[id], containerWith(t, id, first))
	}
	known["broken"] = []containers.Container{{ID: "broken", Spec: &anypb.Any{Value: []byte("{")}}}
	// It has mapped the ranges of many pods, and runs as a user of another.
	everything := []userns.Mapping{{HostID: 65536, Length: 1 << 20}, {HostID: 1 << 30, Length: 1}}
	given := []userns.Mapping{{HostID: 131072, Length: 65536}}
	for _, tc := range []struct {
		cgroup string
		want   []userns.Mapping
		by     string
	}{
		{"0::/system.slice/sshd.service\n", everything, "process 7 (sh)"},
		{"", everything, "process 7 (sh)"},
		{"1:cpu:/kubepods/pod1/0a0b\n0::/\n", given, "process 7 (sh) of pod default/web"},
		{"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-0a0b.scope\n", given, "process 7 (sh) of pod default/web"},
		{"0::/kubepods/pod1/0c0d\n", nil, ""},
		{"0::/kubepods.slice/cri-containerd-0c0d.scope/deeper\n", nil, ""},
		{"0::/x/my-pod\n", nil, ""},
		{"0::/system.slice/kubepods-pod1.slice:cri-containerd:0a0b\n", given, "process 7 (sh) of pod default/web"},
		{"0::/kubepods-pod1.slice:cri-containerd:my-pod\n", nil, ""},
		{"0::/kubepods/pod1/0c0d/0a0b\n", nil, ""}, // it has made a cgroup with another's name
		{"0::/kubepods/pod1/0a0b/0c0d\n", given, "process 7 (sh) of pod default/web"},
		{"9:pids:/kubepods/pod1/0c0d\n8:cpu:/kubepods/pod1/0a0b\n0::/\n", given, "process 7 (sh) of pod default/web"}, // root has moved it
		{"0::/kubepods/pod1/x-0c0d\n", everything, "process 7 (sh)"},                                                  // only scopes have prefixes
		{"0::/a:b:0c0d\n", everything, "process 7 (sh)"},                                                              // only slices have
		{"0::/system.slice/cri-containerd-my-pod.scope\n", nil, ""},
		{"0::/kubepods/pod1/unknown\n", everything, "process 7 (sh)"}, // a pod whose records are lost
		{"0::/kubepods/pod1/broken\n", everything, "process 7 (sh)"},
	} {
		p := userns.Process{Pid: 7, Use: userns.Use{UIDs: everything, GIDs: everything, By: "process 7 (sh)"}}
		use := useOf(p, containersOf(host.ParseCgroups([]byte(tc.cgroup)), known))
		require.Equal(t, tc.want, use.UIDs, tc.cgroup)
		require.Equal(t, tc.want, use.GIDs, tc.cgroup)
		if tc.want != nil {
			require.Equal(t, tc.by, use.By, tc.cgroup)
		}
	}
}
