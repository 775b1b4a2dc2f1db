// Package show converts sandboxes, and what else operators see, to the types of the API. It finds the
// sandbox that an operator names. The daemon and the CLI, which reads a ledger without a daemon,
// show the same by it.
package show

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/userns"
)

// List returns the sandboxes as the API shows them, oldest first. If a sandbox is in views and in
// ended, because it was restored after its end, the view counts.
func List(views []lifecycle.View, ended ...*podfsmv1.InspectResponse) *podfsmv1.ListResponse {
	response := &podfsmv1.ListResponse{}
	there := map[ledger.Key]bool{}
	for _, view := range views {
		response.Sandboxes = append(response.Sandboxes, Sandbox(view))
		there[view.Key] = true
	}
	for _, one := range ended {
		if s := one.GetSandbox(); !there[ledger.Key{Namespace: s.GetContainerdNamespace(), ID: s.GetId()}] {
			response.Sandboxes = append(response.Sandboxes, s)
		}
	}
	slices.SortFunc(response.Sandboxes, func(x, y *podfsmv1.Sandbox) int {
		return cmp.Or(x.GetCreatedAt().AsTime().Compare(y.GetCreatedAt().AsTime()), cmp.Compare(x.GetId(), y.GetId()))
	})
	return response
}

// Inspection returns all details of a sandbox as the API shows them.
func Inspection(view lifecycle.View) (*podfsmv1.InspectResponse, error) {
	response := &podfsmv1.InspectResponse{Sandbox: Sandbox(view)}
	for _, step := range view.Steps {
		shown := stepOf(step)
		if step.Name == records.AllocateIDs && shown.Detail != nil {
			shown.Detail["because"] = usersBecause(view.Spec.(*records.Spec))
		}
		response.Steps = append(response.Steps, shown)
	}
	for _, t := range view.Transitions {
		response.Transitions = append(response.Transitions, transitionOf(t))
	}
	response.Tries = triesOf(view)
	if attached, ok := records.NetworkOf(view); ok {
		result, err := json.Marshal(attached.Result)
		if err != nil {
			return nil, fmt.Errorf("failed to write the CNI result of sandbox %q: %w", view.Key.ID, err)
		}
		response.CniResult = string(result)
	}
	return response, nil
}

// Sandbox returns a sandbox as the API shows it.
func Sandbox(view lifecycle.View) *podfsmv1.Sandbox {
	spec := view.Spec.(*records.Spec)
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
		Userns:              mappingOf(records.MappingsOf(view)),
		TraceId:             view.TraceID,
		Error:               Text(view.Err),
		FailedStep:          failedStep(view),
		Seq:                 lastSeq(view),
	}
	if started, _, ok := records.ResultOf[*records.Pause](view); ok && view.Exit == nil {
		s.Pid = started.Pid
	}
	if pinned, step, ok := records.ResultOf[*records.NetNS](view); ok && step.Status == lifecycle.StepDone {
		s.NetnsPath, s.NetnsInode = pinned.Path, pinned.Inode
	}
	if attached, ok := records.NetworkOf(view); ok {
		s.Ip, s.AdditionalIps = attached.IP, attached.AdditionalIPs
	}
	if step, ok := view.Current(); ok {
		s.Step = string(step.Name)
	}
	for _, step := range slices.Backward(view.Steps) {
		if step.Status == lifecycle.StepCleanupPending {
			s.PendingCleanups = append(s.PendingCleanups, &podfsmv1.PendingCleanup{
				Step: string(step.Name), Error: Text(step.Err), Tries: uint32(step.FailedTries),
				NextTry: timestamp(view.NextTry), Since: timestamp(step.PendingSince),
			})
		}
	}
	if len(s.PendingCleanups) == 0 && view.Pending() { // all undos succeeded, but the record of the end failed
		s.PendingCleanups = []*podfsmv1.PendingCleanup{{Error: Text(view.Err), NextTry: timestamp(view.NextTry), Since: timestamp(view.Since)}}
	}
	return s
}

// failedStep returns the step whose failure ended the sandbox's creation; "" for none.
func failedStep(view lifecycle.View) string {
	for _, t := range view.Transitions {
		if t.Event == states.RollBack && t.Err != nil {
			return string(t.Step)
		}
	}
	return ""
}

// Leak returns a leaked resource as the API shows it.
func Leak(thing leaks.Thing) *podfsmv1.Leak {
	return &podfsmv1.Leak{SandboxId: thing.ID, Kind: string(thing.Kind), Name: thing.Name}
}

// timestamp returns nil for the zero time.
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
	if step.Unknown {
		s.Detail = map[string]string{"unknown": fmt.Sprintf("recorded by podfsm %s, this release can't undo it", cmp.Or(step.Release, "of another release"))}
	}
	if !step.Started.IsZero() {
		s.StartedAt = timestamppb.New(step.Started)
	}
	if step.Duration > 0 {
		s.Duration = durationpb.New(step.Duration.Round(time.Microsecond))
	}
	return s
}

// usersBecause returns the reason for a pod's id mapping.
func usersBecause(spec *records.Spec) string {
	switch {
	case spec.Mapping != nil:
		return "the request has the mapping"
	case spec.Choose == userns.ModeAuto || spec.Choose == userns.ModeNode:
		return fmt.Sprintf("the runtime handler maps every pod, mode %q", spec.Choose)
	case spec.Kept != "":
		return fmt.Sprintf("%s, and its runtime handler leaves such pods on the node's users", spec.Kept)
	default:
		return "the request has no mapping"
	}
}

// detail returns a step's result as text.
func detail(result any) map[string]string {
	switch r := result.(type) {
	case *lifecycle.Skipped:
		return map[string]string{"skipped": r.Reason}
	case *userns.Mappings:
		return map[string]string{
			"uids": fmt.Sprintf("%d:%d:%d", r.UIDs.ContainerID, r.UIDs.HostID, r.UIDs.Length),
			"gids": fmt.Sprintf("%d:%d:%d", r.GIDs.ContainerID, r.GIDs.HostID, r.GIDs.Length),
		}
	case *records.Snapshot:
		of := map[string]string{"snapshotter": r.Snapshotter, "strategy": r.Strategy, "parent": r.Parent}
		if r.Inodes > 0 {
			of["remapped"] = fmt.Sprintf("%d inodes, %d bytes, in %s", r.Inodes, r.Bytes, r.Took.Round(time.Millisecond))
		}
		return of
	case *records.Pause:
		return map[string]string{"pid": strconv.FormatUint(uint64(r.Pid), 10), "cgroup": r.CgroupPath}
	case *records.NetNS:
		return map[string]string{"path": r.Path, "inode": strconv.FormatUint(r.Inode, 10)}
	case *records.Network:
		of := map[string]string{"ips": strings.Join(append([]string{r.IP}, r.AdditionalIPs...), ",")}
		if len(r.Plugins) > 0 {
			of["plugins"] = pluginsOf(r)
		}
		return of
	default:
		return nil
	}
}

// pluginsOf returns the duration of each plugin's ADD as "network/plugin=12ms", in the order of the
// chains.
func pluginsOf(r *records.Network) string {
	var times []string
	for _, p := range r.Plugins {
		times = append(times, fmt.Sprintf("%s/%s=%s", p.Network, p.Type, p.Took.Round(time.Microsecond)))
	}
	return strings.ToValidUTF8(strings.Join(times, ","), "\uFFFD")
}

// maxText bounds the text of an error in bytes: a plugin may write text of any length.
const maxText = 16 << 10

// Text returns an error's text as valid UTF-8, which protobuf requires, of bounded length.
func Text(err error) string {
	if err == nil {
		return ""
	}
	text := err.Error()
	if len(text) > maxText {
		text = fmt.Sprintf("%s… (%d bytes in all)", text[:maxText], len(text))
	}
	return strings.ToValidUTF8(text, "\uFFFD")
}

// lastSeq returns the number of a sandbox's last transition; 0 if it has none.
func lastSeq(view lifecycle.View) uint64 {
	if len(view.Transitions) == 0 {
		return 0
	}
	return view.Transitions[len(view.Transitions)-1].Seq
}
