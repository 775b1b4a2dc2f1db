package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/records"
)

// CreateContainer has containerd's service create the container in its pod's user namespace, also where podfsm has chosen that and the
// caller doesn't know of it. What can't be is refused before anything is made.
func (s *service) CreateContainer(ctx context.Context, r *runtime.CreateContainerRequest) (*runtime.CreateContainerResponse, error) {
	id, pod, ok := s.resolve(ctx, r.GetPodSandboxId())
	if !ok {
		return s.RuntimeServiceServer.CreateContainer(ctx, r)
	}
	if pod.UserNS != nil {
		if err := mappable(r.GetConfig()); err != nil {
			return nil, fmt.Errorf("container %q can't be in pod %q, whose runtime handler maps every pod into a user namespace: %w",
				r.GetConfig().GetMetadata().GetName(), records.PodName(pod.Config), err)
		}
		r = inUserNS(r, pod.UserNS)
	}
	if err := s.checkVolumes(ctx, id, pod, r.GetConfig()); err != nil {
		return nil, err
	}
	release, err := s.sandboxes.PrepareContainer(ctx, id, r.GetConfig().GetImage().GetImage())
	defer release()
	if err != nil {
		return nil, fmt.Errorf("failed to prepare the root filesystem of container %q of pod %q: %w",
			r.GetConfig().GetMetadata().GetName(), records.PodName(pod.Config), err)
	}
	return s.RuntimeServiceServer.CreateContainer(ctx, r)
}

// mappable refuses a container that can't be in a user namespace that podfsm has chosen. All errors are InvalidArgument.
func mappable(config *runtime.ContainerConfig) error {
	const remedy = "give the pod a runtime handler that leaves it on the node's users"
	security := config.GetLinux().GetSecurityContext()
	if security.GetPrivileged() {
		return fmt.Errorf("it is privileged; %s: %w", remedy, errdefs.ErrInvalidArgument)
	}
	if asked := security.GetNamespaceOptions().GetUsernsOptions(); asked != nil && asked.GetMode() == runtime.NamespaceMode_POD {
		return fmt.Errorf("it asks for a user namespace that its pod didn't ask for: %w", errdefs.ErrInvalidArgument)
	}
	for _, m := range config.GetMounts() {
		if m.GetPropagation() == runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL {
			return fmt.Errorf("its mount %q is bidirectional; %s: %w", m.GetContainerPath(), remedy, errdefs.ErrInvalidArgument)
		}
		if len(m.GetUidMappings()) > 0 || len(m.GetGidMappings()) > 0 {
			return fmt.Errorf("its mount %q comes with an id mapping that its pod didn't ask for: %w", m.GetContainerPath(), errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// inUserNS is a copy of the request with the user namespace in it: in both configurations, for the root filesystem, and on each mount.
func inUserNS(r *runtime.CreateContainerRequest, users *runtime.UserNamespace) *runtime.CreateContainerRequest {
	r = proto.CloneOf(r)
	sandbox := ensure(&ensure(&ensure(&r.SandboxConfig).Linux).SecurityContext)
	ensure(&sandbox.NamespaceOptions).UsernsOptions = proto.CloneOf(users)
	container := ensure(&ensure(&ensure(&r.Config).Linux).SecurityContext)
	ensure(&container.NamespaceOptions).UsernsOptions = proto.CloneOf(users)
	for _, m := range r.Config.GetMounts() {
		of := proto.CloneOf(users)
		m.UidMappings, m.GidMappings = of.GetUids(), of.GetGids()
	}
	return r
}

// checkVolumes refuses a container with a volume that can't be shown under the pod's ids; the runtime would find out when half of the
// container is made. Images have no path on the host: the snapshotter maps them.
func (s *service) checkVolumes(ctx context.Context, id string, pod Pod, config *runtime.ContainerConfig) error {
	for _, m := range config.GetMounts() {
		if len(m.GetUidMappings()) == 0 || !filepath.IsAbs(m.GetHostPath()) {
			continue
		}
		if err := s.sandboxes.CheckVolume(ctx, id, m.GetHostPath()); err != nil {
			return fmt.Errorf("container %q of pod %q can't have its volume %q from %q: %w", config.GetMetadata().GetName(), records.PodName(pod.Config),
				m.GetContainerPath(), m.GetHostPath(), err)
		}
	}
	return nil
}

// ContainerStatus restores what the caller said of ids.
func (s *service) ContainerStatus(ctx context.Context, r *runtime.ContainerStatusRequest) (*runtime.ContainerStatusResponse, error) {
	resp, err := s.RuntimeServiceServer.ContainerStatus(ctx, r)
	if err != nil {
		return nil, err
	}
	if !showsMapping(resp) {
		return resp, nil
	}
	pod, ok := s.sandboxes.PodOfContainer(ctx, resp.GetStatus().GetId())
	if !ok || pod.UserNS == nil {
		return resp, nil
	}
	restoreMounts(resp.Status)
	if info, ok := resp.GetInfo()["info"]; ok {
		asked := pod.Config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
		if resp.Info["info"], err = restoreInfo(info, asked); err != nil {
			return nil, fmt.Errorf("failed to restore the verbose status of container %q: %w", resp.GetStatus().GetId(), err)
		}
	}
	return resp, nil
}

// showsMapping says whether an answer has what inUserNS adds to a request. Most have not, so nobody has to look for their pods.
func showsMapping(resp *runtime.ContainerStatusResponse) bool {
	_, verbose := resp.GetInfo()["info"]
	return verbose || slices.ContainsFunc(resp.GetStatus().GetMounts(), func(m *runtime.Mount) bool {
		return len(m.GetUidMappings()) > 0 || len(m.GetGidMappings()) > 0
	})
}

// restoreMounts takes off the mounts what inUserNS has put on them. The status shares them with containerd's own record.
func restoreMounts(status *runtime.ContainerStatus) {
	if len(status.GetMounts()) == 0 {
		return
	}
	status.Mounts = proto.CloneOf(&runtime.ContainerConfig{Mounts: status.GetMounts()}).GetMounts()
	for _, m := range status.Mounts {
		m.UidMappings, m.GidMappings = nil, nil
	}
}

// restoreInfo puts back what the caller asked for into a verbose status. The OCI spec in it stays: it says how the container runs.
func restoreInfo(info string, asked *runtime.UserNamespace) (string, error) {
	var fields map[string]json.RawMessage
	config := &runtime.ContainerConfig{}
	if err := json.Unmarshal([]byte(info), &fields); err != nil {
		return "", err
	}
	if err := json.Unmarshal(fields["config"], config); err != nil {
		return "", err
	}
	if options := config.GetLinux().GetSecurityContext().GetNamespaceOptions(); options != nil {
		options.UsernsOptions = asked
	}
	for _, m := range config.GetMounts() {
		if m != nil {
			m.UidMappings, m.GidMappings = nil, nil
		}
	}
	text, err := json.Marshal(config)
	if err != nil {
		return "", err
	}
	fields["config"] = text
	text, err = json.Marshal(fields)
	return string(text), err
}
