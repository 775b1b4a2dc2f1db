package plugin

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"sync/atomic"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	eventtypes "github.com/containerd/containerd/api/events"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/protobuf"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/pause"
)

// taskService is containerd's task service, extended by podfsm's pauses. No shim runs pause, but
// clients expect a task in every container: cAdvisor reads a pod's network statistics by the pid of
// the sandbox container's task.
//
// It also starts the pod's shim before a container's task is created, see [podTasks].
type taskService struct {
	tasksapi.TasksClient
	of atomic.Pointer[Controller] // nil until podfsm's controller is loaded: after this service, and before its first call
}

var _ tasksapi.TasksClient = (*taskService)(nil)

// withPauses wraps the init function of containerd's task service. It fails only if that function
// fails.
func withPauses(stock func(*plugin.InitContext) (any, error)) func(*plugin.InitContext) (any, error) {
	return func(ic *plugin.InitContext) (any, error) {
		instance, err := stock(ic)
		if client, ok := instance.(tasksapi.TasksClient); ok && err == nil {
			return &taskService{TasksClient: client}, nil
		}
		return instance, err
	}
}

// pauseTask is a running pause.
type pauseTask struct {
	key ledger.Key
	pid uint32
}

// find returns the running pause of a podfsm container. After pause has ended, the task is
// NotFound, as after a deletion by containerd's own controller.
func (t *taskService) find(ctx context.Context, id string) (pauseTask, bool) {
	controller := t.of.Load()
	namespace, ok := namespaces.Namespace(ctx)
	if controller == nil || controller.engine == nil || !ok {
		return pauseTask{}, false
	}
	key := ledger.Key{Namespace: namespace, ID: id}
	process, err := controller.node.pauses.Process(holderID(key))
	if err != nil || !process.Alive() {
		return pauseTask{}, false
	}
	return pauseTask{key, uint32(process.Pid())}, true
}

func (p pauseTask) process() *task.Process {
	return &task.Process{ID: p.key.ID, Pid: p.pid, Status: task.Status_RUNNING, ExitedAt: protobuf.ToTimestamp(time.Time{})} // as a shim reports it
}

// refuse returns the error of a call that would end or change pause without podfsm, with the
// remedy.
func (p pauseTask) refuse(what string) error {
	return errgrpc.ToGRPC(fmt.Errorf("failed to %s the task of container %q: it is the pause of a pod that podfsm runs; stop or remove the pod instead, crictl stopp %s: %w",
		what, p.key.ID, p.key.ID, errdefs.ErrFailedPrecondition))
}

func noExec(p pauseTask, exec string) error {
	return errgrpc.ToGRPC(fmt.Errorf("pause of sandbox %q has no process %q: %w", p.key.ID, exec, errdefs.ErrNotFound))
}

func (t *taskService) Create(ctx context.Context, r *tasksapi.CreateTaskRequest, opts ...grpc.CallOption) (*tasksapi.CreateTaskResponse, error) {
	if p, ok := t.find(ctx, r.GetContainerID()); ok {
		return nil, p.refuse("create")
	}
	key, ok, err := t.podOf(ctx, r.GetContainerID())
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if !ok {
		return t.TasksClient.Create(ctx, r, opts...)
	}
	controller := t.of.Load()
	pod, leave, err := controller.tasks.enter(ctx, key)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	defer leave()
	if err := controller.startShim(ctx, key); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	response, err := t.TasksClient.Create(ctx, r, opts...)
	if err == nil {
		pod.tasks[r.GetContainerID()] = true
	}
	controller.endIdleShim(ctx, key, pod)
	return response, err
}

// podOf returns the podfsm pod that a container is in. For an unknown container it returns false:
// the service reports the error.
func (t *taskService) podOf(ctx context.Context, container string) (key ledger.Key, ok bool, err error) {
	controller := t.of.Load()
	namespace, inNamespace := namespaces.Namespace(ctx)
	if controller == nil || controller.engine == nil || !inNamespace {
		return ledger.Key{}, false, nil
	}
	sandbox, err := controller.node.sandboxOf(ctx, container)
	key = ledger.Key{Namespace: namespace, ID: sandbox}
	return key, err == nil && !controller.engine.Created(key).IsZero(), err
}

func (t *taskService) Get(ctx context.Context, r *tasksapi.GetRequest, opts ...grpc.CallOption) (*tasksapi.GetResponse, error) {
	p, ok := t.find(ctx, r.GetContainerID())
	switch {
	case !ok:
		return t.TasksClient.Get(ctx, r, opts...)
	case r.GetExecID() != "":
		return nil, noExec(p, r.GetExecID())
	default:
		return &tasksapi.GetResponse{Process: p.process()}, nil
	}
}

func (t *taskService) List(ctx context.Context, r *tasksapi.ListTasksRequest, opts ...grpc.CallOption) (*tasksapi.ListTasksResponse, error) {
	response, err := t.TasksClient.List(ctx, r, opts...)
	if err != nil {
		return nil, err
	}
	for _, id := range t.ids(ctx) {
		if p, ok := t.find(ctx, id); ok {
			response.Tasks = append(response.Tasks, p.process())
		}
	}
	return response, nil
}

// ids returns the ids of all sandboxes in a containerd namespace.
func (t *taskService) ids(ctx context.Context) (ids []string) {
	controller := t.of.Load()
	namespace, _ := namespaces.Namespace(ctx)
	if controller == nil || controller.engine == nil {
		return nil
	}
	for _, key := range controller.engine.Keys() {
		if key.Namespace == namespace {
			ids = append(ids, key.ID)
		}
	}
	return ids
}

// named returns the ids that filters can match. containerd's CRI service asks for the metrics of a
// container by its id, so the cost doesn't grow with the number of pods.
func (t *taskService) named(ctx context.Context, by []string) (ids []string) {
	for _, filter := range by {
		id := onlyID.FindStringSubmatch(filter)
		if id == nil {
			return t.ids(ctx)
		}
		ids = append(ids, id[1])
	}
	if len(by) == 0 {
		return t.ids(ctx)
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// onlyID matches a filter for exactly one id.
var onlyID = regexp.MustCompile(`^id==([\w.-]+)$`)

func (t *taskService) ListPids(ctx context.Context, r *tasksapi.ListPidsRequest, opts ...grpc.CallOption) (*tasksapi.ListPidsResponse, error) {
	if p, ok := t.find(ctx, r.GetContainerID()); ok {
		return &tasksapi.ListPidsResponse{Processes: []*task.ProcessInfo{{Pid: p.pid}}}, nil
	}
	return t.TasksClient.ListPids(ctx, r, opts...)
}

func (t *taskService) Metrics(ctx context.Context, r *tasksapi.MetricsRequest, opts ...grpc.CallOption) (*tasksapi.MetricsResponse, error) {
	response, err := t.TasksClient.Metrics(ctx, r, opts...)
	if err != nil {
		return nil, err
	}
	filter, err := filters.ParseAll(r.GetFilters()...)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	for _, id := range t.named(ctx, r.GetFilters()) {
		p, ok := t.find(ctx, id)
		if !ok || !filter.Match(filters.AdapterFunc(p.field)) {
			continue
		}
		metric, err := p.metric(ctx)
		if err != nil {
			log.G(ctx).WithError(err).WithField("sandbox", p.key.ID).Debug("failed to read the metrics of a pause") // pause may have ended meanwhile
			continue
		}
		response.Metrics = append(response.Metrics, metric)
	}
	return response, nil
}

func (p pauseTask) field(path []string) (string, bool) {
	switch path[0] {
	case "id":
		return p.key.ID, true
	case "namespace":
		return p.key.Namespace, true
	default:
		return "", false
	}
}

// metric returns the metrics of pause's cgroup.
func (p pauseTask) metric(ctx context.Context) (*types.Metric, error) {
	data, err := pauseMetrics(ctx, int(p.pid))
	if err != nil {
		return nil, err
	}
	packed, err := typeurl.MarshalAnyToProto(data)
	if err != nil {
		return nil, err
	}
	return &types.Metric{Timestamp: protobuf.ToTimestamp(time.Now()), ID: p.key.ID, Data: packed}, nil
}

func pauseMetrics(ctx context.Context, pid int) (any, error) {
	paths, err := host.CgroupPaths(ctx, pid)
	if err != nil {
		return nil, err
	}
	if cgroups.Mode() == cgroups.Unified {
		return cgroup2Metrics(paths[""])
	}
	return cgroup1Metrics(func(controller cgroup1.Name) (string, error) {
		for _, hierarchy := range []string{string(controller), "name=" + string(controller)} {
			if path, ok := paths[hierarchy]; ok {
				return path, nil
			}
		}
		return "", cgroup1.ErrControllerNotActive
	})
}

func (t *taskService) Wait(ctx context.Context, r *tasksapi.WaitRequest, opts ...grpc.CallOption) (*tasksapi.WaitResponse, error) {
	p, ok := t.find(ctx, r.GetContainerID())
	switch {
	case !ok:
		return t.TasksClient.Wait(ctx, r, opts...)
	case r.GetExecID() != "":
		return nil, noExec(p, r.GetExecID())
	}
	exit, err := t.of.Load().engine.Wait(ctx, p.key)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &tasksapi.WaitResponse{ExitStatus: exit.Code, ExitedAt: protobuf.ToTimestamp(exit.At)}, nil
}

func (t *taskService) Start(ctx context.Context, r *tasksapi.StartRequest, opts ...grpc.CallOption) (*tasksapi.StartResponse, error) {
	if p, ok := t.find(ctx, r.GetContainerID()); ok {
		return nil, p.refuse("start")
	}
	return t.TasksClient.Start(ctx, r, opts...)
}

func (t *taskService) Delete(ctx context.Context, r *tasksapi.DeleteTaskRequest, opts ...grpc.CallOption) (*tasksapi.DeleteResponse, error) {
	if p, ok := t.find(ctx, r.GetContainerID()); ok {
		return nil, p.refuse("delete")
	}
	key, ok, err := t.podOf(ctx, r.GetContainerID())
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if !ok {
		return t.TasksClient.Delete(ctx, r, opts...)
	}
	controller := t.of.Load()
	pod, leave, err := controller.tasks.enter(ctx, key)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	defer leave()
	response, err := t.TasksClient.Delete(ctx, r, opts...)
	if err != nil && !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		return nil, err
	}
	delete(pod.tasks, r.GetContainerID())
	controller.endIdleShim(ctx, key, pod)
	return response, err
}

func (t *taskService) Kill(ctx context.Context, r *tasksapi.KillRequest, opts ...grpc.CallOption) (*emptypb.Empty, error) {
	if p, ok := t.find(ctx, r.GetContainerID()); ok {
		return nil, p.refuse("kill")
	}
	return t.TasksClient.Kill(ctx, r, opts...)
}

func (t *taskService) Exec(ctx context.Context, r *tasksapi.ExecProcessRequest, opts ...grpc.CallOption) (*emptypb.Empty, error) {
	if p, ok := t.find(ctx, r.GetContainerID()); ok {
		return nil, p.refuse("start a process in")
	}
	return t.TasksClient.Exec(ctx, r, opts...)
}

func (t *taskService) Pause(ctx context.Context, r *tasksapi.PauseTaskRequest, opts ...grpc.CallOption) (*emptypb.Empty, error) {
	if p, ok := t.find(ctx, r.GetContainerID()); ok {
		return nil, p.refuse("pause")
	}
	return t.TasksClient.Pause(ctx, r, opts...)
}

func (t *taskService) Checkpoint(ctx context.Context, r *tasksapi.CheckpointTaskRequest, opts ...grpc.CallOption) (*tasksapi.CheckpointTaskResponse, error) {
	if p, ok := t.find(ctx, r.GetContainerID()); ok {
		return nil, p.refuse("checkpoint")
	}
	return t.TasksClient.Checkpoint(ctx, r, opts...)
}

func (t *taskService) Update(ctx context.Context, r *tasksapi.UpdateTaskRequest, opts ...grpc.CallOption) (*emptypb.Empty, error) {
	if p, ok := t.find(ctx, r.GetContainerID()); ok {
		return nil, p.refuse("update")
	}
	return t.TasksClient.Update(ctx, r, opts...)
}

// eventExchange is containerd's event exchange.
type eventExchange interface {
	events.Publisher
	Subscribe(ctx context.Context, filters ...string) (<-chan *events.Envelope, <-chan error)
}

// taskEvents publishes for pause the events that containerd publishes for a shim's task.
type taskEvents struct{ publisher events.Publisher }

func (e taskEvents) created(ctx context.Context, key ledger.Key, pid uint32) {
	e.publish(ctx, key, runtime.TaskCreateEventTopic, &eventtypes.TaskCreate{ContainerID: key.ID, Pid: pid})
	e.publish(ctx, key, runtime.TaskStartEventTopic, &eventtypes.TaskStart{ContainerID: key.ID, Pid: pid})
}

func (e taskEvents) exited(key ledger.Key, pid uint32, exit pause.Exit) {
	ctx := context.Background()
	at := protobuf.ToTimestamp(exit.At)
	e.publish(ctx, key, runtime.TaskExitEventTopic, &eventtypes.TaskExit{ContainerID: key.ID, ID: key.ID, Pid: pid, ExitStatus: exit.Status, ExitedAt: at})
	e.publish(ctx, key, runtime.TaskDeleteEventTopic, &eventtypes.TaskDelete{ContainerID: key.ID, Pid: pid, ExitStatus: exit.Status, ExitedAt: at})
}

func (e taskEvents) publish(ctx context.Context, key ledger.Key, topic string, event events.Event) {
	if err := e.publisher.Publish(namespaces.WithNamespace(ctx, key.Namespace), topic, event); err != nil {
		log.G(ctx).WithError(err).WithField("sandbox", key.ID).Warnf("failed to publish %s of a pause", topic)
	}
}

// pauseExited reports the exit of a pause to the engine and to subscribers of containerd's events.
func (c *Controller) pauseExited(engine *lifecycle.Engine, name string, exit pause.Exit) {
	key, err := keyOfHolder(name)
	if err != nil {
		return // not the name of a sandbox
	}
	if process, err := c.node.pauses.Process(name); err == nil {
		c.node.tasks.exited(key, uint32(process.Pid()), exit)
	}
	engine.PauseExited(key, lifecycle.Exit{Code: exit.Status, At: exit.At})
}
