package plugin

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"golang.org/x/sync/singleflight"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/userns"
)

// AdmitContainer refuses a container that can't be in the user namespace of its sandbox, before anything of it is made: InvalidArgument
// for what it asks for, FailedPrecondition for a volume whose files can't be shown under the pod's ids. Of a sandbox that has ended
// it says nothing: containerd's service will make nothing in it.
func (c *Controller) AdmitContainer(ctx context.Context, id string, config *runtime.ContainerConfig) error {
	if c.engine == nil {
		return c.well()
	}
	view, err := c.engine.Get(inFront(id))
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
		return fmt.Errorf("failed to find out who %s runs as: %w", name, err)
	}
	if chosen { // whose devices are looked at
		if err := c.reachDevices(ctx, config.GetDevices()); err != nil {
			return fmt.Errorf("%s can't have its %w", name, err)
		}
	}
	container := userns.Container{Config: config, ImageUser: user, Length: mapped.UIDs.Length, Chosen: chosen}
	if err := container.Check(); err != nil {
		return fmt.Errorf("%s can't be in its pod's user namespace: %w", name, err)
	}
	for _, m := range config.GetMounts() {
		// Images have no path on the host: the snapshotter maps them.
		if (!chosen && len(m.GetUidMappings()) == 0) || !filepath.IsAbs(m.GetHostPath()) {
			continue
		}
		if err := c.checkVolume(ctx, m.GetHostPath(), int(started.Pid), chosen); err != nil {
			return fmt.Errorf("%s can't have its volume %q from %q: %w", name, m.GetContainerPath(), m.GetHostPath(), err)
		}
	}
	return nil
}

// reachDevices fails where a filesystem doesn't answer. It is left to containerd's service to say that a device isn't there.
func (c *Controller) reachDevices(ctx context.Context, devices []*runtime.Device) error {
	for _, d := range devices {
		err := c.looks.reach(ctx, d.GetHostPath())
		if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errdefs.IsUnavailable(err) {
			return fmt.Errorf("device %q: %w", d.GetHostPath(), err)
		}
	}
	return nil
}

// imageUser is the user that the image of a container names; "" where it names none, or the container one itself. It is left to
// containerd's service to say that the image isn't there.
func (n *node) imageUser(ctx context.Context, config *runtime.ContainerConfig) (string, error) {
	security := config.GetLinux().GetSecurityContext()
	if security.GetRunAsUser() != nil || security.GetRunAsUsername() != "" {
		return "", nil
	}
	name := config.GetImage().GetImage()
	image, err := n.client.GetImage(ctx, name)
	if full, parseErr := reference.ParseDockerRef(name); errdefs.IsNotFound(err) && parseErr == nil { // containerd keeps images by their full names
		image, err = n.client.GetImage(ctx, full.String())
	}
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

// checkVolume fails when the node's files at path can't be shown under the ids of a pod, whose pause is pid. What is mounted below path
// is the pod's own business where it has asked for a user namespace.
func (c *Controller) checkVolume(ctx context.Context, path string, pid int, chosen bool) error {
	err := c.looks.at(ctx, path, pid, chosen)
	unmappable := new(userns.UnmappableError)
	if !errors.As(err, &unmappable) {
		return err
	}
	return fmt.Errorf("%w; %s", err, volumeRemedy(unmappable, chosen))
}

// volumeRemedy is what to do about a volume that can't be mapped, in a pod whose ids the kubelet or podfsm has chosen.
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
	// mostLooks are under way at a time: each may keep a thread that nothing can end.
	mostLooks = 64
	// lookTimeout is how long a caller waits for one at most.
	lookTimeout = 30 * time.Second
)

// looks are those at volumes that are under way.
type looks struct {
	group    singleflight.Group
	underWay atomic.Int32
}

// at is [userns.CheckVolume] that ends with ctx, also where a filesystem doesn't answer, such as one of a dead server. The path is
// reached first, as that is where it hangs: by one look for all pods, so a pod that comes again and again makes no more of them.
func (l *looks) at(ctx context.Context, path string, pid int, below bool) error {
	if err := l.reach(ctx, path); err != nil {
		return err
	}
	return l.join(ctx, fmt.Sprint(pid, " ", below, " ", path), func() error { return userns.CheckVolume(path, pid, below) })
}

// reach is [userns.Reach] that ends with ctx.
func (l *looks) reach(ctx context.Context, path string) error {
	return l.join(ctx, path, func() error { return userns.Reach(path) })
}

// join waits for a look, which it begins unless the same is under way. Nothing can end a look whose filesystem doesn't answer. With
// mostLooks under way another one is Unavailable.
func (l *looks) join(ctx context.Context, key string, look func() error) error {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	done := l.group.DoChan(key, func() (any, error) {
		defer l.underWay.Add(-1)
		if l.underWay.Add(1) > mostLooks {
			return nil, fmt.Errorf("%d volumes are being looked at, whose filesystems may not answer; see to those: %w", mostLooks, errdefs.ErrUnavailable)
		}
		return nil, lifecycle.Protect(look) // singleflight has a panic end the daemon
	})
	select {
	case answer := <-done:
		return answer.Err
	case <-ctx.Done():
		return fmt.Errorf("its filesystem doesn't answer: %w", ctx.Err())
	}
}
