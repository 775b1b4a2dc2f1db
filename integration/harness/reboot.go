package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// bootIDEnv tells TestDaemon the file with the boot id.
const bootIDEnv = "PODFSM_BOOT_ID_FILE"

// Reboot simulates a reboot of the node, without starting the daemon. It removes all processes,
// mounts, cgroups, links and iptables rules, and changes the boot id, which only TestDaemon reads.
// Files stay, except for the sockets of shims, which are in /run on a machine. Without keepState,
// the state directory was a tmpfs and is removed, too.
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

// boot changes the boot id of the node.
func (n *Node) boot() error {
	n.boots++
	return os.WriteFile(n.path("boot-id"), fmt.Appendf(nil, "boot-%d\n", n.boots), 0o644)
}
