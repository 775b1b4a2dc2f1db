package plugin

import (
	"context"
	"fmt"
	"path"
	"strings"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/distribution/reference"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/doctor"
	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/pause"
	"github.com/podfsm/podfsm/userns"
)

// Ours says whether a runtime handler's pods are podfsm's.
func (c *Controller) Ours(name string) (bool, error) {
	if len(c.stock.Containerd.Runtimes) == 0 {
		return false, nil // containerd's configuration couldn't be read, so its own service decides
	}
	h, err := c.stock.handler(name)
	return h.Sandboxer == Name, err
}

// untrustedWorkload is an annotation of containerd's from before there were runtime handlers.
const untrustedWorkload = "io.kubernetes.cri.untrusted-workload"

// A pod is checked in these places:
//
//	what                                           Admit  Create  step
//	podfsm is neither degraded nor draining        yes    yes
//	no annotation makes containerd pick a handler  yes
//	the configuration: [Controller.specFor]        yes    yes
//	the cgroup parent: checkCgroup                 yes    yes
//	the node lacks nothing: node.lacks                            allocate_ids
//	the id mapping: admitIDs                       yes            allocate_ids
//	the CNI arguments, the networks                yes            attach_network
//
// Admit comes first: a request that can't work must make nothing, and must not supersede a creation that works.
// [Controller.Create] checks again. A caller of containerd's sandbox API doesn't pass Admit, a drain may have begun
// since, and only Create has containerd's record of the sandbox, whose runtime options name the cgroup driver. Ids and
// networks may change until their steps, so the steps have the last word. The handler is asked for twice as well:
// package cri's retries and front both serve the pods of other handlers, too.

// Admit refuses a pod before anything is made for it. Errors: InvalidArgument for a pod that can
// never run, FailedPrecondition if the node lacks something, Unavailable while podfsm takes no new
// pods.
func (c *Controller) Admit(ctx context.Context, handlerName string, config *runtime.PodSandboxConfig) error {
	if err := c.takesPods(); err != nil {
		return err
	}
	if config.GetAnnotations()[untrustedWorkload] == "true" {
		return fmt.Errorf("pod %q is annotated %s, for which containerd picks a handler of its own; name a handler instead: %w",
			records.PodName(config), untrustedWorkload, errdefs.ErrInvalidArgument)
	}
	spec, err := c.specFor(handlerName, config, sandbox.Sandbox{}, "")
	if err != nil {
		return err
	}
	handlerName = c.stock.handlerName(handlerName)
	if err := checkCgroup(spec, handlerName, c.stock.Containerd.Runtimes[handlerName].systemdCgroup()); err != nil {
		return err
	}
	if err := c.admitIDs(ctx, spec); err != nil {
		return fmt.Errorf("failed to allocate the ids of pod %q: %w", records.PodName(config), err)
	}
	if spec.OnNodeNetwork() {
		return nil
	}
	if _, _, err := cni.PodArgs("", spec.Config); err != nil {
		return fmt.Errorf("failed to pass pod %q to CNI plugins: %w", records.PodName(config), err)
	}
	if err := c.networkReady(ctx, spec); err != nil {
		return fmt.Errorf("network of pod %q is not ready: %w", records.PodName(config), err)
	}
	return nil
}

// takesPods fails with Unavailable while no new pod is taken.
func (c *Controller) takesPods() error {
	if err := c.degradedError(); err != nil {
		return err
	}
	if _, draining := c.drain.draining(); draining {
		return errDraining
	}
	return nil
}

// specForCreate returns the specification of a sandbox that Create is called for, by containerd's service or
// another caller.
func (c *Controller) specForCreate(ctx context.Context, info sandbox.Sandbox, opts []sandbox.CreateOpt) (*Spec, error) {
	var options sandbox.CreateOptions
	for _, opt := range opts {
		if err := opt(&options); err != nil {
			return nil, fmt.Errorf("failed to read the options of sandbox %q: %w", info.ID, err)
		}
	}
	config, handlerName, err := requested(ctx, info, options)
	if err != nil {
		return nil, err
	}
	spec, err := c.specFor(handlerName, config, info, options.NetNSPath)
	if err != nil {
		return nil, err
	}
	return spec, checkCgroup(spec, c.stock.handlerName(handlerName), spec.SystemdCgroup())
}

// requested returns the pod's own configuration and handler. The front passes both in the context;
// other callers put the configuration into the options.
func requested(ctx context.Context, info sandbox.Sandbox, options sandbox.CreateOptions) (*runtime.PodSandboxConfig, string, error) {
	if call := cri.FromContext(ctx); call != nil && call.Config != nil {
		return call.Config, call.Handler, nil
	}
	if options.Options == nil {
		return nil, "", fmt.Errorf("sandbox %q was created without a runtime.v1.PodSandboxConfig in its options: %w", info.ID, errdefs.ErrInvalidArgument)
	}
	config := &runtime.PodSandboxConfig{}
	if err := typeurl.UnmarshalTo(options.Options, config); err != nil {
		return nil, "", fmt.Errorf("the options of sandbox %q are not a runtime.v1.PodSandboxConfig: %w: %w", info.ID, err, errdefs.ErrInvalidArgument)
	}
	return config, "", nil
}

// specFor returns what a sandbox needs, with the policy that chooses its id mapping.
func (c *Controller) specFor(handlerName string, config *runtime.PodSandboxConfig, info sandbox.Sandbox, netNSPath string) (*Spec, error) {
	spec, err := newSpec(c.stock, handlerName, config, info, netNSPath)
	if err != nil {
		return nil, err
	}
	if spec.Mapping != nil {
		if err := spec.Mapping.CheckLowest(c.lowest); err != nil {
			return nil, fmt.Errorf("invalid user namespace of pod %q: %w", records.PodName(config), err)
		}
		if err := userns.CheckPod(config, *spec.Mapping); err != nil {
			return nil, fmt.Errorf("pod %q does not fit into its user namespace: %w", records.PodName(config), err)
		}
	}
	if spec.Choose, spec.Kept, err = c.policies.of(c.stock.handlerName(handlerName)).Choose(config); err != nil {
		return nil, fmt.Errorf("failed to give pod %q a user namespace: %w", records.PodName(config), err)
	}
	return spec, nil
}

// newSpec returns what a sandbox needs. It reads the caller's configuration, containerd's record of
// the sandbox and the handler's configuration.
func newSpec(stock *stockConfig, handlerName string, config *runtime.PodSandboxConfig, info sandbox.Sandbox, netNSPath string) (*Spec, error) {
	mapping, err := check(config)
	if err != nil {
		return nil, err
	}
	h := stock.Containerd.Runtimes[handlerName] // the zero handler for callers without CRI: they name no handler
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
	if err := pause.CheckHostname(config); err != nil {
		return nil, fmt.Errorf("invalid hostname of pod %q: %w", records.PodName(config), err)
	}
	if err := pause.CheckSysctls(config); err != nil {
		return nil, fmt.Errorf("invalid sysctl of pod %q: %w", records.PodName(config), err)
	}
	mapping, err := userns.FromCRI(namespaces.GetUsernsOptions())
	if err != nil {
		return nil, fmt.Errorf("invalid user namespace of pod %q: %w", records.PodName(config), err)
	}
	return mapping, nil
}

// runtimeOptions returns the runtime options in containerd's record of a sandbox, nil if there are
// none.
func runtimeOptions(info sandbox.Sandbox) *ledger.Data {
	options := info.Runtime.Options
	if options == nil || options.GetTypeUrl() == "" {
		return nil
	}
	return &ledger.Data{TypeURL: options.GetTypeUrl(), Value: options.GetValue()}
}

// checkCgroup refuses a pod whose cgroup parent the handler's cgroup driver can't use.
func checkCgroup(spec *Spec, handlerName string, systemd bool) error {
	parent := spec.Config.GetLinux().GetCgroupParent()
	if systemd && !strings.HasSuffix(path.Base(parent), ".slice") {
		return fmt.Errorf("pod %q has the cgroup parent %q, which is not a slice of systemd, but runtime handler %q has SystemdCgroup = true; set SystemdCgroup = false in the options of the handler, or cgroupDriver: systemd in the kubelet's configuration: %w",
			records.PodName(spec.Config), parent, handlerName, errdefs.ErrInvalidArgument)
	}
	anyID := strings.Repeat("0", 64)
	if _, err := host.PodCgroupOf(pause.CgroupPath(spec.Config, anyID, anyID), systemd, nil); err != nil {
		return fmt.Errorf("pod %q of runtime handler %q can't have the cgroup parent %q: %w", records.PodName(spec.Config), handlerName, parent, err)
	}
	return nil
}

// admitIDs fails if the sandbox would get no id mapping. It allocates nothing.
func (c *Controller) admitIDs(ctx context.Context, spec *Spec) error {
	h := holder(ledger.Key{}, spec)
	switch {
	case spec.Choose == userns.ModeNode:
		h = ofNode(h, *c.policies.of(c.stock.handlerName(spec.Handler)).NodeWide)
	case spec.Choose != userns.ModeAuto && spec.Mapping == nil:
		return nil
	}
	return c.node.ids.Check(ctx, h)
}

// lacks fails if the node lacks what a sandbox needs.
func (n *node) lacks(ctx context.Context, spec *Spec) error {
	if n.doctor == nil {
		return nil
	}
	return n.doctor.Admit(ctx, doctor.Need{
		Handler: n.stock.handlerName(spec.Handler),
		UserNS:  spec.Mapping != nil || spec.Choose == userns.ModeAuto || spec.Choose == userns.ModeNode,
		Network: spec.NetworkIsOurs(),
	})
}
