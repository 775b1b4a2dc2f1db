package pause

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// newTestClient is a containerd client on real stores.
func newTestClient(t *testing.T) (context.Context, *containerd.Client) {
	t.Helper()
	dir := t.TempDir()
	sn, err := native.NewSnapshotter(filepath.Join(dir, "native"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, sn.Close()) })
	bdb, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, bdb.Close()) })
	db := metadata.NewDB(bdb, nil, map[string]snapshots.Snapshotter{"native": sn})

	client, err := containerd.New("",
		containerd.WithDefaultRuntime("io.containerd.default.v2"),
		containerd.WithServices(
			containerd.WithContainerStore(metadata.NewContainerStore(db)),
			containerd.WithSnapshotters(map[string]snapshots.Snapshotter{"native": db.Snapshotter("native")}),
			containerd.WithLeasesService(metadata.NewLeaseManager(db)),
		))
	require.NoError(t, err)
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	lease, err := client.LeasesService().Create(ctx, leases.WithID("sandbox"))
	require.NoError(t, err)
	return leases.WithLease(ctx, lease.ID), client
}

func testCreateRequest(t *testing.T, ctx context.Context) CreateRequest {
	t.Helper()
	pod := testPod()
	pod.ImageConfig.User = "65535:65534"
	spec, err := testSettings().Spec(ctx, pod)
	require.NoError(t, err)
	runc, err := typeurl.MarshalAny(&options.Options{BinaryName: "/usr/bin/runc"})
	require.NoError(t, err)
	return CreateRequest{
		ID:             "sandbox",
		Spec:           spec,
		Labels:         Labels(map[string]string{"app": "web"}, nil),
		ImageName:      "registry.example/pause:3.10.1",
		Snapshotter:    "native",
		SnapshotKey:    "sandbox",
		Runtime:        "io.containerd.runc.v2",
		RuntimeOptions: runc,
	}
}

func TestCreate(t *testing.T) {
	ctx, client := newTestClient(t)
	containers := NewContainers(client)
	request := testCreateRequest(t, ctx)

	_, err := containers.Create(ctx, request)
	require.ErrorIs(t, err, errdefs.ErrNotFound, "there is no snapshot")
	require.ErrorContains(t, err, `sandbox "sandbox"`)
	_, err = containers.Get(ctx, "sandbox")
	require.ErrorIs(t, err, errdefs.ErrNotFound)

	_, err = client.SnapshotService("native").Prepare(ctx, "sandbox", "")
	require.NoError(t, err)
	record, err := containers.Create(ctx, request)
	require.NoError(t, err)
	require.Equal(t, "sandbox", record.ID)
	require.Equal(t, "sandbox", record.SnapshotKey)
	require.Equal(t, "native", record.Snapshotter)
	require.Equal(t, "registry.example/pause:3.10.1", record.Image)
	require.Equal(t, "io.containerd.runc.v2", record.Runtime.Name)
	require.Equal(t, request.RuntimeOptions.GetValue(), record.Runtime.Options.GetValue())
	require.Equal(t, map[string]string{"app": "web", "io.cri-containerd.kind": "sandbox"}, record.Labels)
	require.Empty(t, record.Extensions, "the stock controller would take the sandbox for its own")
	require.False(t, record.CreatedAt.IsZero())
	var spec specs.Spec
	require.NoError(t, json.Unmarshal(record.Spec.GetValue(), &spec))
	require.EqualValues(t, 65535, spec.Process.User.UID, "the spec's options are applied")

	stored, err := containers.Get(ctx, "sandbox")
	require.NoError(t, err)
	require.Equal(t, record.Spec.GetValue(), stored.Spec.GetValue())
	require.Equal(t, record.CreatedAt, stored.CreatedAt)

	_, err = containers.Create(ctx, request)
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
}

// An image has a pipe in the place of a file that is read.
func TestCreateIsBounded(t *testing.T) {
	ctx, client := newTestClient(t)
	mounts, err := client.SnapshotService("native").Prepare(ctx, "sandbox", "")
	require.NoError(t, err)
	pipe := filepath.Join(mounts[0].Source, "etc/passwd")
	require.NoError(t, os.MkdirAll(filepath.Dir(pipe), 0o755))
	require.NoError(t, unix.Mkfifo(pipe, 0o644))
	request := testCreateRequest(t, ctx)
	request.Spec.Opts, err = userOpts(nil, "somebody")
	require.NoError(t, err)

	cause := errors.New("took too long")
	ctx, cancel := context.WithTimeoutCause(ctx, 300*time.Millisecond, cause)
	defer cancel()
	created := make(chan error, 1)
	go func() {
		_, err := NewContainers(client).Create(ctx, request)
		created <- err
	}()
	select {
	case err = <-created:
	case <-time.After(10 * time.Second):
	}
	writer, openErr := os.OpenFile(pipe, os.O_WRONLY|unix.O_NONBLOCK, 0) // lets go of what waits
	require.NoError(t, openErr)
	require.NoError(t, writer.Close())
	require.ErrorIs(t, err, cause)
}

func TestCreateWithoutRuntimeOptions(t *testing.T) {
	ctx, client := newTestClient(t)
	_, err := client.SnapshotService("native").Prepare(ctx, "sandbox", "")
	require.NoError(t, err)
	request := testCreateRequest(t, ctx)
	request.RuntimeOptions = nil
	record, err := NewContainers(client).Create(ctx, request)
	require.NoError(t, err)
	require.Nil(t, record.Runtime.Options)
}

func TestDelete(t *testing.T) {
	ctx, client := newTestClient(t)
	containers := NewContainers(client)
	_, err := client.SnapshotService("native").Prepare(ctx, "sandbox", "")
	require.NoError(t, err)
	_, err = containers.Create(ctx, testCreateRequest(t, ctx))
	require.NoError(t, err)
	for range 2 {
		require.NoError(t, containers.Delete(ctx, "sandbox"))
		_, err = containers.Get(ctx, "sandbox")
		require.ErrorIs(t, err, errdefs.ErrNotFound)
		_, err = client.SnapshotService("native").Stat(ctx, "sandbox")
		require.NoError(t, err, "the snapshot stays")
	}
}
