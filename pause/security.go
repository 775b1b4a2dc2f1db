package pause

import (
	"context"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	kernelseccomp "github.com/containerd/containerd/v2/pkg/seccomp"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux/label"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxID is the greatest uid and gid that runc takes.
const maxID = math.MaxInt32

// localhostProfile begins the name of a seccomp profile that is a file on the
// node.
const localhostProfile = "localhost/"

// selinuxLevel is a sensitivity or a range of them, then optionally categories,
// each a single one or a range: "s0", "s0-s1:c1.c3,c7".
var selinuxLevel = func() *regexp.Regexp {
	const category = `c\d{1,4}(?:\.c\d{1,4})?`
	return regexp.MustCompile(`^s\d(?:-s\d)?(?::` + category + `(?:,` + category + `)*)?$`)
}()

// checkSeccomp refuses an invalid seccomp profile, of the security context or the node's for pods without one. The
// profile is for the containers. Pause always runs under [SeccompFilter].
func checkSeccomp(security *runtime.LinuxSandboxSecurityContext, unset string) error {
	profile, err := seccompProfile(security, unset)
	if err != nil || profile == nil || security.GetPrivileged() {
		return err
	}
	kind, file := profile.GetProfileType(), profile.GetLocalhostRef()
	switch {
	case kind != runtime.SecurityProfile_Localhost && file != "":
		return fmt.Errorf("seccomp profile type %s takes no file, got %q: %w", kind, file, errdefs.ErrInvalidArgument)
	case runtime.SecurityProfile_ProfileType_name[int32(kind)] == "":
		return fmt.Errorf("unknown seccomp profile type %s: %w", kind, errdefs.ErrInvalidArgument)
	case kind != runtime.SecurityProfile_Unconfined && !kernelseccomp.IsEnabled():
		return fmt.Errorf("seccomp profile type %s needs a kernel with CONFIG_SECCOMP_FILTER: %w", kind, errdefs.ErrFailedPrecondition)
	default:
		return nil
	}
}

// seccompProfile returns nil if neither the pod nor the node names a profile.
func seccompProfile(security *runtime.LinuxSandboxSecurityContext, unset string) (*runtime.SecurityProfile, error) {
	if profile := security.GetSeccomp(); profile != nil {
		return profile, nil
	}
	//lint:ignore SA1019 older clients send nothing else
	name := security.GetSeccompProfilePath()
	if name == "" {
		name = unset
	}
	switch name {
	case "":
		return nil, nil
	case "unconfined":
		return &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}, nil
	case "runtime/default", "docker/default":
		return &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault}, nil
	}
	file, ok := strings.CutPrefix(name, localhostProfile)
	if !ok {
		return nil, fmt.Errorf("seccomp profile %q is none of unconfined, runtime/default and localhost/<file>: %w", name, errdefs.ErrInvalidArgument)
	}
	return &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: file}, nil
}

// userOpts run pause as the user and group of its security context, else as the
// image's user, with the pod's supplemental groups.
func userOpts(security *runtime.LinuxSandboxSecurityContext, imageUser string) ([]oci.SpecOpts, error) {
	uid, gid := security.GetRunAsUser(), security.GetRunAsGroup()
	if uid == nil && gid != nil {
		return nil, fmt.Errorf("group %d can't be set without a user: %w", gid.GetValue(), errdefs.ErrInvalidArgument)
	}
	groups := security.GetSupplementalGroups()
	for _, id := range append([]int64{uid.GetValue(), gid.GetValue()}, groups...) {
		if id < 0 || id > maxID {
			return nil, fmt.Errorf("user or group id %d is out of the range 0 to %d: %w", id, maxID, errdefs.ErrInvalidArgument)
		}
	}
	user := imageUser
	if uid != nil {
		user = fmt.Sprint(uid.GetValue())
	}
	if gid != nil {
		user = fmt.Sprintf("%s:%d", user, gid.GetValue())
	}
	var opts []oci.SpecOpts
	if user != "" {
		opts = append(opts, oci.WithUser(user))
	}
	// After the user, which resets them.
	return append(opts, withSupplementalGroups(groups)), nil
}

func withSupplementalGroups(groups []int64) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, spec *specs.Spec) error {
		gids := spec.Process.User.AdditionalGids
		for _, group := range groups {
			gids = append(gids, uint32(group))
		}
		slices.Sort(gids)
		spec.Process.User.AdditionalGids = slices.Compact(gids)
		return nil
	}
}

// setSELinuxLabels labels the mounts, and the process unless it is privileged,
// and returns the process label of the pod. Without SELinux all are empty.
func setSELinuxLabels(spec *specs.Spec, security *runtime.LinuxSandboxSecurityContext) (string, error) {
	options, err := selinuxOptions(security.GetSelinuxOptions())
	if err != nil {
		return "", err
	}
	processLabel, mountLabel, err := label.InitLabels(options)
	if err != nil {
		return "", fmt.Errorf("failed to make SELinux labels from %q: %w", options, err)
	}
	spec.Linux.MountLabel = mountLabel
	for i := range spec.Mounts {
		if m := &spec.Mounts[i]; m.Type == "tmpfs" && mountLabel != "" {
			m.Options = append(m.Options, label.FormatMountLabel("", mountLabel))
		}
	}
	if !security.GetPrivileged() {
		spec.Process.SelinuxLabel = processLabel
	}
	return processLabel, nil
}

func selinuxOptions(selinux *runtime.SELinuxOption) ([]string, error) {
	level := selinux.GetLevel()
	if level != "" && !selinuxLevel.MatchString(level) {
		return nil, fmt.Errorf("SELinux level %q is not of the form s0:c1,c2: %w", level, errdefs.ErrInvalidArgument)
	}
	var options []string
	for _, option := range []struct{ name, value string }{
		{"user", selinux.GetUser()},
		{"role", selinux.GetRole()},
		{"type", selinux.GetType()},
		{"level", level},
	} {
		if option.value != "" {
			options = append(options, option.name+":"+option.value)
		}
	}
	return options, nil
}
