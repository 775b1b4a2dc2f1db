package cri

import (
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// The texts are those of real failures.
func TestConstant(t *testing.T) {
	const id = "8551561589d60202d32be90e7ee8764b0fa777603d5d2cb68b2020aeece47027"
	for text, want := range map[string]string{
		"": "",
		"no IP addresses available in range set: 10.89.0.2-10.89.0.2":                                                                                                        "no IP addresses available in range set: 10.89.0.2-10.89.0.2",
		`failed to create the pause task of sandbox "` + id + `": remount-propagation dst=/run/containerd/k8s.io/` + id + `/rootfs: permission denied`:                       `failed to create the pause task of sandbox "ID": remount-propagation dst=/run/containerd/k8s.io/ID/rootfs: permission denied`,
		`running [/usr/sbin/iptables -t nat -A CNI-600b53b233d215064c22ea2d -d 10.88.0.10/16 -j ACCEPT -m comment --comment id: "` + id + `" --wait]: exit status 4: broken`: `running [/usr/sbin/iptables -t nat -A CNI-CHAIN -d IP/16 -j ACCEPT -m comment --comment id: "ID" --wait]: exit status 4: broken`,
		"running [/usr/sbin/ip6tables -t nat -A CNI-DN-28fc2db5877ab44538c84 --to-destination [fd00:10::1:7]:80]: exit status 4: ":                                           "running [/usr/sbin/ip6tables -t nat -A CNI-CHAIN --to-destination [IP]:80]: exit status 4: ",
		"failed to make veth pair: veth1a2b3c4d exists":                                                                                                                      "failed to make veth pair: VETH exists",
		"link bwp0123456789ab":                                           "link IFB",
		"process 4711 has ended":                                         "process PID has ended",
		"network namespace 4026532411 is pinned":                         "network namespace INODE is pinned",
		"open /proc/4711/ns/net":                                         "open /proc/PID/ns/net",
		"upperdir=/var/lib/containerd/snapshots/57/fs":                   "upperdir=/var/lib/containerd/snapshots/N/fs",
		"/tmp/containerd-mount1234567: busy":                             "/tmp/containerd-mount: busy",
		"image sha256:" + strings.Repeat("ab", 32) + " at 10.0.0.1:5000": "image sha256:" + strings.Repeat("ab", 32) + " at 10.0.0.1:5000",
	} {
		err := constant(fmt.Errorf("%s: %w", text, errdefs.ErrUnavailable), id)
		require.EqualError(t, err, want+": unavailable")
		require.True(t, errdefs.IsUnavailable(err))
	}
	require.NoError(t, constant(nil, id))
}
