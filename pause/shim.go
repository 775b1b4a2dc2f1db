package pause

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/runtime"
	shims "github.com/containerd/containerd/v2/core/runtime/v2"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	"github.com/podfsm/podfsm/host"
)

// Shims starts and ends the shims of pods. A pod has one shim, which runs the pod's containers. containerd finds the
// shim by the sandbox's id, and starts no other for a container of the sandbox.
//
// Its methods take a context with a containerd namespace, and are safe for concurrent use on different sandboxes. Their errors keep
// containerd's classes.
type Shims struct {
	manager *shims.ShimManager
	dirs    ShimDirs

	mu     sync.Mutex
	strays map[stray]bool
}

// stray names a shim that may run unknown to containerd.
type stray struct{ namespace, id string }

// ShimDirs says where a containerd keeps what belongs to its shims.
type ShimDirs struct {
	Root, State string // of the tasks, by containerd namespace: their working directories and their bundles
	Sockets     string // the shim manager's socket_dir
	Address     string // of containerd's gRPC server, a part of the names of the sockets
}

// NewShims returns the shims of a shim manager.
func NewShims(manager *shims.ShimManager, dirs ShimDirs) *Shims {
	return &Shims{manager: manager, dirs: dirs, strays: map[stray]bool{}}
}

// FindStrays looks for shims that an earlier daemon started and that containerd doesn't know. A daemon that is
// killed between the start of a shim and its record of the shim leaves a shim that never ends, or the process that
// was about to start it. [Shims.End] ends them.
//
// FindStrays examines all processes of the host, once per start of the daemon. So the cost of ending a pod doesn't
// grow with the number of processes.
func (s *Shims) FindStrays(ctx context.Context) error {
	found, err := host.Siblings(ctx, s.dirs.State)
	if err != nil {
		return fmt.Errorf("failed to look for shims that containerd doesn't know: %w", err)
	}
	for _, bundle := range found {
		of := stray{filepath.Base(filepath.Dir(bundle)), strings.TrimPrefix(filepath.Base(bundle), ".")}
		if !s.Running(namespaces.WithNamespace(ctx, of.namespace), of.id) {
			s.setStray(of, true)
		}
	}
	return nil
}

func (s *Shims) setStray(of stray, is bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if is {
		s.strays[of] = true
	} else {
		delete(s.strays, of)
	}
}

func (s *Shims) isStray(of stray) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.strays[of]
}

// Running says whether containerd has the shim of a sandbox.
func (s *Shims) Running(ctx context.Context, id string) bool {
	_, err := s.manager.Get(ctx, id)
	return err == nil
}

// Exists says whether anything of a shim is left: containerd has the shim, or its bundle exists.
func (s *Shims) Exists(ctx context.Context, id string) (bool, error) {
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return false, err
	}
	_, err = os.Lstat(filepath.Join(s.dirs.State, namespace, id))
	return err == nil || s.Running(ctx, id), nil
}

// Start starts the shim of a sandbox. The shim gets the specification of pause, whose annotations tell it that it is
// a pod's. A runtimePath replaces the shim program of the record's runtime; "" doesn't. Start is idempotent.
func (s *Shims) Start(ctx context.Context, record containers.Container, runtimePath string) error {
	if s.Running(ctx, record.ID) {
		return nil
	}
	if err := s.removeBundle(ctx, record.ID); err != nil { // of a dead shim
		return err
	}
	bundle, err := shims.NewBundle(ctx, s.dirs.Root, s.dirs.State, record.ID, record.Spec)
	if err != nil {
		return fmt.Errorf("failed to make the bundle of the shim of sandbox %q: %w", record.ID, err)
	}
	opts := runtime.CreateOpts{Spec: record.Spec, Runtime: record.Runtime.Name, RuntimeOptions: record.Runtime.Options}
	if runtimePath != "" {
		opts.Runtime = runtimePath
	}
	if _, err := s.manager.Start(ctx, record.ID, bundle, opts); err != nil {
		s.setStray(stray{bundle.Namespace, record.ID}, true)
		return errors.Join(fmt.Errorf("failed to start the shim of sandbox %q: %w", record.ID, err), bundle.Delete())
	}
	return nil
}

// End ends the shim of a sandbox without containers, and removes all that containerd keeps for the shim. It succeeds
// if there is none.
func (s *Shims) End(ctx context.Context, id string) error {
	if err := s.end(ctx, id); err != nil {
		return fmt.Errorf("failed to end the shim of sandbox %q: %w", id, err)
	}
	if err := s.removeBundle(ctx, id); err != nil {
		return err
	}
	return s.removeSockets(ctx, id)
}

func (s *Shims) end(ctx context.Context, id string) error {
	if err := validateID(id); err != nil {
		return err
	}
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return err
	}
	of := stray{namespace, id}
	instance, err := s.manager.Get(ctx, id)
	if err == nil {
		err = s.shutdown(ctx, instance, of)
	}
	if err != nil && !errdefs.IsNotFound(err) { // containerd may notice the end of a shim at any time
		return err
	}
	if !s.isStray(of) {
		return nil
	}
	return s.EndUnknown(ctx, id)
}

// shimExit bounds the wait for the exit of a shim after its Shutdown call. A shim with containers stays.
const shimExit = time.Second

// shutdown shuts a shim down. A shim that doesn't exit counts as a stray.
func (s *Shims) shutdown(ctx context.Context, instance shims.ShimInstance, of stray) error {
	_, version := instance.Endpoint()
	client, err := shims.NewTaskClient(instance.Client(), version)
	if err != nil {
		return err
	}
	process := processOf(ctx, client, of.id)
	if process != nil {
		defer process.Close()
	}
	_, err = client.Shutdown(ctx, &taskapi.ShutdownRequest{ID: of.id})
	// A shim that ends may close the connection before it answers.
	if err != nil && !errors.Is(err, ttrpc.ErrClosed) && !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		return err
	}
	err = s.manager.Delete(ctx, of.id)
	if process != nil {
		bounded, cancel := context.WithTimeout(ctx, shimExit)
		defer cancel()
		s.setStray(of, process.Wait(bounded) != nil)
	}
	return err
}

// processOf returns the process of a shim by the pid that the shim reports; nil if it has ended.
func processOf(ctx context.Context, client shims.TaskServiceClient, id string) *host.Process {
	connected, err := client.Connect(ctx, &taskapi.ConnectRequest{ID: id})
	if err != nil {
		return nil
	}
	process, err := host.Open(int(connected.ShimPid))
	if err != nil {
		return nil
	}
	return process
}

// EndUnknown ends a shim that containerd doesn't know, and the process that was about to start it. Both have the
// bundle as working directory, also after its renaming. EndUnknown examines all processes of the host.
func (s *Shims) EndUnknown(ctx context.Context, id string) error {
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return err
	}
	bundles := filepath.Join(s.dirs.State, namespace)
	err = errors.Join(host.KillIn(ctx, filepath.Join(bundles, id)), host.KillIn(ctx, filepath.Join(bundles, "."+id)))
	if err == nil {
		s.setStray(stray{namespace, id}, false)
	}
	return err
}

// removeBundle removes the bundle and the working directory of a dead shim. containerd renames a bundle to ".id"
// before it deletes the bundle, and skips renamed ones when it starts.
func (s *Shims) removeBundle(ctx context.Context, id string) error {
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return err
	}
	bundles := filepath.Join(s.dirs.State, namespace)
	err = removeTrees(filepath.Join(bundles, id), filepath.Join(bundles, "."+id), filepath.Join(s.dirs.Root, namespace, id))
	if err != nil {
		return fmt.Errorf("failed to remove the bundle of sandbox %q: %w", id, err)
	}
	return nil
}

// removeSockets removes the sockets of a dead shim. A shim that was killed, or that ended early, leaves them.
func (s *Shims) removeSockets(ctx context.Context, id string) error {
	if s.dirs.Sockets == "" {
		return nil
	}
	for _, debug := range []bool{false, true} {
		address, err := shim.CreateSocketAddress(ctx, s.dirs.Sockets, s.dirs.Address, id, debug)
		if err != nil {
			return err
		}
		err = os.Remove(strings.TrimPrefix(address, "unix://"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("failed to remove a socket of the shim of sandbox %q: %w", id, err)
		}
	}
	return nil
}

// Bundle is the directory of a shim or a task, of a sandbox or of a container.
type Bundle struct {
	Path, ID string
}

// Bundles returns the bundles of a containerd namespace in containerd's directory of bundles, also the renamed ones
// that containerd was about to delete.
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
