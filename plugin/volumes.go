package plugin

import (
	"fmt"

	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/userns"
)

// CheckVolume fails when the node's files at path can't be shown in the sandbox under its own ids. A sandbox that has ended gets no
// answer: containerd's service will make nothing in it.
func (c *Controller) CheckVolume(id, path string) error {
	if c.engine == nil {
		return c.well()
	}
	view, err := c.engine.Get(inFront(id))
	if err != nil {
		return err
	}
	started, ok := view.Step(states.StartPause).Result.(*Pause)
	if !ok || view.Exit != nil || records.MappingsOf(view) == nil {
		return nil
	}
	if err := userns.CheckVolume(path, int(started.Pid)); err != nil {
		remedy := "run the pod with hostUsers: true"
		if chosenUserNS(view) != nil {
			remedy = "run the pod by a runtime handler that leaves it on the node's users"
		}
		return fmt.Errorf("%w; put the volume on a filesystem that can, such as ext4, xfs, btrfs or tmpfs, or %s", err, remedy)
	}
	return nil
}
