package plugin

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux"

	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/netns"
	"github.com/podfsm/podfsm/pause"
	"github.com/podfsm/podfsm/states"
)

// startPause makes the sandbox's files and pause's record, and clones pause in all of the pod's namespaces.
type startPause struct{ *node }

var _ lifecycle.Ender = (*startPause)(nil)

// StartPause is the name of the step startPause.
const StartPause states.Event = "start_pause"

func (s *startPause) Declaration() lifecycle.Declaration {
	return s.bounded(lifecycle.Declaration{
		Step: states.Step{
			Name:    StartPause,
			Done:    "The pause process was started in its new namespaces.",
			State:   "PauseStarted",
			Meaning: "Its pause process runs in the pod's namespaces.",
		},
		Holds: []states.Event{AllocateIDs, RemapSnapshot},
	})
}

// Reserve returns the *Cgroup of pause, nil if it follows from the sandbox's id.
func (s *startPause) Reserve(_ context.Context, r *lifecycle.Run) (any, error) {
	cgroup, err := s.cgroup(r)
	if err != nil {
		return nil, err
	}
	if places := cgroup.Places(); places != nil {
		return &Cgroup{Places: places}, nil
	}
	return nil, nil
}

func (s *startPause) Do(ctx context.Context, r *lifecycle.Run) (any, error) {
	spec := r.Spec.(*Spec)
	if err := s.settings.Files.Setup(r.Key.ID, spec.Config); err != nil {
		return nil, err
	}
	result, request, err := s.describe(ctx, r)
	if err != nil {
		return nil, err
	}
	if err := s.run(ctx, r, request, result); err != nil {
		selinux.ReleaseLabel(result.ProcessLabel)
		return nil, err
	}
	s.tasks.created(ctx, r.Key, result.Pid)
	return result, nil
}

// run makes the container's record, starts pause, and completes result.
func (s *startPause) run(ctx context.Context, r *lifecycle.Run, request pause.CreateRequest, result *Pause) error {
	spec := r.Spec.(*Spec)
	cgroup, err := s.cgroup(r)
	if err != nil {
		return err
	}
	record, err := s.containers.Create(ctx, request)
	if err != nil {
		return err
	}
	oci, err := specOf(record)
	if err != nil {
		return err
	}
	mounts, err := s.snapshots.Mounts(ctx, spec.Snapshotter, r.Key.ID)
	if err != nil {
		return err
	}
	joined, err := joinedNetNS(spec.NetNSPath)
	if err != nil {
		return err
	}
	defer joined.Close()
	started, err := s.pauses.Start(ctx, pause.StartRequest{
		Key: holderID(r.Key), Spec: oci, Seccomp: s.seccomp, NetNS: joined, Cgroup: cgroup,
		Rootfs: func(userns *os.File) (*os.File, error) {
			return s.settings.Files.MountRootfs(r.Key.ID, mounts, oci.Linux.MountLabel, userns)
		},
	})
	if err != nil {
		return err
	}
	result.Pid, result.StartTime = uint32(started.Pid), started.StartTime
	return nil
}

// joinedNetNS opens the network namespace that the caller brings, nil if there is none.
func joinedNetNS(path string) (*os.File, error) {
	if path == "" {
		return nil, nil
	}
	handle, err := netns.Open(path)
	if err != nil {
		return nil, err
	}
	return handle.File(), nil
}

// specOf returns the OCI specification in a container's record.
func specOf(record containers.Container) (*specs.Spec, error) {
	spec := &specs.Spec{}
	if err := json.Unmarshal(record.Spec.GetValue(), spec); err != nil {
		return nil, fmt.Errorf("failed to read the specification of sandbox %q: %w", record.ID, err)
	}
	return spec, nil
}

// container returns the record of a sandbox's container, and the OCI specification in it.
func (n *node) container(ctx context.Context, id string) (containers.Container, *specs.Spec, error) {
	record, err := n.containers.Get(ctx, id)
	if err != nil {
		return containers.Container{}, nil, err
	}
	oci, err := specOf(record)
	return record, oci, err
}

// describe returns pause's container. It makes nothing.
func (s *startPause) describe(ctx context.Context, r *lifecycle.Run) (*Pause, pause.CreateRequest, error) {
	spec := r.Spec.(*Spec)
	image, err := s.client.GetImage(ctx, spec.Image)
	if err != nil {
		return nil, pause.CreateRequest{}, fmt.Errorf("failed to get the pause image %q: %w", spec.Image, err)
	}
	imageSpec, err := image.Spec(ctx)
	if err != nil {
		return nil, pause.CreateRequest{}, fmt.Errorf("failed to read the configuration of the pause image %q: %w", spec.Image, err)
	}
	uids, gids := mapping(r)
	oci, err := s.settings.Spec(ctx, pause.Pod{
		ID:             r.Key.ID,
		Config:         spec.Config,
		UIDs:           uids,
		GIDs:           gids,
		NetNSPath:      spec.NetNSPath,
		PodAnnotations: spec.PodAnnotations,
		ImageConfig:    imageSpec.Config,
		ImageRef:       s.stock.pauseImage(),
	})
	if err != nil {
		return nil, pause.CreateRequest{}, err
	}
	labels := pause.Labels(spec.Config.GetLabels(), imageSpec.Config.Labels)
	result := &Pause{
		CgroupPath:   cgroupPath(r),
		ProcessLabel: oci.ProcessLabel,
		Labels:       pause.InstanceLabels(labels, spec.RuntimeType, oci.ProcessLabel),
	}
	return result, pause.CreateRequest{
		ID:             r.Key.ID,
		Spec:           oci,
		Labels:         labels,
		ImageName:      image.Name(),
		Snapshotter:    spec.Snapshotter,
		SnapshotKey:    r.Key.ID,
		Runtime:        spec.RuntimeType,
		RuntimeOptions: spec.Options(),
	}, nil
}

// cgroupPath returns pause's cgroup as its OCI specification names it.
func cgroupPath(r *lifecycle.Run) string {
	return pause.CgroupPath(r.Spec.(*Spec).Config, r.Key.Namespace, r.Key.ID)
}

func (s *startPause) cgroup(r *lifecycle.Run) (*host.PodCgroup, error) {
	var places map[string]string
	if planned, ok := r.Plan().(*Cgroup); ok {
		places = planned.Places
	}
	return host.PodCgroupOf(cgroupPath(r), r.Spec.(*Spec).SystemdCgroup(), places)
}

// End kills pause and all processes in its cgroup. The container's record stays, because CRI shows
// it until the sandbox is removed. The network namespace has to outlive pause: CNI plugins look
// into it at DEL.
func (s *startPause) End(ctx context.Context, r *lifecycle.Run) (lifecycle.Exit, error) {
	if err := s.keepPinForDel(ctx, r); err != nil {
		return lifecycle.Exit{}, err
	}
	exit, err := s.pauses.End(ctx, holderID(r.Key))
	if err != nil {
		return lifecycle.Exit{}, err
	}
	if err := s.endCgroup(ctx, r); err != nil {
		return lifecycle.Exit{}, err
	}
	if err := s.settings.Files.UnmountShm(r.Key.ID); err != nil {
		return lifecycle.Exit{}, err
	}
	return lifecycle.Exit{Code: exit.Status, At: exit.At}, nil
}

// endCgroup kills the processes in pause's cgroup, even if the record of pause is lost.
func (s *startPause) endCgroup(ctx context.Context, r *lifecycle.Run) error {
	cgroup, err := s.leftCgroup(r)
	if err != nil || cgroup == nil {
		return err
	}
	return cgroup.End(ctx)
}

// leftCgroup returns the cgroup that Do may have made, even if the record of pause is lost; nil for
// an invalid cgroup parent, which never had a cgroup.
func (s *startPause) leftCgroup(r *lifecycle.Run) (*host.PodCgroup, error) {
	cgroup, err := s.cgroup(r)
	if _, planned := r.Plan().(*Cgroup); err == nil && !planned && cgroup.Places() != nil {
		cgroup, err = host.PodCgroupOf("/"+cgroupPath(r), false, nil) // earlier releases made the cgroup at the root of the hierarchy
	}
	if errdefs.IsInvalidArgument(err) {
		return nil, nil
	}
	return cgroup, err
}

func (s *startPause) Undo(ctx context.Context, r *lifecycle.Run) error {
	key := holderID(r.Key)
	if _, err := s.pauses.End(ctx, key); err != nil {
		return err
	}
	if err := s.endCgroup(ctx, r); err != nil {
		return err
	}
	s.pauses.Forget(key)
	if err := s.containers.Delete(ctx, r.Key.ID); err != nil {
		return err
	}
	if err := s.settings.Files.Remove(ctx, r.Key.ID); err != nil {
		return err
	}
	// The label of a sandbox that was ready is released by containerd's service.
	if started, ok := r.Result(StartPause).(*Pause); ok && r.Result(DeclareReady) == nil {
		selinux.ReleaseLabel(started.ProcessLabel)
	}
	return nil
}

// Exited adopts pause if the process with its recorded pid is the recorded one. Otherwise pause has
// exited.
func (s *startPause) Exited(ctx context.Context, r *lifecycle.Run) (*lifecycle.Exit, error) {
	started, ok := r.Result(StartPause).(*Pause)
	if !ok {
		return nil, fmt.Errorf("no record of how pause of sandbox %q was started: %w", r.Key.ID, errdefs.ErrDataLoss)
	}
	record := pause.Record{Pid: int(started.Pid), StartTime: started.StartTime}
	if captured, ok := r.Result(CaptureNetNS).(*NetNS); ok {
		record.NetNS = captured.Inode
	}
	lives, err := s.pauses.Adopt(ctx, holderID(r.Key), record)
	if err != nil || lives {
		return nil, err
	}
	return &lifecycle.Exit{Code: pause.UnknownStatus, At: time.Now()}, nil
}

// Find finds pause by its cgroup, and the rest of the result by the container's record.
func (s *startPause) Find(ctx context.Context, r *lifecycle.Run) (any, error) {
	record, oci, err := s.container(ctx, r.Key.ID)
	if err != nil {
		return nil, err
	}
	if err := s.mapsOf(r, oci); err != nil {
		return nil, err
	}
	cgroup, err := s.cgroup(r)
	if err != nil {
		return nil, asNotFound(err)
	}
	found, err := pause.Find(ctx, cgroup, oci)
	if err != nil {
		return nil, err
	}
	label := ""
	if oci.Process != nil {
		label = oci.Process.SelinuxLabel
	}
	return &Pause{
		Pid: uint32(found.Pid), StartTime: found.StartTime, CgroupPath: cgroupPath(r), ProcessLabel: label,
		Labels: pause.InstanceLabels(record.Labels, r.Spec.(*Spec).RuntimeType, label),
	}, nil
}

// mapsOf fails with NotFound if a container's specification has other ids than the pod was given.
func (s *startPause) mapsOf(r *lifecycle.Run, oci *specs.Spec) error {
	uids, gids := mapping(r)
	if oci.Linux == nil || !slices.Equal(oci.Linux.UIDMappings, uids) || !slices.Equal(oci.Linux.GIDMappings, gids) {
		return fmt.Errorf("the container of sandbox %q has other ids than the pod: %w", r.Key.ID, errdefs.ErrNotFound)
	}
	return nil
}

// Probe looks for what Undo removes.
func (s *startPause) Probe(ctx context.Context, r *lifecycle.Run) (bool, error) {
	cgroup, err := s.leftCgroup(r)
	if err != nil {
		return false, err
	}
	if cgroup != nil {
		if there, err := cgroup.Exists(); err != nil || there {
			return there, err
		}
	}
	if there, err := s.settings.Files.Exist(r.Key.ID); err != nil || there {
		return there, err
	}
	_, err = s.containers.Get(ctx, r.Key.ID)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}
