package pause

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sync/singleflight"
)

// When a shim dies, containerd cleans up after it for up to 5 s (its timeout
// io.containerd.timeout.shim.cleanup), and only then forgets the task.
const (
	shimCleanupTimeout = 6 * time.Second
	firstRetryDelay    = 10 * time.Millisecond
	lastRetryDelay     = 320 * time.Millisecond
)

// createGrace is how long a shim has to make the task that a containerd asked it
// for which was killed since.
const createGrace = 3 * time.Second

// Containers makes and ends pause containers and their tasks. A container's id
// is its sandbox's.
//
// Its methods take a context with a containerd namespace, and are safe for
// concurrent use on different sandboxes. Their errors keep containerd's classes.
type Containers struct {
	client  *containerd.Client
	bundles string
	sockets Sockets

	turns turns
	moves singleflight.Group // of expectMove: one serves all that begin meanwhile

	// started are the ids of sandboxes whose tasks this process has made:
	// containerd knows all of their shims.
	started sync.Map
}

// NewContainers returns the pause containers of a containerd client. bundles is
// the directory where that containerd keeps the bundles of its tasks, by
// namespace; sockets says where its shims listen.
func NewContainers(client *containerd.Client, bundles string, sockets Sockets) *Containers {
	return &Containers{client: client, bundles: bundles, sockets: sockets, turns: newTurns()}
}

// CreateRequest is what a pause container is made of.
type CreateRequest struct {
	ID string

	// Spec is from Settings.Spec. Its Opts are applied to its OCI.
	Spec *Spec

	// Labels are from the function Labels.
	Labels map[string]string

	// ImageName is the name of the pause image in containerd's image store.
	ImageName string

	// Snapshotter and SnapshotKey name the rootfs, which exists.
	Snapshotter string
	SnapshotKey string

	// Runtime is the runtime's type, as "io.containerd.runc.v2".
	Runtime string

	// RuntimeOptions are the runtime's, nil for its defaults.
	RuntimeOptions typeurl.Any
}

// Status is the state of a pause task.
type Status struct {
	// Pid is pause's, in the node's pid namespace.
	Pid   uint32
	State containerd.ProcessStatus
}

// UnknownStatus is the exit status where nobody knows it any more, containerd's
// own choice.
const UnknownStatus = containerd.UnknownExitStatus

// Exit tells how pause ended.
type Exit struct {
	Status uint32
	At     time.Time
}

// Create makes the record of a pause container and returns it as stored. It
// starts no process. A record with that id is an AlreadyExists error.
func (c *Containers) Create(ctx context.Context, r CreateRequest) (containers.Container, error) {
	record := containers.Container{ID: r.ID}
	for _, apply := range []containerd.NewContainerOpts{
		containerd.WithSnapshotter(r.Snapshotter),
		containerd.WithSnapshot(r.SnapshotKey),
		containerd.WithImageName(r.ImageName),
		containerd.WithContainerLabels(r.Labels),
		containerd.WithRuntime(r.Runtime, r.RuntimeOptions),
		// After the snapshot, where the spec's options look up the user.
		containerd.WithSpec(r.Spec.OCI, r.Spec.Opts...),
	} {
		if err := apply(ctx, c.client, &record); err != nil {
			return containers.Container{}, fmt.Errorf("failed to create the pause container of sandbox %q: %w", r.ID, err)
		}
	}
	// The client's NewContainer would take a lease and give it back, two transactions of the metadata store, to keep the garbage
	// collector from what it makes: nothing is made here.
	stored, err := c.client.ContainerService().Create(ctx, record)
	if err != nil {
		return containers.Container{}, fmt.Errorf("failed to create the pause container of sandbox %q: %w", r.ID, err)
	}
	return stored, nil
}

// Get returns the record of a pause container, or a NotFound error.
func (c *Containers) Get(ctx context.Context, id string) (containers.Container, error) {
	record, err := c.client.ContainerService().Get(ctx, id)
	if err != nil {
		return containers.Container{}, fmt.Errorf("failed to get the pause container of sandbox %q: %w", id, err)
	}
	return record, nil
}

// Turn waits until the runtime may be asked to make a pause, a few seconds at
// most: of a burst it makes a few at a time, so that the first are ready early.
// The caller calls done when that is made, or has failed.
func (c *Containers) Turn(ctx context.Context) (done func()) { return c.turns.take(ctx) }

// CreateTask has the runtime make pause's namespaces, with the process in them
// that becomes pause at Start, and returns its pid. A runtimePath replaces the
// shim that the container's runtime stands for.
func (c *Containers) CreateTask(ctx context.Context, id, runtimePath string) (uint32, error) {
	container, err := c.client.LoadContainer(ctx, id)
	if err != nil {
		return 0, fmt.Errorf("failed to create the pause task of sandbox %q: %w", id, err)
	}
	c.moves.DoChan("", func() (any, error) {
		if err := expectMove(); err != nil {
			log.L.WithError(err).Debug("podfsm: the kernel isn't prepared for the cgroup of a pause")
		}
		return nil, nil
	})
	var opts []containerd.NewTaskOpts
	if runtimePath != "" {
		opts = append(opts, containerd.WithRuntimePath(runtimePath))
	}
	task, err := container.NewTask(ctx, cio.NullIO, opts...)
	if err != nil {
		return 0, fmt.Errorf("failed to create the pause task of sandbox %q: %w", id, err)
	}
	c.started.Store(id, nil)
	return task.Pid(), nil
}

// Start executes pause in the task that CreateTask made.
func (c *Containers) Start(ctx context.Context, id string) error {
	_, err := c.client.TaskService().Start(ctx, &tasks.StartRequest{ContainerID: id})
	if err != nil {
		return fmt.Errorf("failed to start the pause task of sandbox %q: %w", id, errgrpc.ToNative(err))
	}
	return nil
}

// Status returns the state of a pause task, or a NotFound error: there is none,
// or its shim is dead.
func (c *Containers) Status(ctx context.Context, id string) (Status, error) {
	response, err := c.client.TaskService().Get(ctx, &tasks.GetRequest{ContainerID: id})
	if err != nil {
		return Status{}, fmt.Errorf("failed to get the pause task of sandbox %q: %w", id, errgrpc.ToNative(err))
	}
	process := response.GetProcess()
	return Status{
		Pid:   process.GetPid(),
		State: containerd.ProcessStatus(strings.ToLower(process.GetStatus().String())),
	}, nil
}

// Wait blocks until pause has exited, which may be before the call, or ctx is
// done. A NotFound error means that there is no task any more, and nobody knows
// how pause ended.
func (c *Containers) Wait(ctx context.Context, id string) (Exit, error) {
	var exit Exit
	err := callShim(ctx, func() error {
		response, err := c.client.TaskService().Wait(ctx, &tasks.WaitRequest{ContainerID: id})
		exit = Exit{Status: response.GetExitStatus(), At: response.GetExitedAt().AsTime()}
		return err
	})
	if err != nil {
		return Exit{}, fmt.Errorf("failed to wait for the pause task of sandbox %q: %w", id, err)
	}
	return exit, nil
}

// End ends pause by SIGKILL and waits for its end. The task and its shim stay,
// for DeleteTask. End succeeds when there is no task; how pause ended is then unknown:
// UnknownStatus, now.
func (c *Containers) End(ctx context.Context, id string) (Exit, error) {
	err := callShim(ctx, func() error {
		_, err := c.client.TaskService().Kill(ctx, &tasks.KillRequest{
			ContainerID: id,
			Signal:      uint32(syscall.SIGKILL),
			All:         true, // of a pod in the node's pid namespace
		})
		return err
	})
	// FailedPrecondition: some runtimes' word for a process that has ended.
	if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
		return Exit{}, fmt.Errorf("failed to kill the pause task of sandbox %q: %w", id, err)
	}
	exit, err := c.Wait(ctx, id)
	if errdefs.IsNotFound(err) {
		return Exit{Status: UnknownStatus, At: time.Now()}, nil
	}
	return exit, err
}

// Kill ends pause as End does, and deletes the task as DeleteTask does. The
// container's record stays: containerd finds shims through it. Kill succeeds when
// there is neither task nor shim, nor record.
func (c *Containers) Kill(ctx context.Context, id string) (Exit, error) {
	exit, err := c.End(ctx, id)
	if err != nil {
		return Exit{}, err
	}
	return exit, c.DeleteTask(ctx, id)
}

// DeleteTask deletes the task of a pause that has ended, and its shim, also a
// shim that never had a task or lost it: whatever the shim has said, only this
// ends the shim itself (containerd#7496, containerd#8931). It succeeds when there
// is none, and fails while pause runs.
func (c *Containers) DeleteTask(ctx context.Context, id string) error {
	err := callShim(ctx, func() error {
		_, err := c.client.TaskService().Delete(ctx, &tasks.DeleteTaskRequest{ContainerID: id})
		return err
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("failed to delete the pause task of sandbox %q: %w", id, err)
	}
	return nil
}

// Delete kills pause as Kill does and deletes the container's record; of a sandbox
// that an earlier containerd started, it also removes what that one, killed, has
// left and containerd never looks for again. The snapshot stays. It succeeds when
// there is nothing to delete.
func (c *Containers) Delete(ctx context.Context, id string) error {
	_, started := c.started.Load(id)
	if !started {
		if err := c.awaitCreate(ctx, id); err != nil {
			return err
		}
	}
	if _, err := c.Kill(ctx, id); err != nil {
		return err
	}
	if !started {
		if err := c.removeRemnants(ctx, id); err != nil {
			return err
		}
	}
	err := c.client.ContainerService().Delete(ctx, id)
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("failed to delete the pause container of sandbox %q: %w", id, err)
	}
	if err := c.removeSockets(ctx, id); err != nil {
		return err
	}
	c.started.Delete(id)
	return nil
}

// awaitCreate gives a shim without a task the time to make one. The containerd
// that was killed may have asked it to, and a shim that is ended while it mounts
// a rootfs leaves temporary mounts that nobody looks for again.
func (c *Containers) awaitCreate(ctx context.Context, id string) error {
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return err
	}
	shims, err := shimsOf(namespace, id)
	if err != nil || len(shims) == 0 {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, createGrace)
	defer cancel()
	for delay := firstRetryDelay; ; delay = min(2*delay, lastRetryDelay) {
		if _, err := c.Status(ctx, id); !errdefs.IsNotFound(err) {
			return nil // what else may be wrong, Kill finds out
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(delay):
		}
	}
}

// removeRemnants ends shims that containerd has no note of, and removes a bundle
// that it was about to delete: it renames bundles to ".id" first and skips those
// when it starts.
func (c *Containers) removeRemnants(ctx context.Context, id string) error {
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return err
	}
	if err := validateID(id); err != nil {
		return err
	}
	if err := endShims(ctx, namespace, id); err != nil {
		return err
	}
	if err := removeTrees(filepath.Join(c.bundles, namespace, "."+id)); err != nil {
		return fmt.Errorf("failed to remove the half-deleted bundle of sandbox %q: %w", id, err)
	}
	return nil
}

// Purge deletes all of a sandbox that nobody knows any more: what Delete does,
// whoever started it, and its bundle. containerd itself removes the bundle of a
// shim that it has seen ending, within its own time; Purge waits for that.
func (c *Containers) Purge(ctx context.Context, id string) error {
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return err
	}
	if err := validateID(id); err != nil {
		return err
	}
	c.started.Delete(id)
	shims, err := shimsOf(namespace, id)
	if err != nil {
		return err
	}
	if err := c.Delete(ctx, id); err != nil {
		return err
	}
	bundle := filepath.Join(c.bundles, namespace, id)
	if len(shims) > 0 {
		awaitRemoval(ctx, bundle)
	}
	if err := removeTrees(bundle); err != nil {
		return fmt.Errorf("failed to remove the bundle of sandbox %q: %w", id, err)
	}
	return nil
}

// awaitRemoval returns when containerd has removed a directory, or has had the
// time to.
func awaitRemoval(ctx context.Context, dir string) {
	deadline := time.Now().Add(shimCleanupTimeout)
	for ctx.Err() == nil && time.Now().Before(deadline) {
		if _, err := os.Lstat(dir); errors.Is(err, os.ErrNotExist) {
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(lastRetryDelay):
		}
	}
}

// Bundle is the directory of a task, of a sandbox or of a container.
type Bundle struct {
	Path, ID string
}

// Bundles returns the bundles of a containerd namespace in a containerd's
// directory of bundles, also those that it was about to delete.
func Bundles(bundles, namespace string) ([]Bundle, error) {
	names, err := subdirs(filepath.Join(bundles, namespace))
	if err != nil {
		return nil, fmt.Errorf("failed to list bundles: %w", err)
	}
	all := make([]Bundle, 0, len(names))
	for _, name := range names {
		all = append(all, Bundle{Path: filepath.Join(bundles, namespace, name), ID: strings.TrimPrefix(name, ".")})
	}
	return all, nil
}

// callShim calls again while the connection to a shim is closed but containerd
// has not yet cleaned up after it, which ends in a NotFound error. Errors have
// containerd's classes.
func callShim(ctx context.Context, call func() error) error {
	deadline := time.Now().Add(shimCleanupTimeout)
	for delay := firstRetryDelay; ; delay = min(2*delay, lastRetryDelay) {
		err := errgrpc.ToNative(call())
		if !isConnectionClosed(err) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		case <-time.After(delay):
		}
	}
}

// isConnectionClosed knows ttrpc's error by its text, which is all that is left
// of it when it comes through containerd's task service.
func isConnectionClosed(err error) bool {
	return err != nil && (errors.Is(err, ttrpc.ErrClosed) || errdefs.IsUnknown(err) && strings.HasSuffix(err.Error(), ttrpc.ErrClosed.Error()))
}
