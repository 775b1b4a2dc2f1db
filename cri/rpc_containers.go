package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/ledger/records"
)

// CreateContainer has containerd's service create the container in its pod's user namespace, also if podfsm chose
// the namespace and the caller doesn't know it. It refuses what can't work before anything is made.
func (s *service) CreateContainer(ctx context.Context, r *runtime.CreateContainerRequest) (*runtime.CreateContainerResponse, error) {
	id, pod, ok := s.find(ctx, r.GetPodSandboxId())
	if !ok {
		return s.RuntimeServiceServer.CreateContainer(ctx, r)
	}
	if err := s.sandboxes.AdmitContainer(ctx, id, r.GetConfig()); err != nil {
		return nil, err
	}
	if pod.UserNS != nil {
		r = inUserNS(r, pod.UserNS)
	}
	release, err := s.sandboxes.PrepareContainer(ctx, id, r.GetConfig().GetImage().GetImage())
	defer release()
	if err != nil {
		return nil, fmt.Errorf("failed to prepare the root filesystem of container %q of pod %q: %w",
			r.GetConfig().GetMetadata().GetName(), records.PodName(pod.Config), err)
	}
	return s.RuntimeServiceServer.CreateContainer(ctx, r)
}

// inUserNS is a copy of the request with the user namespace in it: in the sandbox's and the container's
// configuration, and on each mount.
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

// ContainerStatus restores the id mappings that the caller sent.
func (s *service) ContainerStatus(ctx context.Context, r *runtime.ContainerStatusRequest) (*runtime.ContainerStatusResponse, error) {
	resp, err := s.RuntimeServiceServer.ContainerStatus(ctx, r)
	if err != nil {
		return nil, err
	}
	if !showsMapping(resp) {
		return resp, nil
	}
	pod, ok, err := s.sandboxes.SandboxOfContainer(ctx, resp.GetStatus().GetId())
	if err != nil {
		return nil, err
	}
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

// showsMapping says whether an answer has what inUserNS adds to a request. Most answers don't, which saves the
// lookup of the pod.
func showsMapping(resp *runtime.ContainerStatusResponse) bool {
	_, verbose := resp.GetInfo()["info"]
	return verbose || slices.ContainsFunc(resp.GetStatus().GetMounts(), func(m *runtime.Mount) bool {
		return len(m.GetUidMappings()) > 0 || len(m.GetGidMappings()) > 0
	})
}

// restoreMounts removes from the mounts what inUserNS added. The status shares the mounts with containerd's own
// record, so it gets copies.
func restoreMounts(status *runtime.ContainerStatus) {
	if len(status.GetMounts()) == 0 {
		return
	}
	status.Mounts = proto.CloneOf(&runtime.ContainerConfig{Mounts: status.GetMounts()}).GetMounts()
	for _, m := range status.Mounts {
		m.UidMappings, m.GidMappings = nil, nil
	}
}

// restoreInfo restores the configuration that the caller sent in a verbose status. The OCI spec in it stays: it
// says how the container runs.
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
