package plugin

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/singleflight"

	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/userns"
)

// CheckVolume fails when the node's files at path can't be shown in the sandbox under its own ids. A sandbox that has ended gets no
// answer: containerd's service will make nothing in it.
func (c *Controller) CheckVolume(ctx context.Context, id, path string) error {
	if c.engine == nil {
		return c.well()
	}
	view, err := c.engine.Get(inFront(id))
	if err != nil {
		return err
	}
	started, ok := view.Step(StartPause).Result.(*Pause)
	if !ok || view.Exit != nil || records.MappingsOf(view) == nil {
		return nil
	}
	err = c.looks.at(ctx, path, int(started.Pid))
	if unmappable := new(userns.UnmappableError); errors.As(err, &unmappable) {
		return fmt.Errorf("%w; %s", err, volumeRemedy(unmappable, chosenUserNS(view) != nil))
	}
	return err
}

// volumeRemedy is what to do about a volume that can't be mapped, in a pod whose ids the kubelet or podfsm has chosen.
func volumeRemedy(unmappable *userns.UnmappableError, chosen bool) string {
	hostUsers := "run the pod with hostUsers: true"
	if chosen {
		hostUsers = "run the pod by a runtime handler that leaves it on the node's users"
	}
	if unmappable.Filesystem == userns.Tmpfs && !unmappable.Mapped() {
		return "upgrade the node to Linux 6.3 or later, which maps the ids of tmpfs, or " + hostUsers
	}
	return "put the volume on a filesystem that can, such as ext4, xfs or btrfs, or " + hostUsers
}

// looks are those at volumes that are under way.
type looks struct{ group singleflight.Group }

// at is [userns.CheckVolume] that ends with ctx, also where a filesystem doesn't answer, such as one of a dead server. Nothing can end
// the look itself then, but the next one of the same pod at the same path joins it, so retries make no more of them.
func (l *looks) at(ctx context.Context, path string, pid int) error {
	done := l.group.DoChan(fmt.Sprint(pid, " ", path), func() (_ any, err error) {
		defer func() {
			if p := recover(); p != nil { // which would end the daemon
				err = fmt.Errorf("panic: %v: %w", p, errdefs.ErrInternal)
			}
		}()
		return nil, userns.CheckVolume(path, pid)
	})
	select {
	case answer := <-done:
		return answer.Err
	case <-ctx.Done():
		return fmt.Errorf("its filesystem doesn't answer: %w", ctx.Err())
	}
}
