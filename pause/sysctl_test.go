package pause

import (
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestSysctlFile(t *testing.T) {
	const all = unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
	const none, shared = "is not of a namespace that a pod may have for itself", "would change the node's"
	for _, tc := range []struct {
		name  string
		kinds int
		file  string
		text  string
	}{
		{name: "net.ipv4.ip_forward", kinds: all, file: "net/ipv4/ip_forward"},
		{name: "net/ipv4/ip_forward", kinds: all, file: "net/ipv4/ip_forward"},
		{name: "net.ipv4.conf.eth0/100.rp_filter", kinds: all, file: "net/ipv4/conf/eth0.100/rp_filter"},
		{name: "net/ipv4/conf/eth0.100/rp_filter", kinds: all, file: "net/ipv4/conf/eth0.100/rp_filter"},
		{name: "net.ipv4.ip_forward", kinds: unix.CLONE_NEWIPC | unix.CLONE_NEWUTS, text: shared},
		{name: "kernel.shm_rmid_forced", kinds: all, file: "kernel/shm_rmid_forced"},
		{name: "kernel.sem", kinds: unix.CLONE_NEWIPC, file: "kernel/sem"},
		{name: "kernel.sem", kinds: unix.CLONE_NEWNET | unix.CLONE_NEWUTS, text: shared},
		{name: "fs.mqueue.msg_max", kinds: unix.CLONE_NEWIPC, file: "fs/mqueue/msg_max"},
		{name: "fs.mqueue.msg_max", kinds: unix.CLONE_NEWNET, text: shared},
		{name: "kernel.domainname", kinds: unix.CLONE_NEWUTS, file: "kernel/domainname"},
		{name: "kernel.domainname", kinds: unix.CLONE_NEWNET | unix.CLONE_NEWIPC, text: shared},
		{name: "kernel.hostname", kinds: all, text: none},
		{name: "kernel.core_pattern", kinds: all, text: none},
		{name: "kernel/core_pattern", kinds: all, text: none},
		{name: "kernel.sem.x", kinds: all, text: none},
		{name: "vm.swappiness", kinds: all, text: none},
		{name: "fs.file-max", kinds: all, text: none},
		{name: "net", kinds: all, text: none},
		{name: "net.", kinds: all, text: none},
		{name: "net/", kinds: all, text: none},
		{name: "network.x", kinds: all, text: none},
		{name: "", kinds: all, text: none},
		{name: ".", kinds: all, text: none},
		{name: "/", kinds: all, text: none},
		{name: "/net/ipv4/ip_forward", kinds: all, text: none},
		{name: ".net.ipv4.ip_forward", kinds: all, text: none},
		{name: "net//ipv4", kinds: all, text: none},
		{name: "net/../kernel/core_pattern", kinds: all, text: none},
		{name: "net.//.kernel.core_pattern", kinds: all, text: none},
		{name: "net/ipv4/../../kernel/core_pattern", kinds: all, text: none},
		{name: "net/../../sysrq-trigger", kinds: all, text: none},
		{name: "net/ipv4/.", kinds: all, text: none},
		{name: "fs/mqueue/../file-max", kinds: all, text: none},
	} {
		file, _, err := sysctlFile(tc.name, tc.kinds)
		require.Equal(t, tc.file, file, tc.name)
		if tc.text == "" {
			require.NoError(t, err, tc.name)
			continue
		}
		require.Truef(t, errdefs.IsInvalidArgument(err), "%q: %v", tc.name, err)
		require.ErrorContains(t, err, tc.text)
	}
}

func TestSetSysctls(t *testing.T) {
	values := map[string]string{
		"net.ipv4.ip_unprivileged_port_start": "0",
		"net.ipv4.conf.lo.rp_filter":          "2",
		"net/ipv4/conf/default/rp_filter":     "2",
		"kernel.shm_rmid_forced":              "1",
		"kernel.msgmax":                       "4096",
		"kernel.domainname":                   "podfsm.test",
	}
	file := func(name string) string {
		file, _, err := sysctlFile(name, unix.CLONE_NEWNET|unix.CLONE_NEWIPC|unix.CLONE_NEWUTS)
		require.NoError(t, err)
		return "/proc/sys/" + file
	}
	for name, change := range map[string]func(Pod) Pod{"host's users": func(p Pod) Pod { return p }, "user namespace": inUserNS} {
		t.Run(name, func(t *testing.T) {
			b := newTestbed(t)
			host := map[string]string{}
			for name := range values {
				host[name] = read(t, file(name))
			}
			pod := change(testPod())
			pod.Config.Linux.Sysctls = values
			r, _ := b.start(t, pod)
			process, err := b.Process(r.Key)
			require.NoError(t, err)
			require.NoError(t, SetSysctls(process, r.Spec))
			for name, value := range values {
				require.Equal(t, value, strings.TrimSpace(readIn(t, process, ownNamespaces(r.Spec.Linux.Namespaces), file(name))), name)
			}
			for name, value := range host {
				require.Equal(t, value, read(t, file(name)), "the host's %s", name)
			}
		})
	}
}

// The kernel takes the groups of a sysctl as those of the user namespace of its writer, which is the host's.
func TestPingGroups(t *testing.T) {
	const file = "/proc/sys/net/ipv4/ping_group_range"
	for _, tc := range []struct {
		name, value string
		change      func(Pod) Pod
		host        string // what the host sees in the pod's network namespace
	}{
		{"host's users", "0 2147483647", func(p Pod) Pod { return p }, "0 2147483647"},
		{"all of a user namespace", fmt.Sprint("0 ", podGIDs[0].Size-1), inUserNS, fmt.Sprint(podGIDs[0].HostID, " ", podGIDs[0].HostID+podGIDs[0].Size-1)},
		{"one of a user namespace", "5\t5", inUserNS, fmt.Sprint(podGIDs[0].HostID+5, " ", podGIDs[0].HostID+5)},
		{"all, and more, of a user namespace", "0 2147483647", inUserNS, fmt.Sprint(podGIDs[0].HostID, " ", podGIDs[0].HostID+podGIDs[0].Size-1)},
		{"nobody of a user namespace", "1 0", inUserNS, "1 0"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newTestbed(t)
			before := read(t, file)
			pod := tc.change(testPod())
			pod.Config.Linux.Sysctls = map[string]string{"net.ipv4.ping_group_range": tc.value}
			r, _ := b.start(t, pod)
			process, err := b.Process(r.Key)
			require.NoError(t, err)
			require.NoError(t, SetSysctls(process, r.Spec))
			require.Equal(t, tc.host, strings.Join(strings.Fields(readIn(t, process, unix.CLONE_NEWNET, file)), " "))
			require.Equal(t, before, read(t, file), "the host's own")
		})
	}
}

// Of what isn't two groups the kernel takes the beginning, whose groups would be the node's.
func TestNoPingGroups(t *testing.T) {
	b := newTestbed(t)
	r, _ := b.start(t, inUserNS(testPod()))
	process, err := b.Process(r.Key)
	require.NoError(t, err)
	groups := func() string { return readIn(t, process, unix.CLONE_NEWNET, "/proc/sys/net/ipv4/ping_group_range") }
	before := groups()
	for _, value := range []string{"0 5 x", "0", "", "x", "0 x", "-1 5", "0 2147483648", fmt.Sprint(podGIDs[0].Size, " 2147483647")} {
		r.Spec.Linux.Sysctl = map[string]string{"net.ipv4.ping_group_range": value}
		err := SetSysctls(process, r.Spec)
		require.Truef(t, errdefs.IsInvalidArgument(err), "%q: %v", value, err)
		require.ErrorContains(t, err, "failed to set the sysctl net.ipv4.ping_group_range = ")
		require.Equal(t, before, groups(), value)
	}
}

func TestSetSysctlsFails(t *testing.T) {
	b := newTestbed(t)
	r, _ := b.start(t, testPod())
	onNode := with(func(o *runtime.NamespaceOption) {
		o.Network, o.Ipc = runtime.NamespaceMode_NODE, runtime.NamespaceMode_NODE
	})
	onNode.ID = "node"
	node, _ := b.start(t, onNode)
	for _, tc := range []struct {
		name   string
		r      StartRequest
		values map[string]string
		text   string
	}{
		{"unknown", r, map[string]string{"net.ipv4.absent": "1"}, `failed to set the sysctl net.ipv4.absent = "1"`},
		{"unknown interface", r, map[string]string{"net.ipv4.conf.eth9.rp_filter": "1"}, "eth9"},
		{"invalid value", r, map[string]string{"net.ipv4.ip_forward": "x"}, `failed to set the sysctl net.ipv4.ip_forward = "x"`},
		{"value out of range", r, map[string]string{"net.ipv4.ip_default_ttl": "256"}, `"256"`},
		{"not a pod's", r, map[string]string{"kernel.core_pattern": "|/x"}, "is not of a namespace"},
		{"a directory", r, map[string]string{"net.ipv4": "1"}, ""},
		{"below a file", r, map[string]string{"net.ipv4.ip_forward.x": "1"}, ""},
		{"NUL", r, map[string]string{"net.ipv4.\x00": "1"}, ""},
		{"the node's in any namespace", r, map[string]string{"net.ipv4.tcp_mem": "1 2 3"}, ""},
		{"node's network", node, map[string]string{"net.ipv4.ip_forward": "1"}, "would change the node's"},
		{"node's ipc", node, map[string]string{"kernel.sem": "1"}, "would change the node's"},
		{"node's name", node, map[string]string{"kernel.domainname": "x"}, "would change the node's"},
	} {
		process, err := b.Process(tc.r.Key)
		require.NoError(t, err)
		tc.r.Spec.Linux.Sysctl = tc.values
		err = SetSysctls(process, tc.r.Spec)
		require.ErrorContains(t, err, tc.text, tc.name)
		require.Truef(t, errdefs.IsInvalidArgument(err), "%s: %v", tc.name, err)
	}

	// In the order of their names, and none when one is refused beforehand.
	process, err := b.Process(r.Key)
	require.NoError(t, err)
	set := func(values map[string]string) (ttl string) {
		r.Spec.Linux.Sysctl = values
		require.Error(t, SetSysctls(process, r.Spec))
		return strings.TrimSpace(readIn(t, process, unix.CLONE_NEWNET, "/proc/sys/net/ipv4/ip_default_ttl"))
	}
	require.Equal(t, "64", set(map[string]string{"net.ipv4.ip_default_ttl": "7", "vm.swappiness": "1"}))
	require.Equal(t, "64", set(map[string]string{"net.ipv4.ip_default_ttl": "7", "net.ipv4.absent": "1"}))
	require.Equal(t, "7", set(map[string]string{"net.ipv4.ip_default_ttl": "7", "net.ipv4.zzz": "1"}))

	_, err = b.End(t.Context(), r.Key)
	require.NoError(t, err)
	require.ErrorIs(t, SetSysctls(process, r.Spec), unix.ESRCH)
	require.NoError(t, SetSysctls(process, &specs.Spec{Linux: &specs.Linux{}}), "there is nothing to set")
}
