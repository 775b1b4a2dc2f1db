package plugin

import (
	"context"
	"encoding/json"
	"fmt"
	"path"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/containerd/containerd/api/types"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/protobuf"
	"github.com/containerd/errdefs"
	gocni "github.com/containerd/go-cni"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/netns"
	"github.com/podfsm/podfsm/show"
	"github.com/podfsm/podfsm/states"
)

// instance returns what containerd's service keeps of a started sandbox. The container record is
// pause's.
func instance(view lifecycle.View, container containers.Container) (sandbox.ControllerInstance, error) {
	started, ok := view.Step(StartPause).Result.(*Pause)
	if !ok {
		return sandbox.ControllerInstance{}, fmt.Errorf("no record of how sandbox %q was started: %w", view.Key.ID, errdefs.ErrDataLoss)
	}
	spec, err := specWithNetNS(view, container)
	if err != nil {
		return sandbox.ControllerInstance{}, err
	}
	packed, err := typeurl.MarshalAny(spec)
	if err != nil {
		return sandbox.ControllerInstance{}, fmt.Errorf("failed to pack the spec of sandbox %q: %w", view.Key.ID, err)
	}
	return sandbox.ControllerInstance{
		SandboxID: view.Key.ID,
		Pid:       started.Pid,
		CreatedAt: view.Created,
		Labels:    started.Labels,
		Spec:      packed,
	}, nil
}

// specWithNetNS returns pause's OCI spec with the path of its pinned network namespace, because NRI
// drops namespaces without a path.
func specWithNetNS(view lifecycle.View, container containers.Container) (*specs.Spec, error) {
	spec, err := specOf(container)
	if err != nil {
		return nil, err
	}
	pinned, ok := view.Step(CaptureNetNS).Result.(*NetNS)
	if ok && spec.Linux != nil {
		for i, namespace := range spec.Linux.Namespaces {
			if namespace.Type == specs.NetworkNamespace {
				spec.Linux.Namespaces[i].Path = pinned.Path
			}
		}
	}
	return spec, nil
}

// status returns the CRI status of a sandbox.
func status(ctx context.Context, n *node, view lifecycle.View, verbose bool) (sandbox.ControllerStatus, error) {
	s := sandbox.ControllerStatus{
		SandboxID: view.Key.ID,
		State:     runtime.PodSandboxState_SANDBOX_NOTREADY.String(),
		CreatedAt: view.Created,
	}
	if started, ok := view.Step(StartPause).Result.(*Pause); ok && view.Exit == nil {
		s.Pid = started.Pid
	}
	if view.State == states.Ready {
		s.State = runtime.PodSandboxState_SANDBOX_READY.String()
	}
	if view.Exit != nil {
		s.ExitedAt = view.Exit.At
	}
	if !verbose {
		return s, nil
	}
	info, err := verboseInfo(ctx, n, view, s.Pid)
	s.Info = info
	return s, err
}

// sandboxInfo has the fields of containerd's verbose sandbox info, which containerd decodes and
// encodes again. It would drop other fields, so podfsm's are under a key of their own.
type sandboxInfo struct {
	Pid            uint32                      `json:"pid"`
	Status         string                      `json:"processStatus"`
	NetNSClosed    bool                        `json:"netNamespaceClosed"`
	Image          string                      `json:"image"`
	SnapshotKey    string                      `json:"snapshotKey"`
	Snapshotter    string                      `json:"snapshotter"`
	RuntimeType    string                      `json:"runtimeType"`
	RuntimeOptions any                         `json:"runtimeOptions"`
	Config         *runtime.PodSandboxConfig   `json:"config"`
	RuntimeSpec    *specs.Spec                 `json:"runtimeSpec"`
	CNIResult      *gocni.Result               `json:"cniResult"`
	Metadata       *sandboxMetadata            `json:"sandboxMetadata"`
	Overhead       *runtime.ContainerResources `json:"overhead,omitempty"`
	Resources      *runtime.ContainerResources `json:"resources,omitempty"`
}

// ownInfo is the verbose info under podfsm's own key.
type ownInfo struct {
	State       states.State          `json:"state"`
	TraceID     string                `json:"traceID,omitempty"`
	Transitions []ownInfoTransition   `json:"transitions"`
	Steps       map[string]ownInfoRun `json:"steps"`
	// Unread lists what this release doesn't know in the sandbox's records.
	Unread []string `json:"unread,omitempty"`
}

type ownInfoTransition struct {
	At    time.Time    `json:"at"`
	Event states.Event `json:"event"`
	To    states.State `json:"to"`
	Error string       `json:"error,omitempty"`
}

type ownInfoRun struct {
	Status  lifecycle.StepStatus `json:"status"`
	Seconds float64              `json:"seconds"`
	Error   string               `json:"error,omitempty"`
}

// verboseInfo returns the maps of a verbose status: "info" as in containerd, and "podfsm".
func verboseInfo(ctx context.Context, n *node, view lifecycle.View, pid uint32) (map[string]string, error) {
	spec := view.Spec.(*Spec)
	info := sandboxInfo{
		Pid:         pid,
		Status:      "deleted", // containerd's status of a task that doesn't exist
		Config:      spec.Config,
		RuntimeType: spec.RuntimeType,
		Snapshotter: spec.Snapshotter,
		SnapshotKey: view.Key.ID,
		Metadata:    metadataOf(view),
	}
	var err error
	if info.Overhead, info.Resources, err = updatedResources(ctx, n.client, view.Key.ID); err != nil {
		return nil, err
	}
	if process, err := n.pauses.Process(holderID(view.Key)); err == nil && process.Alive() {
		info.Status = string(containerd.Running)
	}
	container, err := n.containers.Get(ctx, view.Key.ID)
	switch {
	case err == nil:
		info.Image = container.Image
		if info.RuntimeSpec, err = specWithNetNS(view, container); err != nil {
			return nil, err
		}
		if options := container.Runtime.Options; options != nil && options.GetValue() != nil {
			if info.RuntimeOptions, err = typeurl.UnmarshalAny(options); err != nil {
				return nil, fmt.Errorf("failed to read the runtime options of sandbox %q: %w", view.Key.ID, err)
			}
		}
	case !errdefs.IsNotFound(err):
		return nil, err
	}
	info.CNIResult = info.Metadata.Metadata.CNIResult
	if !spec.OnNodeNetwork() {
		path := n.netNSPath(view.Key.ID)
		if spec.NetNSPath != "" {
			path = spec.NetNSPath
		}
		pinned, err := netns.Inspect(path)
		if err != nil {
			return nil, err
		}
		info.NetNSClosed = !pinned.Pinned
	}
	return marshalEach(map[string]any{"info": info, Name: own(view)})
}

func own(view lifecycle.View) ownInfo {
	info := ownInfo{State: view.State, TraceID: view.TraceID, Unread: view.Unread, Steps: map[string]ownInfoRun{}}
	for _, t := range view.Transitions {
		info.Transitions = append(info.Transitions, ownInfoTransition{At: t.At.UTC(), Event: t.Event, To: t.To, Error: show.Text(t.Err)})
	}
	for _, step := range view.Steps {
		info.Steps[string(step.Name)] = ownInfoRun{Status: step.Status, Seconds: step.Duration.Seconds(), Error: show.Text(step.Err)}
	}
	return info
}

func marshalEach(values map[string]any) (map[string]string, error) {
	texts := make(map[string]string, len(values))
	for key, value := range values {
		text, err := json.Marshal(value)
		if err != nil {
			return nil, fmt.Errorf("failed to write the verbose %s: %w", key, err)
		}
		texts[key] = string(text)
	}
	return texts, nil
}

// podMetrics reads the pod's cgroup, which is above those of its containers.
func podMetrics(id, cgroupParent string) (*types.Metric, error) {
	if cgroupParent == "" {
		return nil, fmt.Errorf("sandbox %q has no cgroup parent to read metrics of: %w", id, errdefs.ErrFailedPrecondition)
	}
	read := func(path string) (any, error) { return cgroup1Metrics(cgroup1.StaticPath(path)) }
	if cgroups.Mode() == cgroups.Unified {
		read = cgroup2Metrics
	}
	return metricsBy(read, id, path.Join("/", cgroupParent)) // on cgroup v2, containerd's library requires a clean path
}

// metricsBy packs the metrics that read returns for a cgroup.
func metricsBy(read func(path string) (any, error), id, cgroupParent string) (*types.Metric, error) {
	data, err := read(cgroupParent)
	if err != nil {
		return nil, fmt.Errorf("failed to read cgroup %q of sandbox %q: %w", cgroupParent, id, err)
	}
	packed, err := typeurl.MarshalAnyToProto(data)
	if err != nil {
		return nil, fmt.Errorf("failed to pack the metrics of sandbox %q: %w", id, err)
	}
	return &types.Metric{Timestamp: protobuf.ToTimestamp(time.Now()), ID: id, Data: packed}, nil
}

func cgroup1Metrics(path cgroup1.Path) (any, error) {
	control, err := cgroup1.Load(path)
	if err != nil {
		return nil, err
	}
	return control.Stat(cgroup1.IgnoreNotExist)
}

func cgroup2Metrics(path string) (any, error) { return cgroup2MetricsBelow(cgroup2Root, path) }

// cgroup2Root is the mount point of the unified hierarchy.
const cgroup2Root = "/sys/fs/cgroup"

func cgroup2MetricsBelow(root, path string) (any, error) {
	manager, err := cgroup2.Load(path, cgroup2.WithMountpoint(root))
	if err != nil {
		return nil, err
	}
	return manager.StatFiltered(cgroup2.StatCPU | cgroup2.StatMemory)
}
