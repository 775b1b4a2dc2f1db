package plugin

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/ledger"
)

func TestUnshared(t *testing.T) {
	known := map[string]bool{"ours": true, "stock": true}
	require.NoError(t, unshared(nil, known))
	require.NoError(t, unshared([]cni.Attached{{ContainerID: "stock", IfName: "eth0"}}, known))
	err := unshared([]cni.Attached{{ContainerID: "stock", IfName: "eth0"}, {ContainerID: "stranger", IfName: "eth0"}}, known)
	require.True(t, errdefs.IsFailedPrecondition(err))
	require.ErrorContains(t, err, `"stranger"`)
}

func TestValid(t *testing.T) {
	got := valid(map[string]bool{"ours": true, "stock": true}, []cni.Attached{{ContainerID: "stock", IfName: "net1"}}, "eth9")
	for _, want := range []cni.Attached{
		{ContainerID: "ours", IfName: "eth0"}, {ContainerID: "ours", IfName: "eth7"}, {ContainerID: "ours", IfName: "eth9"},
		{ContainerID: "stock", IfName: "eth0"}, {ContainerID: "stock", IfName: "net1"},
	} {
		require.Contains(t, got, want)
	}
	require.False(t, slices.ContainsFunc(got, func(a cni.Attached) bool { return a.ContainerID != "ours" && a.ContainerID != "stock" }))
}

func TestKnownIDs(t *testing.T) {
	key := func(id string) ledger.Key { return ledger.Key{Namespace: cri.Namespace, ID: id} }
	client := newStores(t)
	_, err := client.ContainerService().Create(inCRI(t), containers.Container{
		ID: "c1", Runtime: containers.RuntimeInfo{Name: "io.containerd.runc.v2"}, Spec: &anypb.Any{},
	})
	require.NoError(t, err)
	sandboxes := sandboxIDs([]ledger.Sandbox{{Key: key("pending")}}, map[ledger.Key]sandbox.Sandbox{key("ours"): {}}, map[ledger.Key]sandbox.Sandbox{key("stock"): {}})
	require.Equal(t, map[string]bool{"pending": true, "ours": true, "stock": true}, sandboxes)
	known, err := leaks.Containers(t.Context(), client)
	require.NoError(t, err)
	require.Equal(t, map[string]bool{"c1": true, "k8s.io-c1": true}, known)
}

// Only networks of podfsm's handlers that know a GC are collected, wherever they are configured, and each once.
func TestCollectedNetworks(t *testing.T) {
	write := func(dir, file, text string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600))
	}
	general, own, stocks := t.TempDir(), t.TempDir(), t.TempDir()
	write(general, "1.conflist", `{"name":"a","cniVersion":"1.1.0","plugins":[{"type":"x"}]}`)
	write(general, "2.conflist", `{"name":"old","cniVersion":"1.0.0","plugins":[{"type":"x"}]}`)
	write(general, "3.conflist", `{"name":"off","cniVersion":"1.1.0","disableGC":true,"plugins":[{"type":"x"}]}`)
	write(own, "1.conflist", `{"name":"b","cniVersion":"1.1.0","plugins":[{"type":"x"}]}`)
	write(own, "2.conflist", `{"name":"a","cniVersion":"1.1.0","plugins":[{"type":"x"}]}`)
	write(stocks, "1.conflist", `{"name":"c","cniVersion":"1.1.0","plugins":[{"type":"x"}]}`)
	c := &Controller{stock: stockWith(func(stock *stockConfig) {
		stock.CNI.ConfDir = general
		stock.Containerd.Runtimes["own"] = handler{Sandboxer: Name, ConfDir: own}
		stock.Containerd.Runtimes["broken"] = handler{Sandboxer: Name, ConfDir: t.TempDir()}
		stock.Containerd.Runtimes["stocks"] = handler{Sandboxer: "podsandbox", ConfDir: stocks}
	})}
	var names []string
	for _, n := range c.networks(t.Context()) {
		names = append(names, n.Name)
	}
	require.ElementsMatch(t, []string{"a", "b"}, names)
}
