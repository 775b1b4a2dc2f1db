package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	gocni "github.com/containerd/go-cni"
	"google.golang.org/protobuf/types/known/anypb"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/lifecycle"
)

// Extensions of a sandbox's record in which containerd's CRI service keeps its own data, as JSON.
const (
	metadataExtension  = "metadata"
	resourcesExtension = "updated-resources"
)

// sandboxMetadata is what containerd's CRI service keeps per sandbox and shows in its verbose
// status.
type sandboxMetadata struct {
	Version  string
	Metadata struct {
		ID             string
		Name           string
		Config         *runtime.PodSandboxConfig
		NetNSPath      string
		IP             string
		AdditionalIPs  []string
		RuntimeHandler string
		CNIResult      *gocni.Result
		ProcessLabel   string
	}
}

// metadataOf returns what containerd's service would keep of a sandbox if it had made the network
// itself. The service keeps the network after the sandbox has stopped.
func metadataOf(view lifecycle.View) *sandboxMetadata {
	spec := view.Spec.(*Spec)
	m := &sandboxMetadata{Version: "v1"}
	m.Metadata.ID, m.Metadata.Config, m.Metadata.RuntimeHandler = view.Key.ID, spec.Config, spec.Handler
	pod := spec.Config.GetMetadata()
	m.Metadata.Name = strings.Join([]string{pod.GetName(), pod.GetNamespace(), pod.GetUid(), strconv.FormatUint(uint64(pod.GetAttempt()), 10)}, "_")
	if captured, ok := view.Step(CaptureNetNS).Result.(*NetNS); ok {
		m.Metadata.NetNSPath = captured.Path
	}
	if attached, ok := view.Step(AttachNetwork).Result.(*Network); ok {
		m.Metadata.IP, m.Metadata.AdditionalIPs, m.Metadata.CNIResult = attached.IP, attached.AdditionalIPs, attached.Result
	}
	m.Metadata.ProcessLabel = processLabel(view)
	return m
}

// processLabel returns the SELinux label of pause, "" without SELinux.
func processLabel(view lifecycle.View) string {
	if started, ok := view.Step(StartPause).Result.(*Pause); ok {
		return started.ProcessLabel
	}
	return ""
}

// updatedResources returns what the last UpdatePodSandboxResources set, nil if there was no update.
func updatedResources(ctx context.Context, client *containerd.Client, id string) (overhead, resources *runtime.ContainerResources, _ error) {
	record, err := client.SandboxStore().Get(ctx, id)
	if errdefs.IsNotFound(err) {
		return nil, nil, nil // the caller doesn't use containerd's store
	}
	if err != nil {
		return nil, nil, fmt.Errorf("failed to get containerd's record of sandbox %q: %w", id, err)
	}
	extension, ok := record.Extensions[resourcesExtension]
	if !ok {
		return nil, nil, nil
	}
	var updated struct {
		Overhead, Resources *runtime.LinuxContainerResources
	}
	if err := json.Unmarshal(extension.GetValue(), &updated); err != nil {
		return nil, nil, fmt.Errorf("failed to read the updated resources of sandbox %q: %w", id, err)
	}
	if updated.Overhead != nil {
		overhead = &runtime.ContainerResources{Linux: updated.Overhead}
	}
	if updated.Resources != nil {
		resources = &runtime.ContainerResources{Linux: updated.Resources}
	}
	return overhead, resources, nil
}

// keepProcessLabel writes the SELinux label of pause into containerd's record. containerd's CRI
// service starts later, reads the label there, but writes it only for its own controller. Without
// the label, new containers could not share the pod's files.
func keepProcessLabel(ctx context.Context, client *containerd.Client, record sandbox.Sandbox, view lifecycle.View) error {
	label := processLabel(view)
	extension, ok := record.Extensions[metadataExtension]
	if label == "" || !ok {
		return nil
	}
	text, err := withProcessLabel(extension.GetValue(), label)
	if err != nil {
		return fmt.Errorf("failed to read containerd's metadata of sandbox %q: %w", record.ID, err)
	}
	if bytes.Equal(text, extension.GetValue()) {
		return nil
	}
	record.Extensions[metadataExtension] = &anypb.Any{TypeUrl: extension.GetTypeUrl(), Value: text}
	if _, err := client.SandboxStore().Update(ctx, record, "extensions"); err != nil {
		return fmt.Errorf("failed to update containerd's record of sandbox %q: %w", record.ID, err)
	}
	return nil
}

// withProcessLabel returns containerd's metadata of a sandbox with the label. It decodes maps, so
// that fields of a later containerd are kept.
func withProcessLabel(metadata []byte, label string) ([]byte, error) {
	var stored, fields map[string]json.RawMessage
	if err := json.Unmarshal(metadata, &stored); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(stored["Metadata"], &fields); err != nil {
		return nil, err
	}
	if fields == nil {
		return nil, fmt.Errorf("the field Metadata is null: %w", errdefs.ErrDataLoss)
	}
	quoted, err := json.Marshal(label)
	if err != nil || bytes.Equal(fields["ProcessLabel"], quoted) {
		return metadata, err
	}
	fields["ProcessLabel"] = quoted
	if stored["Metadata"], err = json.Marshal(fields); err != nil {
		return nil, err
	}
	return json.Marshal(stored)
}
