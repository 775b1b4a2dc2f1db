package pause

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/api/types/task"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const testPid = 4242

// fakeShim is containerd's task service with at most one shim.
type fakeShim struct {
	tasks.TasksClient

	shim   bool        // runs
	status task.Status // UNKNOWN: the shim has no task
	exited chan struct{}
	making int // looks until the task is there that an earlier containerd has asked for
	closed int // calls that still find the shim's connection closed; then the shim is gone

	killErr, waitErr, deleteErr error

	calls   []string
	created *tasks.CreateTaskRequest
	killed  *tasks.KillRequest
}

func newFakeShim(status task.Status) *fakeShim {
	return &fakeShim{shim: true, status: status, exited: make(chan struct{})}
}

// enter fails as the task service does.
func (f *fakeShim) enter(call string, needsTask bool) error {
	f.calls = append(f.calls, call)
	if f.closed > 0 {
		f.closed--
		f.shim = f.closed > 0
		return errgrpc.ToGRPC(fmt.Errorf("failed to %s task: %w", call, ttrpc.ErrClosed))
	}
	if !f.shim || needsTask && f.status == task.Status_UNKNOWN {
		return errgrpc.ToGRPC(fmt.Errorf("task: %w", errdefs.ErrNotFound))
	}
	return nil
}

func (f *fakeShim) Create(_ context.Context, r *tasks.CreateTaskRequest, _ ...grpc.CallOption) (*tasks.CreateTaskResponse, error) {
	f.calls = append(f.calls, "create")
	if f.shim {
		return nil, errgrpc.ToGRPC(fmt.Errorf("task: %w", errdefs.ErrAlreadyExists))
	}
	f.created, f.shim, f.status, f.exited = r, true, task.Status_CREATED, make(chan struct{})
	return &tasks.CreateTaskResponse{Pid: testPid}, nil
}

func (f *fakeShim) Start(context.Context, *tasks.StartRequest, ...grpc.CallOption) (*tasks.StartResponse, error) {
	if err := f.enter("start", true); err != nil {
		return nil, err
	}
	f.status = task.Status_RUNNING
	return &tasks.StartResponse{Pid: testPid}, nil
}

func (f *fakeShim) Get(context.Context, *tasks.GetRequest, ...grpc.CallOption) (*tasks.GetResponse, error) {
	if f.making > 0 {
		if f.making--; f.making == 0 {
			f.status = task.Status_CREATED
		}
	}
	if err := f.enter("get", true); err != nil {
		return nil, err
	}
	return &tasks.GetResponse{Process: &task.Process{Pid: testPid, Status: f.status}}, nil
}

func (f *fakeShim) Kill(_ context.Context, r *tasks.KillRequest, _ ...grpc.CallOption) (*emptypb.Empty, error) {
	if err := f.enter("kill", true); err != nil {
		return nil, err
	}
	if f.killErr != nil {
		return nil, errgrpc.ToGRPC(f.killErr)
	}
	f.killed = r
	if f.status != task.Status_STOPPED {
		f.exit()
	}
	return &emptypb.Empty{}, nil
}

func (f *fakeShim) exit() {
	f.status = task.Status_STOPPED
	close(f.exited)
}

func (f *fakeShim) Wait(ctx context.Context, _ *tasks.WaitRequest, _ ...grpc.CallOption) (*tasks.WaitResponse, error) {
	if err := f.enter("wait", true); err != nil {
		return nil, err
	}
	if f.waitErr != nil {
		return nil, errgrpc.ToGRPC(f.waitErr)
	}
	select {
	case <-f.exited:
		return &tasks.WaitResponse{ExitStatus: 137, ExitedAt: timestamppb.New(time.Unix(7, 0))}, nil
	case <-ctx.Done():
		return nil, errgrpc.ToGRPC(ctx.Err())
	}
}

func (f *fakeShim) Delete(context.Context, *tasks.DeleteTaskRequest, ...grpc.CallOption) (*tasks.DeleteResponse, error) {
	if err := f.enter("delete", false); err != nil {
		return nil, err
	}
	if f.deleteErr != nil {
		return nil, errgrpc.ToGRPC(f.deleteErr)
	}
	f.shim = false
	if f.status == task.Status_UNKNOWN {
		// The shim is gone now, but had no task.
		return nil, errgrpc.ToGRPC(fmt.Errorf("task: %w", errdefs.ErrNotFound))
	}
	return &tasks.DeleteResponse{}, nil
}

// newTestClient is a containerd client on real stores and the fake shim.
func newTestClient(t *testing.T, shim *fakeShim) (context.Context, *containerd.Client) {
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
			containerd.WithTaskClient(shim),
		))
	require.NoError(t, err)
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	lease, err := client.LeasesService().Create(ctx, leases.WithID("sandbox"))
	require.NoError(t, err)
	return leases.WithLease(ctx, lease.ID), client
}

// newPause creates a pause container named "sandbox".
func newPause(t *testing.T, ctx context.Context, client *containerd.Client) *Containers {
	t.Helper()
	_, err := client.SnapshotService("native").Prepare(ctx, "sandbox", "")
	require.NoError(t, err)
	containers := NewContainers(client, t.TempDir(), Sockets{})
	_, err = containers.Create(ctx, testCreateRequest(t, ctx))
	require.NoError(t, err)
	return containers
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
	ctx, client := newTestClient(t, &fakeShim{})
	containers := NewContainers(client, t.TempDir(), Sockets{})
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

func TestCreateWithoutRuntimeOptions(t *testing.T) {
	ctx, client := newTestClient(t, &fakeShim{})
	_, err := client.SnapshotService("native").Prepare(ctx, "sandbox", "")
	require.NoError(t, err)
	request := testCreateRequest(t, ctx)
	request.RuntimeOptions = nil
	record, err := NewContainers(client, t.TempDir(), Sockets{}).Create(ctx, request)
	require.NoError(t, err)
	require.Nil(t, record.Runtime.Options)
}

func TestTask(t *testing.T) {
	shim := &fakeShim{}
	ctx, client := newTestClient(t, shim)
	containers := newPause(t, ctx, client)

	_, err := containers.Status(ctx, "sandbox")
	require.ErrorIs(t, err, errdefs.ErrNotFound)

	pid, err := containers.CreateTask(ctx, "sandbox", "")
	require.NoError(t, err)
	require.EqualValues(t, testPid, pid)
	require.Empty(t, shim.created.RuntimePath)
	require.Empty(t, shim.created.Stdin+shim.created.Stdout+shim.created.Stderr)
	require.Len(t, shim.created.Rootfs, 1)
	status, err := containers.Status(ctx, "sandbox")
	require.NoError(t, err)
	require.Equal(t, Status{Pid: testPid, State: containerd.Created}, status)

	_, err = containers.CreateTask(ctx, "sandbox", "")
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)

	require.NoError(t, containers.Start(ctx, "sandbox"))
	status, err = containers.Status(ctx, "sandbox")
	require.NoError(t, err)
	require.Equal(t, Status{Pid: testPid, State: containerd.Running}, status)

	shim.exit()
	exit, err := containers.Wait(ctx, "sandbox")
	require.NoError(t, err)
	require.Equal(t, Exit{Status: 137, At: time.Unix(7, 0).UTC()}, exit)
}

func TestTaskErrors(t *testing.T) {
	shim := &fakeShim{}
	ctx, client := newTestClient(t, shim)
	containers := NewContainers(client, t.TempDir(), Sockets{})
	_, err := containers.CreateTask(ctx, "sandbox", "")
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.ErrorContains(t, err, `sandbox "sandbox"`)
	require.Empty(t, shim.calls)
	require.ErrorIs(t, containers.Start(ctx, "sandbox"), errdefs.ErrNotFound)
	_, err = containers.Wait(ctx, "sandbox")
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}

func TestCreateTaskWithRuntimePath(t *testing.T) {
	shim := &fakeShim{}
	ctx, client := newTestClient(t, shim)
	_, err := newPause(t, ctx, client).CreateTask(ctx, "sandbox", "/opt/containerd-shim-x-v2")
	require.NoError(t, err)
	require.Equal(t, "/opt/containerd-shim-x-v2", shim.created.RuntimePath)
}

func TestWaitEndsWithItsContext(t *testing.T) {
	ctx, client := newTestClient(t, newFakeShim(task.Status_RUNNING))
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	_, err := NewContainers(client, t.TempDir(), Sockets{}).Wait(ctx, "sandbox")
	require.ErrorIs(t, err, context.Canceled)
}

func TestKillAndDelete(t *testing.T) {
	ended := func(killErr error) *fakeShim {
		f := newFakeShim(task.Status_RUNNING)
		f.exit()
		f.killErr = killErr
		return f
	}
	for name, tc := range map[string]struct {
		shim  *fakeShim
		known bool // how pause ended
	}{
		"running":                 {newFakeShim(task.Status_RUNNING), true},
		"created, never started":  {newFakeShim(task.Status_CREATED), true},
		"exited":                  {ended(nil), true},
		"process already gone":    {ended(errdefs.ErrNotFound), true},
		"process already stopped": {ended(errdefs.ErrFailedPrecondition), true},
		"shim without a task":     {newFakeShim(task.Status_UNKNOWN), false},
		"neither shim nor task":   {&fakeShim{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			f := tc.shim
			ctx, client := newTestClient(t, f)
			containers := newPause(t, ctx, client)

			exit, err := containers.Kill(ctx, "sandbox")
			require.NoError(t, err)
			if tc.known {
				require.Equal(t, Exit{Status: 137, At: time.Unix(7, 0).UTC()}, exit)
			} else {
				require.Equal(t, UnknownStatus, int(exit.Status))
				require.WithinDuration(t, time.Now(), exit.At, time.Minute)
			}
			require.False(t, f.shim)
			require.Equal(t, "delete", f.calls[len(f.calls)-1], "whatever the shim has said before")
			if f.killed != nil {
				require.EqualValues(t, 9, f.killed.Signal)
				require.True(t, f.killed.All)
			}
			_, err = containers.Get(ctx, "sandbox")
			require.NoError(t, err, "the record stays")
			_, err = containers.Kill(ctx, "sandbox")
			require.NoError(t, err, "a second time")

			require.NoError(t, containers.Delete(ctx, "sandbox"))
			_, err = containers.Get(ctx, "sandbox")
			require.ErrorIs(t, err, errdefs.ErrNotFound)
			_, err = client.SnapshotService("native").Stat(ctx, "sandbox")
			require.NoError(t, err, "the snapshot stays")
			require.NoError(t, containers.Delete(ctx, "sandbox"), "a second time")
		})
	}
}

func TestDeleteWithATask(t *testing.T) {
	f := newFakeShim(task.Status_RUNNING)
	ctx, client := newTestClient(t, f)
	containers := newPause(t, ctx, client)
	require.NoError(t, containers.Delete(ctx, "sandbox"))
	require.Equal(t, []string{"kill", "wait", "delete"}, f.calls)
	require.False(t, f.shim)
}

// A containerd was killed when it had asked the shim for the task. To end the shim then would leave mounts of its own behind.
func TestDeleteLetsAShimMakeItsTask(t *testing.T) {
	shim := startShim(t, "sandbox", filepath.Join(t.TempDir(), "socket"), false)
	reaped := make(chan error, 1)
	go func() { reaped <- shim.Wait() }()
	f := newFakeShim(task.Status_UNKNOWN)
	f.making = 3
	ctx, client := newTestClient(t, f)
	containers := newPause(t, ctx, client)
	require.NoError(t, containers.Delete(namespaces.WithNamespace(ctx, "test"), "sandbox"), "in the shim's namespace")
	require.Equal(t, []string{"get", "get", "get", "kill", "wait", "delete"}, f.calls)
	require.Error(t, <-reaped)
}

func TestDeleteRemovesABundleThatWasBeingDeleted(t *testing.T) {
	ctx, client := newTestClient(t, newFakeShim(task.Status_RUNNING))
	containers := newPause(t, ctx, client)
	mine := filepath.Join(containers.bundles, "k8s.io", ".sandbox")
	other := filepath.Join(containers.bundles, "k8s.io", ".another")
	require.NoError(t, os.MkdirAll(filepath.Join(mine, "rootfs"), 0o755))
	require.NoError(t, os.MkdirAll(other, 0o755))
	require.NoError(t, containers.Delete(ctx, "sandbox"))
	require.NoDirExists(t, mine)
	require.DirExists(t, other)
	require.ErrorIs(t, containers.Delete(ctx, "../k8s.io"), errdefs.ErrInvalidArgument)
}

func TestDeleteKeepsTheRecordOfALivingShim(t *testing.T) {
	for name, fail := range map[string]func(*fakeShim){
		"kill fails":     func(f *fakeShim) { f.killErr = errdefs.ErrUnavailable },
		"wait fails":     func(f *fakeShim) { f.waitErr = errdefs.ErrUnavailable },
		"deletion fails": func(f *fakeShim) { f.deleteErr = errdefs.ErrUnavailable },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFakeShim(task.Status_RUNNING)
			fail(f)
			ctx, client := newTestClient(t, f)
			containers := newPause(t, ctx, client)
			err := containers.Delete(ctx, "sandbox")
			require.ErrorIs(t, err, errdefs.ErrUnavailable)
			require.ErrorContains(t, err, `sandbox "sandbox"`)
			_, err = containers.Get(ctx, "sandbox")
			require.NoError(t, err, "containerd finds the shim through it")

			f.killErr, f.waitErr, f.deleteErr = nil, nil, nil
			require.NoError(t, containers.Delete(ctx, "sandbox"), "the next try")
		})
	}
}

// A runtime costs a process for each call: nothing is asked for twice.
func TestEndAndDeleteTask(t *testing.T) {
	f := newFakeShim(task.Status_RUNNING)
	ctx, client := newTestClient(t, f)
	containers := newPause(t, ctx, client)
	exit, err := containers.End(ctx, "sandbox")
	require.NoError(t, err)
	require.Equal(t, Exit{Status: 137, At: time.Unix(7, 0).UTC()}, exit)
	require.True(t, f.shim, "the shim stays")
	require.NoError(t, containers.DeleteTask(ctx, "sandbox"))
	require.False(t, f.shim)
	require.Equal(t, []string{"kill", "wait", "delete"}, f.calls)
	require.NoError(t, containers.DeleteTask(ctx, "sandbox"), "a second time")
}

// The shim has been killed, and containerd is still cleaning up after it.
func TestKillWaitsForTheCleanupOfADeadShim(t *testing.T) {
	f := newFakeShim(task.Status_RUNNING)
	f.closed = 3
	ctx, client := newTestClient(t, f)
	containers := newPause(t, ctx, client)
	_, err := containers.Kill(ctx, "sandbox")
	require.NoError(t, err)
	require.Equal(t, []string{"kill", "kill", "kill", "kill", "wait", "delete"}, f.calls)
}

func TestCallShim(t *testing.T) {
	closed := errgrpc.ToGRPC(fmt.Errorf("failed to delete task: %w", ttrpc.ErrClosed))

	t.Run("gives up after containerd would have", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			err := callShim(t.Context(), func() error { return closed })
			require.ErrorContains(t, err, "ttrpc: closed")
			require.GreaterOrEqual(t, time.Since(start), shimCleanupTimeout)
			require.LessOrEqual(t, time.Since(start), shimCleanupTimeout+lastRetryDelay)
		})
	})
	t.Run("ends with its context", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			start := time.Now()
			err := callShim(ctx, func() error { return closed })
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.ErrorContains(t, err, "ttrpc: closed")
			require.Equal(t, time.Second, time.Since(start))
		})
	})
	t.Run("does not repeat other errors", func(t *testing.T) {
		calls := 0
		err := callShim(t.Context(), func() error {
			calls++
			return errgrpc.ToGRPC(fmt.Errorf("runc: %w", errdefs.ErrUnknown))
		})
		require.ErrorIs(t, err, errdefs.ErrUnknown)
		require.Equal(t, 1, calls)
	})
}
