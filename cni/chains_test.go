package cni

import (
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
)

// chains are lists of reference plugins, with the first version of CNI that all of them know.
var chains = map[string]struct {
	since   string
	plugins []string
}{
	"bridge, portmap, bandwidth, tuning": {"0.3.1", []string{
		`{"type":"bridge","bridge":"cni-chain3","isGateway":true,"ipMasq":true,"ipam":{"type":"host-local","dataDir":"IPAMDIR","ranges":[[{"subnet":"10.88.73.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}`,
		`{"type":"portmap","capabilities":{"portMappings":true}}`,
		`{"type":"bandwidth","capabilities":{"bandwidth":true}}`,
		`{"type":"tuning","dataDir":"IPAMDIR/tuning","mtu":1400,"sysctl":{"net.ipv4.conf.IFNAME.arp_filter":"1"}}`,
	}},
	"bridge, firewall": {"0.4.0", []string{
		`{"type":"bridge","bridge":"cni-chain4","isGateway":true,"ipam":{"type":"host-local","dataDir":"IPAMDIR","ranges":[[{"subnet":"10.88.74.0/24"}]]}}`,
		`{"type":"firewall","backend":"iptables"}`,
	}},
	"ptp, portmap": {"0.3.1", []string{
		`{"type":"ptp","ipMasq":true,"ipam":{"type":"host-local","dataDir":"IPAMDIR","ranges":[[{"subnet":"10.88.75.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}`,
		`{"type":"portmap","capabilities":{"portMappings":true}}`,
	}},
	"delegate": {"0.3.1", []string{
		`{"type":"delegate","delegate":{"type":"bridge","bridge":"cni-chain6","isGateway":true,"ipMasq":true,"ipam":{"type":"host-local","dataDir":"IPAMDIR","ranges":[[{"subnet":"10.88.76.0/24"}]]}}}`,
	}},
}

// TestChains takes chains of real plugins through ADD, CHECK and DEL in each version of CNI, and looks for what is left.
func TestChains(t *testing.T) {
	for name, chain := range chains {
		for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
			if version < chain.since {
				continue
			}
			t.Run(name+" "+version, func(t *testing.T) {
				list := fmt.Sprintf(`{"name":"chain","cniVersion":%q,"plugins":[%s]}`, version, strings.Join(chain.plugins, ","))
				first := newRealRig(t, "first", list)
				require.NoError(t, first.add(t.Context()))
				require.NoError(t, first.del(t.Context()))
				before := hostState(t) // with bridges and empty chains

				r := newRealRig(t, "pod", list)
				require.NoError(t, r.add(t.Context()))
				require.NotEqual(t, before, hostState(t))
				ip, _, err := r.attachment.IPs("")
				require.NoError(t, err)
				require.Equal(t, []string{ip}, r.addresses(t))
				require.Equal(t, "hello", talk(t, r.attachment.NetNSPath, ip))
				for _, plugin := range r.attachment.Plugins {
					require.Positive(t, plugin.Took, plugin.Type)
				}
				require.NoError(t, r.driver.Check(t.Context(), r.attachment, nil))
				require.NoError(t, r.driver.Status(t.Context(), Config{BinDirs: r.attachment.BinDirs}, r.attachment.Networks))

				giveBack := takeAddress(t, r.attachment.NetNSPath)
				err = r.driver.Check(t.Context(), r.attachment, nil)
				if version == "0.3.1" {
					require.NoError(t, err, "it has no CHECK")
				} else {
					require.ErrorContains(t, err, "failed (check)")
				}
				giveBack() // the bridge plugin looks for it at DEL

				require.NoError(t, r.del(t.Context()))
				require.True(t, r.attachment.Settled())
				require.Empty(t, r.addresses(t))
				require.Equal(t, []string{"lo"}, links(t, r.attachment.NetNSPath))
				require.Equal(t, before, hostState(t))
				require.NoError(t, r.del(t.Context()))
			})
		}
	}
}

// takeAddress takes the address of eth0 away.
func takeAddress(t *testing.T, netns string) (giveBack func()) {
	t.Helper()
	var address netlink.Addr
	change := func(do func(netlink.Link, *netlink.Addr) error) {
		inNetNS(t, netns, func() error {
			link, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			return do(link, &address)
		})
	}
	change(func(link netlink.Link, address *netlink.Addr) error {
		all, err := netlink.AddrList(link, netlink.FAMILY_V4)
		if err != nil {
			return err
		}
		*address = all[0]
		return netlink.AddrDel(link, address)
	})
	return func() { change(netlink.AddrAdd) }
}

// noise is what changes without anything being made: comments with the time, counters, and whether a bridge has noticed that it is empty.
var noise = regexp.MustCompile(`(?m)^#.*\n| \[\d+:\d+\]$| linkdown`)

// hostState is what the plugins have made in the namespace that plays the host's.
func hostState(t *testing.T) string {
	t.Helper()
	var all []string
	for _, command := range [][]string{
		{"iptables-save"}, {"ip", "-o", "route"}, {"ip", "rule"}, {"tc", "qdisc"}, {"tc", "filter"},
	} {
		out, err := exec.Command(command[0], command[1:]...).CombinedOutput()
		require.NoError(t, err, "%s", out)
		all = append(all, noise.ReplaceAllString(string(out), ""))
	}
	list, err := netlink.LinkList()
	require.NoError(t, err)
	for _, link := range list {
		all = append(all, link.Type()+" "+link.Attrs().Name)
	}
	return strings.Join(all, "\n")
}
