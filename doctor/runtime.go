package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/opencontainers/runtime-spec/specs-go/features"
)

// pipeWait bounds the wait for processes that hold the runtime's pipes open after it has ended.
const pipeWait = time.Second

// runcVersion is the annotation with runc's version in its features.
const runcVersion = "org.opencontainers.runc.version"

// program is the shim and the runtime of a handler.
type program struct {
	shim, binary  string
	systemdCgroup bool
}

// runtimes checks the features of the OCI runtimes.
func runtimes(ctx context.Context, n Node) []Finding {
	if n.Config == nil {
		return n.unconfigured()
	}
	var found []Finding
	for _, g := range grouped(n.Config.Handlers, func(h Handler) program { return program{h.Shim, h.Binary, h.SystemdCgroup} }, equal) {
		f := g.of.finding(ctx, n)
		f.Subject, f.Handlers = g.subject(), g.handlers
		found = append(found, f)
	}
	return orNone(found)
}

// finding finds the programs and checks the runtime's features. While the daemon is down, its PATH
// is unknown.
func (p program) finding(ctx context.Context, n Node) Finding {
	down := n.Daemon == 0
	if err := n.findShim(p.shim); err != nil && !down {
		return fail(AllPods, err.Error(), "install the shim beside containerd or in its PATH")
	}
	if p.binary == "" {
		return unknown(fmt.Sprintf("the features of the runtime of %s are unknown", p.shim), "see the documentation of the runtime about user namespaces and idmapped mounts")
	}
	path, err := n.lookPath(p.binary)
	if err != nil && down && !filepath.IsAbs(p.binary) {
		return unknown(err.Error()+"; containerd's PATH is unknown while it is down", "start containerd")
	}
	if err != nil {
		return fail(AllPods, err.Error(), "install the runtime, or correct BinaryName in the handler's options")
	}
	have, err := readFeatures(ctx, path)
	if ctx.Err() != nil {
		return unknown(err.Error(), "find out why the runtime hangs")
	}
	if err != nil {
		return fail(UserNSPods, err.Error(), "install runc 1.2 or later, or another runtime that knows the command features")
	}
	if lacks := p.lacks(have); len(lacks) > 0 {
		return fail(UserNSPods, fmt.Sprintf("%s features: no %s", path, strings.Join(lacks, ", no ")), "install runc 1.2 or later, or another runtime with these features")
	}
	evidence := path + " has user namespaces and idmapped mounts"
	if version := have.Annotations[runcVersion]; version != "" {
		evidence = fmt.Sprintf("%s %s has user namespaces and idmapped mounts", path, version)
	}
	if p.systemdCgroup && !enabled(have.Linux.Cgroup, func(c *features.Cgroup) *bool { return c.Systemd }) {
		return warn(evidence+", but does not list the systemd cgroup driver", "install a runtime with that feature, or set SystemdCgroup = false")
	}
	if !enabled(have.Linux.Seccomp, func(s *features.Seccomp) *bool { return s.Enabled }) {
		return warn(evidence+", but no seccomp", "install a runtime that is built with seccomp: without it pods have no default profile")
	}
	return ok(evidence)
}

// lacks returns the features that a pod with a user namespace needs and the runtime doesn't list.
// By the same features, containerd reports user namespaces of a handler to the kubelet.
func (p program) lacks(have *features.Features) (lacks []string) {
	if have.Linux == nil {
		have.Linux = &features.Linux{}
	}
	for _, namespace := range []string{"user", "network"} {
		if !slices.Contains(have.Linux.Namespaces, namespace) {
			lacks = append(lacks, namespace+" namespaces")
		}
	}
	if extensions := have.Linux.MountExtensions; extensions == nil || !enabled(extensions.IDMap, func(m *features.IDMap) *bool { return m.Enabled }) {
		lacks = append(lacks, "idmapped mounts")
	}
	return lacks
}

func enabled[T any](feature *T, of func(*T) *bool) bool {
	return feature != nil && of(feature) != nil && *of(feature)
}

// readFeatures runs "RUNTIME features" (OCI runtime specification, features.md).
func readFeatures(ctx context.Context, path string) (*features.Features, error) {
	cmd := exec.CommandContext(ctx, path, "features")
	cmd.WaitDelay = pipeWait
	out, err := cmd.Output()
	if exit := new(exec.ExitError); errors.As(err, &exit) {
		return nil, fmt.Errorf("%s features: %w: %s", path, err, firstLine(exit.Stderr))
	}
	if err != nil {
		return nil, fmt.Errorf("%s features: %w", path, err)
	}
	have := &features.Features{}
	if err := json.Unmarshal(out, have); err != nil {
		return nil, fmt.Errorf("%s features: the output can't be read: %w", path, err)
	}
	return have, nil
}

func firstLine(text []byte) string {
	line, _, _ := strings.Cut(strings.TrimSpace(string(text)), "\n")
	return line
}

// findShim fails if containerd can't find the shim of a runtime: by its path, in PATH, or beside
// containerd.
func (n Node) findShim(runtime string) error {
	if filepath.IsAbs(runtime) {
		_, err := exec.LookPath(runtime)
		return err
	}
	name := shim.BinaryName(runtime)
	if name == "" {
		return fmt.Errorf("invalid runtime_type %q", runtime)
	}
	_, err := n.lookPath(name)
	if err == nil {
		return nil
	}
	if self, selfErr := os.Executable(); selfErr == nil {
		if _, beside := exec.LookPath(filepath.Join(filepath.Dir(self), name)); beside == nil {
			return nil
		}
	}
	return err
}
