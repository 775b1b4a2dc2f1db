// Package pause makes what a pod sandbox is on the node: the files that its
// containers share, the pause process, which holds the pod's namespaces, and its
// record among containerd's containers. It also starts the pod's shim, which runs
// the containers.
//
// Pause is cloned by the daemon itself, in all of the pod's namespaces at once.
// podfsm-init sets it up from inside, and becomes the pause program of the image.
package pause

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	hostuserns "github.com/moby/sys/userns"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// sandboxOOMScoreAdj lets the kernel's OOM killer take pause last, because
	// with it the whole pod goes (kubernetes#47938).
	sandboxOOMScoreAdj = -998

	// sandboxCPUShares is the least weight the kernel knows: pause only sleeps.
	sandboxCPUShares = 2

	sysctlUnprivilegedPorts = "net.ipv4.ip_unprivileged_port_start"
	sysctlUnprivilegedICMP  = "net.ipv4.ping_group_range"
)

// Settings are the settings of containerd's CRI plugins that shape a sandbox, under
// their own names.
type Settings struct {
	Files Files

	EnableUnprivilegedPorts bool
	EnableUnprivilegedICMP  bool
	RestrictOOMScoreAdj     bool
	UnsetSeccompProfile     string
}

// Pod is what a pause container is made for.
type Pod struct {
	// ID is the sandbox's id, and that of its container.
	ID string

	// Config is what the pod's owner asked for. It is only read.
	Config *runtime.PodSandboxConfig

	// UIDs and GIDs map the pod's user namespace. Without them the pod stays in
	// the node's.
	UIDs, GIDs []specs.LinuxIDMapping

	// NetNSPath is the caller's network namespace. If it is empty, pause is started
	// in a new one, owned by the pod's user namespace.
	NetNSPath string

	// PodAnnotations are the patterns (path.Match) of the annotations that the
	// runtime handler passes on to the runtime of the pod's containers.
	PodAnnotations []string

	// ImageConfig is the configuration of the pause image.
	ImageConfig imagespec.ImageConfig

	// ImageRef is the pause image as the node's configuration names it.
	ImageRef string
}

// Spec is what the pause container is created from.
type Spec struct {
	// OCI is the runtime specification before Opts.
	OCI *specs.Spec

	// Opts complete OCI when the container is created: they read the rootfs of
	// the container.
	Opts []oci.SpecOpts

	// ProcessLabel is the SELinux label of the pod's processes, which its
	// containers share. A privileged pause runs without it. Empty without
	// SELinux.
	ProcessLabel string
}

// Spec builds the specification of a pause container. It makes nothing on the
// node and leaves the pod as it is; ctx carries the containerd namespace.
//
// With SELinux, a fresh label is reserved in this process. A caller that doesn't
// pass ProcessLabel on releases it with selinux.ReleaseLabel.
//
// A pod or an image that can't work is an InvalidArgument error.
func (s Settings) Spec(ctx context.Context, pod Pod) (*Spec, error) {
	spec, err := s.build(ctx, pod)
	if err != nil {
		return nil, fmt.Errorf("failed to build the pause spec of sandbox %q: %w", pod.ID, err)
	}
	return spec, nil
}

// CgroupPath returns the cgroup of a pause container as its specification names
// it: a path, or "slice:cri-containerd:id" for the systemd driver when the pod's
// cgroup parent is a slice. Without a parent it is containerd's default,
// "/namespace/id".
func CgroupPath(config *runtime.PodSandboxConfig, namespace, id string) string {
	parent := config.GetLinux().GetCgroupParent()
	if parent == "" {
		return path.Join("/", namespace, id)
	}
	if slice := path.Base(parent); strings.HasSuffix(slice, ".slice") {
		return slice + ":cri-containerd:" + id
	}
	return path.Join(parent, id)
}

func (s Settings) build(ctx context.Context, pod Pod) (*Spec, error) {
	if err := pod.validate(); err != nil {
		return nil, err
	}
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, err
	}
	score, err := s.oomScoreAdj()
	if err != nil {
		return nil, err
	}
	if err := checkSeccomp(pod.securityContext(), s.UnsetSeccompProfile); err != nil {
		return nil, err
	}
	user, err := userOpts(pod.securityContext(), pod.ImageConfig.User)
	if err != nil {
		return nil, err
	}
	spec, err := oci.GenerateSpec(ctx, nil, &containers.Container{ID: pod.ID}, slices.Concat(
		processOpts(pod.ImageConfig),
		namespaceOpts(pod),
		rootOpts(pod, s.Files),
		confineOpts(),
		[]oci.SpecOpts{
			oci.WithCgroup(CgroupPath(pod.Config, namespace, pod.ID)),
			oci.WithCPUShares(sandboxCPUShares),
			withOOMScoreAdj(score),
			withSysctls(s.sysctls(pod)),
			oci.WithAnnotations(annotations(pod)),
		},
	)...)
	if err != nil {
		return nil, err
	}
	// Last, because a failure after it would leave a label reserved.
	processLabel, err := setSELinuxLabels(spec, pod.securityContext())
	if err != nil {
		return nil, err
	}
	return &Spec{OCI: spec, Opts: user, ProcessLabel: processLabel}, nil
}

func (p Pod) validate() error {
	if err := validateID(p.ID); err != nil {
		return err
	}
	if len(p.ImageConfig.Entrypoint) == 0 && len(p.ImageConfig.Cmd) == 0 {
		return fmt.Errorf("the pause image %q has neither entrypoint nor command, configure another: %w", p.ImageRef, errdefs.ErrInvalidArgument)
	}
	if p.hasUserNS() && p.NetNSPath != "" {
		// Another user namespace owns it: sysfs could not be mounted, nor
		// could the pod configure its network.
		return fmt.Errorf("network namespace %q can't be used with a new user namespace, leave it out to have one made: %w", p.NetNSPath, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (p Pod) securityContext() *runtime.LinuxSandboxSecurityContext {
	return p.Config.GetLinux().GetSecurityContext()
}

func (p Pod) namespaceOptions() *runtime.NamespaceOption {
	return p.securityContext().GetNamespaceOptions()
}

func (p Pod) hasUserNS() bool {
	return len(p.UIDs) > 0 || len(p.GIDs) > 0
}

func (p Pod) hasHostNetwork() bool {
	return p.namespaceOptions().GetNetwork() == runtime.NamespaceMode_NODE
}

// maxHostname is the kernel's limit (sethostname(2), __NEW_UTS_LEN).
const maxHostname = 64

// CheckHostname refuses an invalid hostname before anything is made: InvalidArgument.
func CheckHostname(config *runtime.PodSandboxConfig) error {
	switch name := config.GetHostname(); {
	case name != "" && Pod{Config: config}.hasHostNetwork():
		return fmt.Errorf("%q would be the node's, whose network the pod shares; leave it out: %w", name, errdefs.ErrInvalidArgument)
	case len(name) > maxHostname:
		return fmt.Errorf("%q has %d bytes; choose one of at most %d: %w", name, len(name), maxHostname, errdefs.ErrInvalidArgument)
	default:
		return nil
	}
}

func processOpts(image imagespec.ImageConfig) []oci.SpecOpts {
	opts := []oci.SpecOpts{
		withoutRlimits,
		oci.WithEnv(image.Env),
		oci.WithProcessArgs(slices.Concat(image.Entrypoint, image.Cmd)...),
	}
	if image.WorkingDir != "" {
		opts = append(opts, oci.WithProcessCwd(image.WorkingDir))
	}
	return opts
}

func namespaceOpts(pod Pod) []oci.SpecOpts {
	var opts []oci.SpecOpts
	if pod.hasHostNetwork() {
		// The node's network goes with the node's name. Runtimes refuse a
		// hostname without a UTS namespace of the container's own.
		opts = append(opts,
			oci.WithHostNamespace(specs.NetworkNamespace),
			oci.WithHostNamespace(specs.UTSNamespace))
	} else {
		opts = append(opts,
			oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: pod.NetNSPath}),
			oci.WithHostname(pod.Config.GetHostname()))
	}
	if pod.namespaceOptions().GetPid() == runtime.NamespaceMode_NODE {
		opts = append(opts, oci.WithHostNamespace(specs.PIDNamespace))
	}
	if pod.namespaceOptions().GetIpc() == runtime.NamespaceMode_NODE {
		opts = append(opts, oci.WithHostNamespace(specs.IPCNamespace))
	}
	if pod.hasUserNS() {
		opts = append(opts, oci.WithUserNamespace(pod.UIDs, pod.GIDs))
	}
	return opts
}

// rootOpts make pause's root: read-only, with the pod's shm, and without any other filesystem of the host or the
// kernel. So no path needs a mask.
func rootOpts(pod Pod, files Files) []oci.SpecOpts {
	shm := files.shm(pod.ID)
	if pod.namespaceOptions().GetIpc() == runtime.NamespaceMode_NODE {
		shm = hostShm
	}
	mounts := []specs.Mount{
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "noexec", "nodev", "mode=755", "size=64k"}},
		bindMount(shm, "/dev/shm", "ro"),
	}
	return []oci.SpecOpts{
		oci.WithRootFSReadonly(),
		oci.WithMaskedPaths(nil),
		oci.WithReadonlyPaths(nil),
		func(_ context.Context, _ oci.Client, _ *containers.Container, spec *specs.Spec) error {
			spec.Mounts = mounts
			return nil
		},
	}
}

// confineOpts drop what pause doesn't need, whatever the pod's own settings: capabilities, and the system calls that
// [SeccompFilter] leaves out. There are no devices to allow or deny: every mount is nodev.
func confineOpts() []oci.SpecOpts {
	return []oci.SpecOpts{
		oci.WithCapabilities(nil),
		oci.WithNoNewPrivileges,
		seccomp.WithDefaultProfile(),
		func(_ context.Context, _ oci.Client, _ *containers.Container, spec *specs.Spec) error {
			spec.Linux.Resources.Devices = nil
			return nil
		},
	}
}

// bindMount sets nosuid, nodev and noexec because where the source's mount has
// them they are locked in a user namespace: a bind without them fails with EPERM
// (mount_namespaces(7)).
func bindMount(source, destination, readonly string) specs.Mount {
	return specs.Mount{
		Source:      source,
		Destination: destination,
		Type:        "bind",
		Options:     []string{"rbind", readonly, "nosuid", "nodev", "noexec"},
	}
}

// sysctls returns the pod's sysctls over the node's defaults.
func (s Settings) sysctls(pod Pod) map[string]string {
	sysctls := map[string]string{}
	if !pod.hasHostNetwork() {
		if s.EnableUnprivilegedPorts {
			sysctls[sysctlUnprivilegedPorts] = "0"
		}
		// The kernel takes mapped gids only (ipv4_ping_group_range), so the
		// range of all gids is an error in a user namespace.
		if s.EnableUnprivilegedICMP && !pod.hasUserNS() && !hostuserns.RunningInUserNS() {
			sysctls[sysctlUnprivilegedICMP] = "0 2147483647"
		}
	}
	maps.Copy(sysctls, pod.Config.GetLinux().GetSysctls())
	return sysctls
}

// oomScoreAdj returns pause's OOM score adjustment. It is the daemon's own value if
// that is higher and the daemon may not lower it, which takes CAP_SYS_RESOURCE
// (proc_pid_oom_score_adj(5)).
func (s Settings) oomScoreAdj() (int, error) {
	if !s.RestrictOOMScoreAdj {
		return sandboxOOMScoreAdj, nil
	}
	const file = "/proc/self/oom_score_adj"
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, fmt.Errorf("failed to read the daemon's OOM score adjustment: %w", err)
	}
	own, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0, fmt.Errorf("failed to parse %q: %w", file, err)
	}
	return max(own, sandboxOOMScoreAdj), nil
}

// withoutRlimits lets pause inherit the daemon's limits. oci.GenerateSpec sets
// one, which the pod's containers don't get either.
func withoutRlimits(_ context.Context, _ oci.Client, _ *containers.Container, spec *specs.Spec) error {
	spec.Process.Rlimits = nil
	return nil
}

func withOOMScoreAdj(score int) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, spec *specs.Spec) error {
		spec.Process.OOMScoreAdj = &score
		return nil
	}
}

func withSysctls(sysctls map[string]string) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, spec *specs.Spec) error {
		spec.Linux.Sysctl = sysctls
		return nil
	}
}
