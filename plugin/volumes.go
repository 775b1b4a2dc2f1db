package plugin

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/userns"
)

// AdmitContainer refuses a container that can't run in the user namespace of its sandbox, before
// anything is made for it. Errors: InvalidArgument for what the container asks for,
// FailedPrecondition for a volume whose files can't be mapped to the pod's ids. For an ended
// sandbox it succeeds, since containerd's service refuses the container.
func (c *Controller) AdmitContainer(ctx context.Context, id string, config *runtime.ContainerConfig) error {
	if c.engine == nil {
		return c.degradedError()
	}
	view, err := c.engine.Get(criKey(id))
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	started, ok := view.Step(StartPause).Result.(*Pause)
	mapped, chosen := records.MappingsOf(view), chosenUserNS(view) != nil
	if !ok || view.Exit != nil || mapped == nil {
		return nil
	}
	name := fmt.Sprintf("container %q of pod %q", config.GetMetadata().GetName(), records.PodName(view.Spec.(*Spec).Config))
	user, err := c.node.imageUser(ctx, config)
	if err != nil {
		return fmt.Errorf("failed to find the user of %s: %w", name, err)
	}
	if chosen { // Check will examine the devices
		if err := c.reachDevices(ctx, config.GetDevices(), int(started.Pid)); err != nil {
			return fmt.Errorf("%s can't have its %w", name, err)
		}
	}
	container := userns.Container{Config: config, ImageUser: user, Mapped: *mapped, Chosen: chosen}
	if err := container.Check(); err != nil {
		return fmt.Errorf("%s can't be in its pod's user namespace: %w", name, err)
	}
	if err := c.checkVolumes(ctx, config.GetMounts(), int(started.Pid), chosen); err != nil {
		return fmt.Errorf("%s %w", name, err)
	}
	return nil
}

// reachDevices fails if the filesystem of a device doesn't respond, for the pod whose pause is pid.
// It ignores a missing device: containerd's service reports it.
func (c *Controller) reachDevices(ctx context.Context, devices []*runtime.Device, pid int) error {
	for _, d := range devices {
		for _, path := range []string{d.GetHostPath(), d.GetContainerPath()} { // the runtime bind-mounts both
			err := c.looks.reach(ctx, path, pid)
			if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errdefs.IsUnavailable(err) {
				return fmt.Errorf("device %q: %w", path, err)
			}
		}
	}
	return nil
}

// imageUser returns the user that the image of a container names. It returns "" if the container
// overrides the user, or the image is missing, which containerd's service reports.
func (n *node) imageUser(ctx context.Context, config *runtime.ContainerConfig) (string, error) {
	security := config.GetLinux().GetSecurityContext()
	if security.GetRunAsUser() != nil || security.GetRunAsUsername() != "" {
		return "", nil
	}
	image, err := n.image(ctx, config.GetImage().GetImage())
	if errdefs.IsNotFound(err) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	spec, err := image.Spec(ctx)
	if errdefs.IsNotFound(err) {
		return "", nil
	}
	return spec.Config.User, err
}

// image finds an image by its name or id, as containerd's CRI service does. Names are resolved to
// their full form.
func (n *node) image(ctx context.Context, name string) (containerd.Image, error) {
	if full, err := reference.ParseDockerRef(name); err == nil {
		image, err := n.client.GetImage(ctx, full.String())
		if !errdefs.IsNotFound(err) {
			return image, err
		}
	}
	return n.client.GetImage(ctx, name)
}

// checkVolumes fails if the files of a volume can't be mapped to the ids of the pod, whose pause is
// pid. The error completes "container …". Mounts below a volume are only checked if podfsm chose
// the user namespace: a pod that asked for one accepts how they look.
func (c *Controller) checkVolumes(ctx context.Context, mounts []*runtime.Mount, pid int, chosen bool) error {
	var paths []string
	for _, m := range mounts {
		// Images have no path on the host: the snapshotter maps them.
		if (!chosen && len(m.GetUidMappings()) == 0) || !filepath.IsAbs(m.GetHostPath()) {
			continue
		}
		if err := c.looks.at(ctx, m.GetHostPath(), pid); err != nil {
			return volumeError(m, err, chosen)
		}
		paths = append(paths, m.GetHostPath())
	}
	if !chosen {
		return nil
	}
	err := c.looks.below(ctx, paths, pid)
	if err == nil {
		return nil
	}
	unmappable := new(userns.UnmappableError)
	if !errors.As(err, &unmappable) {
		return fmt.Errorf("can't have its volumes: %w", err)
	}
	of := slices.IndexFunc(mounts, func(m *runtime.Mount) bool { return m.GetHostPath() == unmappable.Volume })
	return volumeError(mounts[of], err, chosen)
}

// volumeError names the volume that can't be used, the reason and the remedy.
func volumeError(m *runtime.Mount, err error, chosen bool) error {
	err = fmt.Errorf("can't have its volume %q from %q: %w", m.GetContainerPath(), m.GetHostPath(), err)
	if unmappable := new(userns.UnmappableError); errors.As(err, &unmappable) {
		return fmt.Errorf("%w; %s", err, volumeRemedy(unmappable, chosen))
	}
	return err
}

// volumeRemedy returns the remedy for a volume that can't be mapped, by whether podfsm or the
// kubelet chose the ids.
func volumeRemedy(unmappable *userns.UnmappableError, chosen bool) string {
	hostUsers := "run the pod with hostUsers: true"
	if chosen {
		hostUsers = "run the pod by a runtime handler that leaves it on the node's users"
	}
	switch {
	case unmappable.Below != "":
		return "give the container volumes that have no mount below them, or " + hostUsers
	case unmappable.Filesystem == userns.Tmpfs && !unmappable.Mapped():
		return "upgrade the node to Linux 6.3 or later, which maps the ids of tmpfs, or " + hostUsers
	default:
		return "put the volume on a filesystem that can, such as ext4, xfs or btrfs, or " + hostUsers
	}
}

const (
	// maxLooksOfPod bounds the looks under way that a pod has started, so that its dead filesystems
	// hold up no other pod.
	maxLooksOfPod = 4
	// maxLooks bounds the looks under way: each may keep a thread that can't be ended. 256 pods
	// don't reach it.
	maxLooks = 256 * maxLooksOfPod
	// lookTimeout is how long a caller waits for a look.
	lookTimeout = 30 * time.Second
)

// looks are the looks at volumes under way.
type looks struct {
	mu       sync.Mutex
	underWay map[string]*look
	ofPod    map[int]int // the number of looks that a pod has started, by the pid of its pause
}

// look is one look at a volume.
type look struct {
	done chan struct{} // closed once err is set
	err  error
}

// at is [userns.CheckVolume] bounded by ctx, even if the filesystem doesn't respond, such as one of
// a dead server. It reaches the path first, because that is what hangs. Pods share the looks at a
// path, so retries of a pod don't add threads.
func (l *looks) at(ctx context.Context, path string, pid int) error {
	if err := l.reach(ctx, path, pid); err != nil {
		return err
	}
	return l.join(ctx, pid, fmt.Sprint(pid, " ", path), func() error { return userns.CheckVolume(path, pid) })
}

// below is [userns.CheckBelow] bounded by ctx, for volumes of the pod whose pause is pid.
func (l *looks) below(ctx context.Context, paths []string, pid int) error {
	return l.join(ctx, pid, fmt.Sprintf("%d %q", pid, paths), func() error { return userns.CheckBelow(paths) })
}

// reach is [userns.Reach] bounded by ctx, for the pod whose pause is pid.
func (l *looks) reach(ctx context.Context, path string, pid int) error {
	return l.join(ctx, pid, path, func() error { return userns.Reach(path) })
}

// join waits for a look, and starts it for a pod unless the same one is under way. A look whose
// filesystem doesn't respond can't be ended. If too many are under way, join fails with Unavailable.
func (l *looks) join(ctx context.Context, pid int, key string, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	look, err := l.start(pid, key, f)
	if err != nil {
		return err
	}
	select {
	case <-look.done:
		return look.err
	case <-ctx.Done():
		return fmt.Errorf("the filesystem does not respond: %w", ctx.Err())
	}
}

// start starts a look, or returns the same one that is under way.
func (l *looks) start(pid int, key string, f func() error) (*look, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if same, ok := l.underWay[key]; ok {
		return same, nil
	}
	switch {
	case l.ofPod[pid] >= maxLooksOfPod:
		return nil, tooManyLooks(maxLooksOfPod, "pod")
	case len(l.underWay) >= maxLooks:
		return nil, tooManyLooks(maxLooks, "node")
	}
	if l.underWay == nil {
		l.underWay, l.ofPod = map[string]*look{}, map[int]int{}
	}
	started := &look{done: make(chan struct{})}
	l.underWay[key] = started
	l.ofPod[pid]++
	go func() {
		started.err = lifecycle.Protect(f) // a panic would end the daemon
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.underWay, key)
		if l.ofPod[pid]--; l.ofPod[pid] == 0 {
			delete(l.ofPod, pid)
		}
		close(started.done)
	}()
	return started, nil
}

func tooManyLooks(n int, of string) error {
	return fmt.Errorf("%d volumes of the %s are being checked, and their filesystems may not respond; check the mounts of the node: %w", n, of, errdefs.ErrUnavailable)
}
