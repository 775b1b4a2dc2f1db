package cni

import (
	"fmt"
	"os"
	"os/exec"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/internal/roottest"
)

// chain is a list of reference plugins.
type chain struct {
	since   string // the first version of CNI that all of them know
	plugins []string
	// host, if set, prepares the host for the chain. HOSTDIR in the plugins stands for dir.
	host func(t *testing.T, dir string)
	// link is a type of link that some kernels lack. Without it the chain fails.
	link string
	// foreign says that another plugin than host-local gives the addresses.
	foreign bool
	// apart says that only processes that ask for the chain's links can use them.
	apart bool
	// alarm is the false alarm of CHECK about an intact pod.
	alarm string
}

const portmap = `{"type":"portmap","capabilities":{"portMappings":true}}`

// hostLocal is the IPAM of subnets, with one range each.
func hostLocal(subnets ...string) string {
	ranges := make([]string, len(subnets))
	for i, subnet := range subnets {
		ranges[i] = fmt.Sprintf(`[{"subnet":%q}]`, subnet)
	}
	return fmt.Sprintf(`"ipam":{"type":"host-local","dataDir":"IPAMDIR","ranges":[%s]}`, strings.Join(ranges, ","))
}

var chains = map[string]chain{
	"bridge, portmap, bandwidth, tuning": {since: "0.3.1", plugins: []string{
		`{"type":"bridge","bridge":"cni-chain3","isGateway":true,"ipMasq":true,"ipam":{"type":"host-local","dataDir":"IPAMDIR","ranges":[[{"subnet":"10.88.73.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}`,
		portmap,
		`{"type":"bandwidth","capabilities":{"bandwidth":true}}`,
		`{"type":"tuning","dataDir":"IPAMDIR/tuning","mtu":1400,"sysctl":{"net.ipv4.conf.IFNAME.arp_filter":"1"}}`,
	}},
	"bridge, firewall": {since: "0.4.0", plugins: []string{
		`{"type":"bridge","bridge":"cni-chain4","isGateway":true,` + hostLocal("10.88.74.0/24") + `}`,
		`{"type":"firewall","backend":"iptables"}`,
	}},
	"ptp, portmap": {since: "0.3.1", plugins: []string{
		`{"type":"ptp","ipMasq":true,"ipam":{"type":"host-local","dataDir":"IPAMDIR","ranges":[[{"subnet":"10.88.75.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}`,
		portmap,
	}},
	"delegate": {since: "0.3.1", plugins: []string{
		`{"type":"delegate","delegate":{"type":"bridge","bridge":"cni-chain6","isGateway":true,"ipMasq":true,` + hostLocal("10.88.76.0/24") + `}}`,
	}},
	"dual stack": {since: "0.3.1", plugins: []string{
		`{"type":"bridge","bridge":"cni-chain7","isGateway":true,"ipMasq":true,` + hostLocal("10.88.77.0/24", "fd00:88:77::/64") + `}`,
		portmap,
	}},
	"IPv6 only": {since: "0.3.1", plugins: []string{ // bridge waits for duplicate address detection
		`{"type":"bridge","bridge":"cni-chain8","isGateway":true,"ipMasq":true,` + hostLocal("fd00:88:78::/64") + `}`,
		portmap,
	}},
	"nftables": {since: "0.3.1", plugins: []string{
		`{"type":"bridge","bridge":"cni-chain9","isGateway":true,"ipMasq":true,"ipMasqBackend":"nftables",` + hostLocal("10.88.79.0/24") + `}`,
		`{"type":"portmap","backend":"nftables","capabilities":{"portMappings":true}}`,
	}},
	"bridge, sbr": {since: "0.3.1", alarm: "Failed to find Gateway", plugins: []string{ // sbr has moved the route to a table of its own
		`{"type":"bridge","bridge":"cni-chain10","isGateway":true,` + hostLocal("10.88.80.0/24") + `}`,
		`{"type":"sbr"}`,
	}},
	"macvlan": {since: "0.3.1", host: wire("wire1", "10.88.81.1/24"), plugins: []string{
		`{"type":"macvlan","master":"wire1","mode":"bridge",` + hostLocal("10.88.81.0/24") + `}`,
	}},
	"host-device": {since: "0.3.1", host: wire("wire2", "10.88.82.1/24"), plugins: []string{
		`{"type":"host-device","device":"wire2",` + hostLocal("10.88.82.0/24") + `}`,
	}},
	"bridge with static": {since: "0.3.1", foreign: true, plugins: []string{
		`{"type":"bridge","bridge":"cni-chain13","isGateway":true,"ipam":{"type":"static","addresses":[{"address":"10.88.83.5/24","gateway":"10.88.83.1"}]}}`,
	}},
	"ipvlan": {since: "0.3.1", link: "ipvlan", host: wire("wire3", "10.88.85.1/24"), plugins: []string{
		`{"type":"ipvlan","master":"wire3","mode":"l2",` + hostLocal("10.88.85.0/24") + `}`,
	}},
	"bridge, vrf": {since: "0.3.1", link: "vrf", apart: true, alarm: "Failed to find Gateway", plugins: []string{
		`{"type":"bridge","bridge":"cni-chain16","isGateway":true,` + hostLocal("10.88.87.0/24") + `}`,
		`{"type":"vrf","vrfname":"blue"}`,
	}},
}

// list is the configuration of a chain, with more plugins behind its own.
func (c chain) list(t *testing.T, version, dir string, more ...string) string {
	t.Helper()
	name := strings.ReplaceAll(path.Base(t.Name()), ",_", ".") // another network for each test
	list := fmt.Sprintf(`{"name":%q,"cniVersion":%q,"plugins":[%s]}`, name, version, strings.Join(slices.Concat(c.plugins, more), ","))
	return strings.ReplaceAll(list, "HOSTDIR", dir)
}

// prepare prepares the host, and makes what the first pod of a chain leaves for all: bridges and
// empty iptables chains.
func (c chain) prepare(t *testing.T, version string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if c.host != nil {
		c.host(t, dir)
	}
	first := newRealRig(t, "first", c.list(t, version, dir))
	require.NoError(t, first.add(t.Context()))
	require.NoError(t, first.del(t.Context()))
	return dir
}

// TestChainsOfPlugins runs ADD, CHECK and DEL of chains of real plugins, and requires that nothing is left.
// It uses the first and the last CNI version of each chain; with PODFSM_FULL=1 also those in
// between.
func TestChainsOfPlugins(t *testing.T) {
	for name, c := range chains {
		for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
			between := c.since < version && version < "1.1.0"
			if version < c.since || between && os.Getenv("PODFSM_FULL") == "" {
				continue
			}
			t.Run(name+" "+version, func(t *testing.T) {
				roottest.Require(t)
				if c.link != "" && !kernelHas(t, c.link) {
					requireFails(t, c, version)
					return
				}
				dir := c.prepare(t, version)
				requireLife(t, c, version, dir)
				if version == "1.1.0" {
					requireRollback(t, c, version, dir)
					requireEndWithoutNetNS(t, c, version, dir)
				}
			})
		}
	}
}

// requireLife attaches and detaches a pod.
func requireLife(t *testing.T, c chain, version, dir string) {
	t.Helper()
	before := hostState(t)
	r := newRealRig(t, "pod", c.list(t, version, dir))
	require.NoError(t, r.add(t.Context()))
	require.Contains(t, links(t, r.attachment.NetNSPath), "eth0")
	ip, more, err := r.attachment.IPs("")
	require.NoError(t, err)
	ips := append(more, ip)
	if !c.foreign {
		require.ElementsMatch(t, ips, r.addresses(t))
	}
	if !c.apart {
		for _, ip := range ips {
			require.Equal(t, "hello", talk(t, r.attachment.NetNSPath, ip))
		}
	}
	for _, plugin := range r.attachment.Plugins {
		require.Positive(t, plugin.Took, plugin.Type)
	}
	err = r.driver.Check(t.Context(), r.attachment, nil)
	if c.alarm == "" || version == "0.3.1" {
		require.NoError(t, err)
	} else {
		require.ErrorContains(t, err, c.alarm)
	}
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
	requireGone(t, r, before)
	require.NoError(t, r.del(t.Context()))
}

// requireRollback lets the chain fail behind its last plugin, twice.
func requireRollback(t *testing.T, c chain, version, dir string) {
	t.Helper()
	before := hostState(t)
	for range 2 {
		r := newRealRig(t, "pod", c.list(t, version, dir, `{"type":"no-such-plugin"}`))
		require.ErrorContains(t, r.add(t.Context()), `failed to find plugin "no-such-plugin"`)
		require.NoError(t, r.del(t.Context()))
		requireGone(t, r, before)
	}
}

// requireFails lets a plugin fail because the kernel lacks something.
func requireFails(t *testing.T, c chain, version string) {
	t.Helper()
	dir := t.TempDir()
	if c.host != nil {
		c.host(t, dir)
	}
	var before string
	for range 2 {
		r := newRealRig(t, "pod", c.list(t, version, dir))
		require.ErrorContains(t, r.add(t.Context()), "failed (add)")
		require.NoError(t, r.del(t.Context()))
		if before == "" { // with bridges
			before = hostState(t)
		}
		requireGone(t, r, before)
	}
}

func requireGone(t *testing.T, r *realRig, before string) {
	t.Helper()
	require.True(t, r.attachment.Settled())
	require.Empty(t, r.addresses(t))
	require.Equal(t, []string{"lo"}, links(t, r.attachment.NetNSPath))
	require.Equal(t, before, hostState(t))
}

// requireEndWithoutNetNS removes the pod's namespace and the rules before DEL, as a reboot does.
func requireEndWithoutNetNS(t *testing.T, c chain, version, dir string) {
	t.Helper()
	r := newRealRig(t, "rebooted", c.list(t, version, dir))
	require.NoError(t, r.add(t.Context()))
	require.NoError(t, unix.Unmount(r.attachment.NetNSPath, unix.MNT_DETACH))
	require.NoError(t, r.del(t.Context()))
	require.True(t, r.attachment.Settled())
	require.Empty(t, r.addresses(t))
}

// kernelHas reports whether the kernel knows a type of link.
func kernelHas(t *testing.T, link string) bool {
	t.Helper()
	command := map[string]string{
		"vrf":    "ip link add probe type vrf table 10",
		"ipvlan": "ip link add below type veth && ip link add probe link below type ipvlan mode l2",
	}[link]
	var known bool
	inNetNS(t, newNetNS(t), func() error {
		known = exec.Command("sh", "-c", command).Run() == nil
		return nil
	})
	return known
}

// wire makes a link that a plugin can use as the host's network card. The host is at its other end,
// with an address.
func wire(name, address string) func(*testing.T, string) {
	return func(t *testing.T, _ string) {
		t.Helper()
		peer := name + "-host"
		require.NoError(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: peer}))
		t.Cleanup(func() { // unless it went with a pod's namespace
			if link, err := netlink.LinkByName(peer); err == nil {
				_ = netlink.LinkDel(link)
			}
		})
		for _, name := range []string{name, peer} {
			link, err := netlink.LinkByName(name)
			require.NoError(t, err)
			require.NoError(t, netlink.LinkSetUp(link))
		}
		giveLink(t, peer, address)
	}
}

func giveLink(t *testing.T, name, address string) {
	t.Helper()
	link, err := netlink.LinkByName(name)
	require.NoError(t, err)
	addr, err := netlink.ParseAddr(address)
	require.NoError(t, err)
	require.NoError(t, netlink.AddrAdd(link, addr))
}

// takeAddress removes the address of eth0.
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
		all, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		*address = all[0]
		return netlink.AddrDel(link, address)
	})
	return func() { change(netlink.AddrAdd) }
}

// noise matches what changes by itself: comments with the time, counters, and whether a bridge has
// noticed that it is empty.
var noise = regexp.MustCompile(`(?m)^#.*\n| \[\d+:\d+\]$| linkdown`)

// hostState is what the plugins have made in the namespace that plays the host's.
func hostState(t *testing.T) string {
	t.Helper()
	all := []string{rules(t), output(t, "ip", "-o", "route"), output(t, "ip", "rule"), output(t, "tc", "qdisc"), output(t, "tc", "filter")}
	list, err := netlink.LinkList()
	require.NoError(t, err)
	for _, link := range list {
		all = append(all, link.Type()+" "+link.Attrs().Name)
	}
	return strings.Join(all, "\n")
}

// rules are the rules of the namespace that plays the host's.
func rules(t *testing.T) string {
	t.Helper()
	return output(t, "iptables-save") + output(t, "ip6tables-save") + output(t, "nft", "--stateless", "list", "ruleset")
}

// output is what a command prints, without noise.
func output(t *testing.T, command string, args ...string) string {
	t.Helper()
	out, err := exec.Command(command, args...).CombinedOutput()
	require.NoError(t, err, "%s", out)
	return noise.ReplaceAllString(string(out), "")
}
