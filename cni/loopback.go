package cni

import (
	"fmt"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
)

// BringUpLoopback sets the loopback interface of a network namespace up, what the loopback plugin does but without a process. It
// is idempotent.
func BringUpLoopback(netnsPath string) error {
	err := ns.WithNetNSPath(netnsPath, func(ns.NetNS) error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	if err != nil {
		return fmt.Errorf("failed to set the loopback of network namespace %q up: %w", netnsPath, err)
	}
	return nil
}
