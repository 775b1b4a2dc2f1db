package cni

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/tracing"
)

// masquerades reports whether the plugin removes masquerade rules at DEL for the addresses that it
// finds on the pod's interface. If it finds none, it leaves the rules forever and succeeds.
func (c call) masquerades() bool {
	return c.state().Type == "bridge" || c.state().Type == "ptp"
}

// restore gives the pod's interface the addresses of ADD again, for the DEL of a plugin that
// masquerades. They are missing after a DEL that removed the interface and then failed or was
// killed, without the pod's namespace, and if the pod has removed them. DEL runs even if restore
// fails: the pod may have put anything into its namespace.
func (c call) restore(ctx context.Context) {
	if c.netns == "" || c.state().Result == nil {
		return
	}
	ifName := c.attachment.Networks[c.network].IfName
	result, err := c.state().result()
	if err == nil {
		var addresses []*net.IPNet
		for _, ip := range result.IPs { // all are the interface's
			if ip != nil {
				addresses = append(addresses, &ip.Address)
			}
		}
		err = restoreAddresses(c.netns, ifName, addresses)
	}
	if err != nil {
		tracing.Log(ctx).WithError(err).Warnf("failed to restore the addresses of interface %q, DEL of CNI plugin %q may leave masquerade rules", ifName, c.state().Type)
	}
}

// restoreAddresses adds missing addresses to an interface. If the interface is missing or does not
// take them, as with disable_ipv6 or an MTU below IPv6's, restoreAddresses replaces it with a new
// one: DEL removes the interface anyway.
func restoreAddresses(netnsPath, ifName string, addresses []*net.IPNet) error {
	return ns.WithNetNSPath(netnsPath, func(ns.NetNS) error {
		link, err := netlink.LinkByName(ifName)
		if err == nil {
			if addAddresses(link, addresses) == nil {
				return nil
			}
			if err := netlink.LinkDel(link); err != nil {
				return fmt.Errorf("failed to delete interface %q: %w", ifName, err)
			}
		}
		// The kernel numbers the peer, so the peer's name is free.
		link = &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: ifName}, PeerName: "veth%d"}
		if err := netlink.LinkAdd(link); err != nil {
			return fmt.Errorf("failed to add interface %q: %w", ifName, err)
		}
		if slices.ContainsFunc(addresses, func(a *net.IPNet) bool { return isIPv6(a.IP) }) {
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+ifName+"/disable_ipv6", []byte("0"), 0); err != nil {
				return err
			}
		}
		return addAddresses(link, addresses)
	})
}

func addAddresses(link netlink.Link, addresses []*net.IPNet) error {
	for _, address := range addresses {
		if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: address}); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("failed to add address %s: %w", address, err)
		}
	}
	return nil
}

// lacksChain reports whether a DEL failed because the chain of its masquerade rules is missing, as
// after a reboot. Plugins before release 1.6 don't expect that. The DEL has removed the interface,
// so that another DEL skips the rules.
func lacksChain(err error) bool {
	var failure *types.Error
	return errors.As(err, &failure) && missingChain.MatchString(failure.Error())
}

// missingChain matches the texts of iptables with either backend.
var missingChain = regexp.MustCompile(`Chain 'CNI-\w+' does not exist|Couldn't load target .CNI-\w+':No such file or directory`)
