package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// bootIDEnv is where TestDaemon finds the file that the boot id is read from.
const bootIDEnv = "PODFSM_BOOT_ID_FILE"

// Reboot does to the node what a reboot does to a machine, and leaves the daemon
// for Start: no process, mount, cgroup, link or iptables rule is left, and the
// boot id is a new one, which only TestDaemon sees. What was on disk stays, and
// the shims' sockets, in /run on a machine, don't; the state directory does if
// keepState, else it was on a tmpfs.
func (n *Node) Reboot(ctx context.Context, keepState bool) error {
	if err := n.Kill(ctx); err != nil {
		return err
	}
	if err := powerOff(ctx, n.dir); err != nil {
		return fmt.Errorf("failed to end all of node %q: %w", n.name, err)
	}
	if err := os.RemoveAll(n.path("s")); err != nil {
		return err
	}
	if !keepState {
		if err := errors.Join(os.RemoveAll(n.path("state")), os.Mkdir(n.path("state"), 0o711)); err != nil {
			return err
		}
	}
	return errors.Join(n.makeNetNS(), n.boot())
}

// boot gives the node a new boot id.
func (n *Node) boot() error {
	n.boots++
	return os.WriteFile(n.path("boot-id"), fmt.Appendf(nil, "boot-%d\n", n.boots), 0o644)
}
