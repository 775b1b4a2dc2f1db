package plugin

import (
	"context"
	"testing"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
)

// countedTasks is containerd's task service that keeps what reaches it.
type countedTasks struct {
	tasksapi.TasksClient
	calls []string
}

func (c *countedTasks) Create(_ context.Context, r *tasksapi.CreateTaskRequest, _ ...grpc.CallOption) (*tasksapi.CreateTaskResponse, error) {
	c.calls = append(c.calls, "create "+r.GetContainerID())
	return &tasksapi.CreateTaskResponse{}, nil
}

func (c *countedTasks) Delete(_ context.Context, r *tasksapi.DeleteTaskRequest, _ ...grpc.CallOption) (*tasksapi.DeleteResponse, error) {
	c.calls = append(c.calls, "delete "+r.GetContainerID())
	return &tasksapi.DeleteResponse{}, nil
}

// newTasks is the task service of a world with the pods s1 and s2, of which s1 has the container c1. Another handler's pod has c2.
func newTasks(t *testing.T) (*world, *taskService, *countedTasks) {
	w := newWorld(t)
	for _, id := range []string{"s1", "s2"} {
		w.run(t, id, named(id))
	}
	w.records.sandboxes = map[string]string{"c1": "s1", "c2": "theirs"}
	stock := &countedTasks{}
	service := &taskService{TasksClient: stock}
	service.of.Store(w.Controller)
	return w, service, stock
}

// The pod of a container is found by one look at the record of that container, however many there are. A look that fails is no answer.
func TestPodOfContainer(t *testing.T) {
	w, _, _ := newTasks(t)
	before := w.records.gets
	pod, ok, err := w.SandboxOfContainer(inCRI(t), "c1")
	require.NoError(t, err)
	require.True(t, ok)
	require.Equal(t, "s1", pod.ID)
	require.Equal(t, before+1, w.records.gets)
	for _, id := range []string{"c2", "c3"} {
		_, ok, err = w.SandboxOfContainer(inCRI(t), id)
		require.NoError(t, err)
		require.False(t, ok)
	}
	w.records.err = errdefs.ErrNotFound
	_, ok, err = w.SandboxOfContainer(inCRI(t), "c1")
	require.NoError(t, err)
	require.False(t, ok)
	w.records.err = errNoLuck
	_, ok, err = w.SandboxOfContainer(inCRI(t), "c1")
	require.ErrorIs(t, err, errNoLuck)
	require.False(t, ok)
	_, ok, err = (&Controller{}).SandboxOfContainer(inCRI(t), "c1")
	require.NoError(t, err)
	require.False(t, ok)
}

// A container whose pod can't be found isn't taken for another handler's: its task would run without the pod's turn and the pod's shim. One
// without a record is for containerd's service.
func TestTasksOfContainersWhosePodIsUnknown(t *testing.T) {
	for name, call := range map[string]func(*taskService, context.Context, string) error{
		"create": func(s *taskService, ctx context.Context, id string) error {
			_, err := s.Create(ctx, &tasksapi.CreateTaskRequest{ContainerID: id})
			return err
		},
		"delete": func(s *taskService, ctx context.Context, id string) error {
			_, err := s.Delete(ctx, &tasksapi.DeleteTaskRequest{ContainerID: id})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, service, stock := newTasks(t)
			require.NoError(t, call(service, inCRI(t), "c2"))
			require.NoError(t, call(service, t.Context(), "c1"), "a call without a containerd namespace")
			w.records.err = errdefs.ErrNotFound
			require.NoError(t, call(service, inCRI(t), "c1"))
			require.Equal(t, []string{name + " c2", name + " c1", name + " c1"}, stock.calls)

			w.records.err = errNoLuck
			err := call(service, inCRI(t), "c1")
			require.True(t, errdefs.IsUnavailable(errgrpc.ToNative(err)), "%v", err)
			require.ErrorContains(t, err, `failed to find the pod of container "c1"`)
			require.Len(t, stock.calls, 3)
		})
	}
}

// Filters that name tasks cost no look at all pauses; any other does.
func TestFiltersThatNameTasks(t *testing.T) {
	w := newWorld(t)
	w.run(t, "s1", named("s1"))
	w.run(t, "s2", named("s2"))
	service := &taskService{}
	service.of.Store(w.Controller)
	all := []string{"s1", "s2"}
	for _, tc := range []struct {
		filters, want []string
	}{
		{nil, all},
		{[]string{"id==c1"}, []string{"c1"}},
		{[]string{"id==c2", "id==c1", "id==c2"}, []string{"c1", "c2"}},
		{[]string{"id==c1", "namespace==k8s.io"}, all},
		{[]string{"id~=c1"}, all},
		{[]string{"id==c1,namespace==k8s.io"}, all},
		{[]string{`id=="c1"`}, all},
	} {
		require.ElementsMatch(t, tc.want, service.named(inCRI(t), tc.filters), "%q", tc.filters)
	}
}
