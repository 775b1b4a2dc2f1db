package plugin

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/pause"
	"github.com/podfsm/podfsm/snapshot"
)

// idOf is a sandbox id that starts with two digits.
func idOf(digits string) string { return strings.Repeat(digits, 32) }

// storesWorld is a world with containerd's real stores, and directories of its own.
type storesWorld struct {
	*world
	ctx    context.Context
	client *containerd.Client
	netns  string
}

func newStoresWorld(t *testing.T) *storesWorld {
	w := newWorld(t)
	dir := t.TempDir()
	bdb, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, bdb.Close()) })
	db := metadata.NewDB(bdb, nil, nil)
	ctx := namespaces.WithNamespace(t.Context(), cri.Namespace)
	require.NoError(t, db.Init(ctx))
	require.NoError(t, bdb.Update(func(tx *bolt.Tx) error {
		return metadata.NewNamespaceStore(tx).Create(ctx, cri.Namespace, nil)
	}))
	client, err := containerd.New("", containerd.WithServices(
		containerd.WithContainerStore(metadata.NewContainerStore(db)),
		containerd.WithLeasesService(metadata.NewLeaseManager(db)),
		containerd.WithSandboxStore(metadata.NewSandboxStore(db)),
		containerd.WithNamespaceService(namespaceList{}),
		containerd.WithSnapshotters(map[string]snapshots.Snapshotter{}),
	))
	require.NoError(t, err)
	w.stock.NetNSMountsUnderStateDir, w.stock.StateDir, w.stock.RootDir = true, filepath.Join(dir, "state"), filepath.Join(dir, "root")
	w.node.client, w.node.shimDirs.State, w.node.snapshots = client, filepath.Join(dir, "bundles"), snapshot.NewPreparer(client)
	w.node.settings.Files = pause.Files{RootDir: w.stock.RootDir, StateDir: w.stock.StateDir}
	w.node.containers = pause.NewContainers(client)
	return &storesWorld{world: w, ctx: ctx, client: client, netns: w.stock.netNSDir()}
}

// namespaceList has the CRI's containerd namespace alone.
type namespaceList struct{ namespaces.Store }

func (namespaceList) List(context.Context) ([]string, error) { return []string{cri.Namespace}, nil }

// files makes all that there can be of a sandbox without a process.
func (w *storesWorld) files(t *testing.T, id string) {
	t.Helper()
	require.NoError(t, os.MkdirAll(w.netns, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(w.netns, leaks.Pins(id)[0]), nil, 0o444))
	require.NoError(t, os.MkdirAll(filepath.Join(w.stock.RootDir, "sandboxes", id), 0o755))
	require.NoError(t, os.MkdirAll(filepath.Join(w.node.shimDirs.State, cri.Namespace, id), 0o755))
}

func (w *storesWorld) container(t *testing.T, c containers.Container) {
	t.Helper()
	c.Runtime.Name = "io.containerd.runc.v2"
	c.Spec = &ledger.Data{TypeURL: "spec"}
	_, err := w.client.ContainerService().Create(w.ctx, c)
	require.NoError(t, err)
}

func (w *storesWorld) record(t *testing.T, id, sandboxer string) {
	t.Helper()
	_, err := w.client.SandboxStore().Create(w.ctx, sandbox.Sandbox{ID: id, Sandboxer: sandboxer, Runtime: sandbox.RuntimeOpts{Name: "x"}})
	require.NoError(t, err)
}

func (w *storesWorld) found(t *testing.T) []leaks.Thing {
	t.Helper()
	found, err := w.lookForLeaks(t.Context())
	require.NoError(t, err)
	return found
}

func TestOnlyWhatNobodyAnswersForHasLeaked(t *testing.T) {
	w := newStoresWorld(t)
	require.Empty(t, w.found(t))
	kindSandbox := pause.Labels(nil, nil)

	known := idOf("01")
	require.NoError(t, w.create(t, known))
	w.container(t, containers.Container{ID: known, Labels: kindSandbox})
	ended := idOf("02") // a moment ago
	require.NoError(t, w.create(t, ended, named("ended")))
	require.NoError(t, w.Shutdown(inCRI(t), ended))
	stock := idOf("03") // made by containerd 1.7: it has no record
	metadata := map[string]typeurl.Any{"io.cri-containerd.sandbox.metadata": &ledger.Data{TypeURL: "metadata"}}
	w.container(t, containers.Container{ID: stock, Labels: kindSandbox, Extensions: metadata})
	stockInFlight := idOf("04")
	w.record(t, stockInFlight, "podsandbox")
	oursInFlight := idOf("05") // the controller hasn't heard of it yet
	w.record(t, oursInFlight, Name)
	_, err := w.client.LeasesService().Create(w.ctx, leases.WithID(idOf("06")))
	require.NoError(t, err, "likewise, before its record")
	app := idOf("07")
	w.container(t, containers.Container{ID: app, SandboxID: known, Labels: map[string]string{"io.cri-containerd.kind": "container"}})
	for _, id := range []string{known, ended, stock, stockInFlight, oursInFlight, app, "by-hand", "ABCDEF"} {
		w.files(t, id)
	}
	require.Empty(t, w.found(t))

	lost := idOf("aa")
	w.files(t, lost)
	w.container(t, containers.Container{ID: lost, Labels: kindSandbox})
	require.Equal(t, []leaks.Thing{
		{Kind: leaks.Container, ID: lost, Name: lost},
		{Kind: leaks.Bundle, ID: lost, Name: filepath.Join(w.node.shimDirs.State, cri.Namespace, lost)},
		{Kind: leaks.Files, ID: lost, Name: lost},
		{Kind: leaks.NetNS, ID: lost, Name: filepath.Join(w.netns, "podfsm-"+lost)},
	}, w.found(t))
}

// A creation that begins or ends beside the look is no leak.
func TestLeaksLooksTwice(t *testing.T) {
	w := newStoresWorld(t)
	leaving, staying := idOf("0a"), idOf("0b")
	w.files(t, leaving)
	w.files(t, staying)
	go func() {
		time.Sleep(betweenLooks / 2)
		_ = w.node.settings.Files.Remove(context.Background(), leaving)
		_ = os.Remove(filepath.Join(w.netns, leaks.Pins(leaving)[0]))
		_ = os.Remove(filepath.Join(w.node.shimDirs.State, cri.Namespace, leaving))
	}()
	found, err := w.leaks(t.Context())
	require.NoError(t, err)
	require.Equal(t, []string{staying}, leaks.IDs(found))
}

func TestFixLeavesAloneWhatAContainerNames(t *testing.T) {
	w := newStoresWorld(t)
	lost := idOf("aa")
	w.files(t, lost)
	w.container(t, containers.Container{ID: "app", SandboxID: lost})
	failed := w.fix(t.Context(), w.found(t))
	require.ErrorContains(t, failed[lost], `container "app" belongs to the sandbox; remove the container first`)
	require.Len(t, w.found(t), 3)
}

func TestLeaksWhileDegraded(t *testing.T) {
	c := &Controller{stock: &stockConfig{}}
	c.refuse(errNoLuck)
	_, err := (&api{controller: c}).Leaks(t.Context(), &podfsmv1.LeaksRequest{Fix: true})
	require.Equal(t, codes.Unavailable, grpcstatus.Code(err))
}
