package cni

import (
	"fmt"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
)

// BringUpLoopback brings the loopback interface of a network namespace up, like the loopback plugin
// but without a process. It is idempotent.
func BringUpLoopback(netnsPath string) error {
	err := ns.WithNetNSPath(netnsPath, func(ns.NetNS) error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	if err != nil {
		return fmt.Errorf("failed to bring up the loopback interface of network namespace %q: %w", netnsPath, err)
	}
	return nil
}
