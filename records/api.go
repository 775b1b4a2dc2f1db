package records

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/userns"
)

// List is the sandboxes in the words of the API, the oldest first.
func List(views []lifecycle.View) *podfsmv1.ListResponse {
	views = slices.SortedFunc(slices.Values(views), func(x, y lifecycle.View) int {
		return cmp.Or(x.Created.Compare(y.Created), cmp.Compare(x.Key.ID, y.Key.ID))
	})
	response := &podfsmv1.ListResponse{}
	for _, view := range views {
		response.Sandboxes = append(response.Sandboxes, Sandbox(view))
	}
	return response
}

// Inspection is all there is to know of a sandbox, in the words of the API.
func Inspection(view lifecycle.View) (*podfsmv1.InspectResponse, error) {
	response := &podfsmv1.InspectResponse{Sandbox: Sandbox(view)}
	for _, step := range view.Steps {
		response.Steps = append(response.Steps, stepOf(step))
	}
	for _, t := range view.Transitions {
		response.Transitions = append(response.Transitions, &podfsmv1.Transition{
			Seq: t.Seq, At: timestamppb.New(t.At), Event: string(t.Event), From: string(t.From), To: string(t.To), Error: Text(t.Err),
		})
	}
	if attached, ok := NetworkOf(view); ok {
		result, err := json.Marshal(attached.Result)
		if err != nil {
			return nil, fmt.Errorf("failed to write the CNI result of sandbox %q: %w", view.Key.ID, err)
		}
		response.CniResult = string(result)
	}
	return response, nil
}

// Find looks a reference up in one generation of sandboxes after the other, as those that there are and those that went: a whole
// id, a pod's "namespace/name" or name, the start of an id. Errors: NotFound; InvalidArgument when it is empty or several match.
func Find(ref string, generations ...[]lifecycle.View) (lifecycle.View, error) {
	if ref == "" {
		return lifecycle.View{}, fmt.Errorf("name a sandbox by its id or its pod: %w", errdefs.ErrInvalidArgument)
	}
	for _, views := range generations {
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

// Sandbox is a sandbox in the words of the API.
func Sandbox(view lifecycle.View) *podfsmv1.Sandbox {
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
		Userns:              mappingOf(MappingsOf(view)),
		TraceId:             view.TraceID,
		Error:               Text(view.Err),
	}
	if started, ok := view.Step(states.StartPause).Result.(*Pause); ok && view.Exit == nil {
		s.Pid = started.Pid
	}
	if step := view.Step(states.CaptureNetNS); step.Status == lifecycle.StepDone {
		pinned := step.Result.(*NetNS)
		s.NetnsPath, s.NetnsInode = pinned.Path, pinned.Inode
	}
	if attached, ok := NetworkOf(view); ok {
		s.Ip, s.AdditionalIps = attached.IP, attached.AdditionalIPs
	}
	for _, step := range slices.Backward(view.Steps) {
		switch step.Status {
		case lifecycle.StepRunning, lifecycle.StepUndoing:
			s.Step = string(step.Name)
		case lifecycle.StepOwed:
			s.Debts = append(s.Debts, &podfsmv1.Debt{
				Step: string(step.Name), Error: Text(step.Err), Attempts: uint32(step.Attempts),
				NextTry: timestamp(view.NextTry), Since: timestamp(step.OwedSince),
			})
		}
	}
	return s
}

// Leak is something that has leaked, in the words of the API.
func Leak(thing leaks.Thing) *podfsmv1.Leak {
	return &podfsmv1.Leak{SandboxId: thing.ID, Kind: string(thing.Kind), Name: thing.Name}
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
	s := &podfsmv1.Step{Name: string(step.Name), Status: string(step.Status), Error: Text(step.Err), Detail: detail(step.Result)}
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
		of := map[string]string{"snapshotter": r.Snapshotter, "strategy": r.Strategy, "parent": r.Parent}
		if r.Inodes > 0 {
			of["remapped"] = fmt.Sprintf("%d inodes, %d bytes, in %s", r.Inodes, r.Bytes, r.Took.Round(time.Millisecond))
		}
		return of
	case *Pause:
		return map[string]string{"pid": strconv.FormatUint(uint64(r.Pid), 10), "cgroup": r.CgroupPath}
	case *NetNS:
		return map[string]string{"path": r.Path, "inode": strconv.FormatUint(r.Inode, 10)}
	case *Network:
		of := map[string]string{"ips": strings.Join(append([]string{r.IP}, r.AdditionalIPs...), ",")}
		if len(r.Plugins) > 0 {
			of["plugins"] = pluginsOf(r)
		}
		return of
	default:
		return nil
	}
}

// pluginsOf says how long each plugin took, as "network/plugin=12ms", in the order of the chains.
func pluginsOf(r *Network) string {
	var times []string
	for _, p := range r.Plugins {
		times = append(times, fmt.Sprintf("%s/%s=%s", p.Network, p.Type, p.Took.Round(time.Microsecond)))
	}
	return strings.ToValidUTF8(strings.Join(times, ","), "\uFFFD")
}

// Text is an error as a message that protobuf takes: plugins write what they like.
func Text(err error) string {
	if err == nil {
		return ""
	}
	return strings.ToValidUTF8(err.Error(), "\uFFFD")
}

// NetworkOf is the network a sandbox is attached to, until it is known to be off it.
func NetworkOf(view lifecycle.View) (*Network, bool) {
	step := view.Step(states.AttachNetwork)
	attached, ok := step.Result.(*Network)
	return attached, ok && step.Status != lifecycle.StepUndone
}
