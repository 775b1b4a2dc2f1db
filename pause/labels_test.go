package pause

import (
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/require"
)

func TestLabels(t *testing.T) {
	pod := map[string]string{
		"app":                          "web",
		"both":                         "pod",
		"containerd.io/restart.status": "running",
		"io.cri-containerd.kind":       "container",
	}
	image := map[string]string{
		"maintainer":                   "someone",
		"both":                         "image",
		"containerd.io/restart.loguri": "binary:///bin/sh",
		"io.cri-containerd.image":      "managed",
		"long":                         strings.Repeat("x", 5000),
	}
	require.Equal(t, map[string]string{
		"app":                    "web",
		"both":                   "pod",
		"maintainer":             "someone",
		"io.cri-containerd.kind": "sandbox",
	}, Labels(pod, image))
	require.Len(t, pod, 4, "the pod's labels are only read")
	require.Len(t, image, 5)
	require.Equal(t, map[string]string{"io.cri-containerd.kind": "sandbox"}, Labels(nil, nil))
}

func TestInstanceLabels(t *testing.T) {
	container := map[string]string{"app": "web", "selinux_label": "of the pod's choice", "oci_runtime_type": "too"}
	require.Equal(t, map[string]string{
		"app":              "web",
		"oci_runtime_type": "io.containerd.runc.v2",
		"selinux_label":    "system_u:system_r:container_t:s0:c1,c2",
	}, InstanceLabels(container, "io.containerd.runc.v2", "system_u:system_r:container_t:s0:c1,c2"))
	require.Equal(t, "too", container["oci_runtime_type"], "the container's labels are only read")
	require.Equal(t, map[string]string{"oci_runtime_type": "r", "selinux_label": ""}, InstanceLabels(nil, "r", ""))
}

func TestIsPause(t *testing.T) {
	ours := containers.Container{Labels: Labels(nil, nil)}
	stock := containers.Container{Labels: ours.Labels, Extensions: map[string]typeurl.Any{"io.cri-containerd.sandbox.metadata": nil}}
	app := containers.Container{Labels: map[string]string{"io.cri-containerd.kind": "container"}}
	require.True(t, IsPause(ours))
	require.False(t, IsPause(stock))
	require.False(t, IsPause(app))
	require.False(t, IsPause(containers.Container{}))
}
