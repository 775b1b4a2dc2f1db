package plugin

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/userns"
)

// api is the gRPC service for the CLI, on containerd's socket.
type api struct {
	podfsmv1.UnimplementedSandboxesServer
	controller *Controller
}

// Register puts the service on containerd's gRPC server.
func (a *api) Register(server *grpc.Server) error {
	podfsmv1.RegisterSandboxesServer(server, a)
	return nil
}

// List answers with every sandbox that hasn't ended.
func (a *api) List(context.Context, *podfsmv1.ListRequest) (*podfsmv1.ListResponse, error) {
	engine, err := a.engine()
	if err != nil {
		return nil, err
	}
	views := engine.List()
	slices.SortFunc(views, func(x, y lifecycle.View) int {
		return cmp.Or(x.Created.Compare(y.Created), cmp.Compare(x.Key.ID, y.Key.ID))
	})
	response := &podfsmv1.ListResponse{}
	for _, view := range views {
		response.Sandboxes = append(response.Sandboxes, a.sandbox(view))
	}
	return response, nil
}

// Inspect answers with all there is to know of one sandbox, also one that ended not long ago.
func (a *api) Inspect(_ context.Context, r *podfsmv1.InspectRequest) (*podfsmv1.InspectResponse, error) {
	engine, err := a.engine()
	if err != nil {
		return nil, err
	}
	view, err := find(engine, r.GetRef())
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	response := &podfsmv1.InspectResponse{Sandbox: a.sandbox(view)}
	for _, step := range view.Steps {
		response.Steps = append(response.Steps, stepOf(step))
	}
	for _, t := range view.Transitions {
		response.Transitions = append(response.Transitions, &podfsmv1.Transition{
			Seq: t.Seq, At: timestamppb.New(t.At), Event: string(t.Event), From: string(t.From), To: string(t.To), Error: text(t.Err),
		})
	}
	if attached, ok := networkOf(view); ok {
		result, err := json.Marshal(attached.Result)
		if err != nil {
			return nil, errgrpc.ToGRPC(fmt.Errorf("failed to write the CNI result of sandbox %q: %w", view.Key.ID, err))
		}
		response.CniResult = string(result)
	}
	return response, nil
}

func (a *api) engine() (*lifecycle.Engine, error) {
	if a.controller.engine == nil {
		return nil, errgrpc.ToGRPC(a.controller.well())
	}
	return a.controller.engine, nil
}

// find looks a reference up, among the sandboxes that there are and then among those that went: a whole id, a pod's
// "namespace/name" or name, the start of an id.
func find(engine *lifecycle.Engine, ref string) (lifecycle.View, error) {
	if ref == "" {
		return lifecycle.View{}, fmt.Errorf("name a sandbox by its id or its pod: %w", errdefs.ErrInvalidArgument)
	}
	for _, views := range [][]lifecycle.View{engine.List(), engine.Finished()} {
		for _, matches := range []func(lifecycle.View) bool{
			func(v lifecycle.View) bool { return v.Key.ID == ref },
			func(v lifecycle.View) bool { return v.Pod == ref || strings.HasSuffix(v.Pod, "/"+ref) },
			func(v lifecycle.View) bool { return strings.HasPrefix(v.Key.ID, ref) },
		} {
			found := slices.DeleteFunc(slices.Clone(views), func(v lifecycle.View) bool { return !matches(v) })
			if len(found) == 1 {
				return found[0], nil
			}
			if len(found) > 1 {
				return lifecycle.View{}, ambiguous(ref, found)
			}
		}
	}
	return lifecycle.View{}, fmt.Errorf("no sandbox of podfsm matches %q: %w", ref, errdefs.ErrNotFound)
}

func ambiguous(ref string, views []lifecycle.View) error {
	const most = 8
	var names []string
	for _, view := range views[:min(len(views), most)] {
		names = append(names, view.Key.ID+" ("+view.Pod+")")
	}
	if len(views) > most {
		names = append(names, "…")
	}
	return fmt.Errorf("%q matches %d sandboxes, name one by its id: %s: %w", ref, len(views), strings.Join(names, ", "), errdefs.ErrInvalidArgument)
}

func (a *api) sandbox(view lifecycle.View) *podfsmv1.Sandbox {
	spec := view.Spec.(*Spec)
	metadata := spec.Config.GetMetadata()
	s := &podfsmv1.Sandbox{
		Id:                  view.Key.ID,
		ContainerdNamespace: view.Key.Namespace,
		PodName:             metadata.GetName(),
		PodNamespace:        metadata.GetNamespace(),
		PodUid:              metadata.GetUid(),
		Attempt:             metadata.GetAttempt(),
		RuntimeHandler:      spec.Handler,
		State:               string(view.State),
		Goal:                string(view.Goal),
		CreatedAt:           timestamppb.New(view.Created),
		Since:               timestamppb.New(view.Since),
		Userns:              mappingOf(spec.Mapping),
		TraceId:             view.TraceID,
		Error:               text(view.Err),
	}
	if started, ok := view.Step(states.StartPause).Result.(*Pause); ok && view.Exit == nil {
		s.Pid = started.Pid
	}
	if step := view.Step(states.CaptureNetNS); step.Status == lifecycle.StepDone {
		pinned := step.Result.(*NetNS)
		s.NetnsPath, s.NetnsInode = pinned.Path, pinned.Inode
	}
	if attached, ok := networkOf(view); ok {
		s.Ip, s.AdditionalIps = attached.IP, attached.AdditionalIPs
	}
	for _, step := range slices.Backward(view.Steps) {
		switch step.Status {
		case lifecycle.StepRunning, lifecycle.StepUndoing:
			s.Step = string(step.Name)
		case lifecycle.StepOwed:
			s.Debts = append(s.Debts, &podfsmv1.Debt{
				Step: string(step.Name), Error: text(step.Err), Attempts: uint32(step.Attempts),
				NextTry: timestamp(view.NextTry), Since: timestamp(step.OwedSince),
			})
		}
	}
	return s
}

// timestamp is nil for no time.
func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func mappingOf(m *userns.Mappings) *podfsmv1.UserNamespace {
	if m == nil {
		return nil
	}
	one := func(m userns.Mapping) []*podfsmv1.IDMapping {
		return []*podfsmv1.IDMapping{{ContainerId: m.ContainerID, HostId: m.HostID, Length: m.Length}}
	}
	return &podfsmv1.UserNamespace{Uids: one(m.UIDs), Gids: one(m.GIDs)}
}

func stepOf(step lifecycle.StepView) *podfsmv1.Step {
	s := &podfsmv1.Step{Name: string(step.Name), Status: string(step.Status), Error: text(step.Err), Detail: detail(step.Result)}
	if !step.Started.IsZero() {
		s.StartedAt = timestamppb.New(step.Started)
	}
	if step.Duration > 0 {
		s.Duration = durationpb.New(step.Duration.Round(time.Microsecond))
	}
	return s
}

// detail says in words what a step's result is.
func detail(result any) map[string]string {
	switch r := result.(type) {
	case *lifecycle.Skipped:
		return map[string]string{"skipped": r.Reason}
	case *userns.Mappings:
		return map[string]string{
			"uids": fmt.Sprintf("%d:%d:%d", r.UIDs.ContainerID, r.UIDs.HostID, r.UIDs.Length),
			"gids": fmt.Sprintf("%d:%d:%d", r.GIDs.ContainerID, r.GIDs.HostID, r.GIDs.Length),
		}
	case *Snapshot:
		return map[string]string{"snapshotter": r.Snapshotter, "strategy": r.Strategy, "parent": r.Parent}
	case *Pause:
		return map[string]string{"pid": strconv.FormatUint(uint64(r.Pid), 10), "cgroup": r.CgroupPath}
	case *NetNS:
		return map[string]string{"path": r.Path, "inode": strconv.FormatUint(r.Inode, 10)}
	case *Network:
		return map[string]string{"ips": strings.Join(append([]string{r.IP}, r.AdditionalIPs...), ",")}
	default:
		return nil
	}
}

// text is an error as a message that protobuf takes: plugins write what they like.
func text(err error) string {
	if err == nil {
		return ""
	}
	return strings.ToValidUTF8(err.Error(), "\uFFFD")
}
