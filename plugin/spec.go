package plugin

import (
	"fmt"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/pause"
	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/userns"
)

// check refuses a pod that can never run, before anything is made. All errors are InvalidArgument.
func check(config *runtime.PodSandboxConfig) (*userns.Mappings, error) {
	if config.GetMetadata() == nil {
		return nil, fmt.Errorf("the pod's configuration has no metadata: %w", errdefs.ErrInvalidArgument)
	}
	namespaces := config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	for _, namespace := range []struct {
		name string
		mode runtime.NamespaceMode
	}{
		{"network", namespaces.GetNetwork()},
		{"ipc", namespaces.GetIpc()},
	} {
		if namespace.mode != runtime.NamespaceMode_POD && namespace.mode != runtime.NamespaceMode_NODE {
			return nil, fmt.Errorf("pod %q asks for the %s namespace mode %s; a sandbox has POD or NODE: %w", records.PodName(config), namespace.name, namespace.mode, errdefs.ErrInvalidArgument)
		}
	}
	if mode := namespaces.GetPid(); mode == runtime.NamespaceMode_TARGET {
		return nil, fmt.Errorf("pod %q asks for the pid namespace mode %s; a sandbox has POD, CONTAINER or NODE: %w", records.PodName(config), mode, errdefs.ErrInvalidArgument)
	}
	if err := pause.CheckSysctls(config); err != nil {
		return nil, fmt.Errorf("pod %q has a sysctl that can't be set: %w", records.PodName(config), err)
	}
	mapping, err := userns.FromCRI(namespaces.GetUsernsOptions())
	if err != nil {
		return nil, fmt.Errorf("pod %q asks for a user namespace that can't be: %w", records.PodName(config), err)
	}
	return mapping, nil
}

// newSpec puts together what a sandbox needs from the caller's configuration, containerd's record of the sandbox and the
// handler's configuration.
func newSpec(stock *stockConfig, handlerName string, config *runtime.PodSandboxConfig, info sandbox.Sandbox, netNSPath string) (*Spec, error) {
	mapping, err := check(config)
	if err != nil {
		return nil, err
	}
	h := stock.Containerd.Runtimes[handlerName] // the zero handler for callers without CRI, who name none
	if handlerName == "" {
		h = stock.Containerd.Runtimes[stock.Containerd.DefaultRuntimeName]
	}
	if h.Sandboxer != Name {
		h = handler{}
	}
	image, err := reference.ParseDockerRef(stock.pauseImage()) // containerd keeps images by their full names
	if err != nil {
		return nil, fmt.Errorf("containerd's CRI configuration pins %q as pause image; set pinned_images.sandbox to one: %w: %w", stock.pauseImage(), err, errdefs.ErrFailedPrecondition)
	}
	spec := &Spec{
		Config:         config,
		Handler:        handlerName,
		Mapping:        mapping,
		NetNSPath:      netNSPath,
		RuntimeType:    info.Runtime.Name,
		RuntimePath:    h.Path,
		PodAnnotations: h.PodAnnotations,
		Snapshotter:    stock.snapshotter(h),
		Image:          image.String(),
	}
	spec.RuntimeOptions = runtimeOptions(info)
	return spec, nil
}

// runtimeOptions are those of containerd's record of a sandbox; nil for none.
func runtimeOptions(info sandbox.Sandbox) *journal.Data {
	options := info.Runtime.Options
	if options == nil || options.GetTypeUrl() == "" {
		return nil
	}
	return &journal.Data{TypeURL: options.GetTypeUrl(), Value: options.GetValue()}
}
