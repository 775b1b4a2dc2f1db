package plugin

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/journal"
)

// cris are the containerd namespaces that there are: the CRI's.
type cris struct{ namespaces.Store }

func (cris) List(context.Context) ([]string, error) { return []string{cri.Namespace}, nil }

// newStores is a containerd client on real stores of sandboxes and leases.
func newStores(t *testing.T) *containerd.Client {
	file, err := bolt.Open(filepath.Join(t.TempDir(), "meta.db"), 0o600, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, file.Close()) })
	db := metadata.NewDB(file, nil, nil)
	client, err := containerd.New("", containerd.WithServices(
		containerd.WithNamespaceService(cris{}),
		containerd.WithSandboxStore(metadata.NewSandboxStore(db)),
		containerd.WithLeasesService(metadata.NewLeaseManager(db)),
	))
	require.NoError(t, err)
	return client
}

func TestRecoverSweepsOnlyWhatNeverRan(t *testing.T) {
	ran, err := typeurl.MarshalAny(&specs.Spec{})
	require.NoError(t, err)
	for name, tc := range map[string]struct {
		record sandbox.Sandbox
		stays  bool
	}{
		"killed before Create": {record: sandbox.Sandbox{Sandboxer: Name}},
		"another's":            {record: sandbox.Sandbox{Sandboxer: "podsandbox"}, stays: true},
		// The ledger was lost, or set aside as damaged: the pod may well run, and only this record leads to it.
		"ran, but isn't on the ledger": {record: sandbox.Sandbox{Sandboxer: Name, Spec: ran}, stays: true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.ledger, err = journal.Open(t.TempDir(), t.TempDir())
			require.NoError(t, err)
			client, ctx := newStores(t), inCRI(t)
			tc.record.ID, tc.record.Runtime.Name = "s1", "io.containerd.runc.v2"
			_, err := client.SandboxStore().Create(ctx, tc.record)
			require.NoError(t, err)
			_, err = client.LeasesService().Create(ctx, leases.WithID("s1"))
			require.NoError(t, err)

			require.NoError(t, w.recover(t.Context(), client))

			_, err = client.SandboxStore().Get(ctx, "s1")
			left, listErr := client.LeasesService().List(ctx)
			require.NoError(t, listErr)
			if tc.stays {
				require.NoError(t, err)
				require.Len(t, left, 1)
				return
			}
			require.True(t, errdefs.IsNotFound(err), "%v", err)
			require.Empty(t, left)
		})
	}
}

// A log that is missing on a node that hasn't rebooted leaves a ledger that knows of the sandbox, but not what was made for it.
func TestRecoverWithoutTheLogLosesNothing(t *testing.T) {
	rootDir, stateDir := t.TempDir(), t.TempDir()
	client := newStores(t)
	spec, err := typeurl.MarshalAny(&specs.Spec{})
	require.NoError(t, err)
	_, err = client.SandboxStore().Create(inCRI(t), sandbox.Sandbox{
		ID: "s1", Sandboxer: Name, Spec: spec, Runtime: sandbox.RuntimeOpts{Name: "io.containerd.runc.v2"},
	})
	require.NoError(t, err)

	ledger, err := journal.Open(rootDir, stateDir)
	require.NoError(t, err)
	before := newWorldWith(t, ledger)
	before.run(t, "s1")
	require.NoError(t, before.Close())
	require.NoError(t, ledger.Close())
	require.NoError(t, os.RemoveAll(stateDir))

	ledger, err = journal.Open(rootDir, stateDir)
	require.NoError(t, err)
	require.NotEmpty(t, ledger.Damage())
	w := newWorldWith(t, ledger)
	w.ledger = ledger
	w.host.exists["s1"] = before.host.left("s1")
	require.NoError(t, w.recover(t.Context(), client))

	key := journal.Key{Namespace: cri.Namespace, ID: "s1"}
	require.NoError(t, w.Close()) // waits for what recovery has left to the background
	if _, err := w.engine.Get(key); errdefs.IsNotFound(err) {
		require.Empty(t, w.host.left("s1"), "nobody knows of it any more")
	}
}
