package cni

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/internal/roottest"
)

// localIPAM returns the configuration of host-local for a subnet.
func localIPAM(subnet string) string {
	return fmt.Sprintf(`{"type":"host-local","dataDir":"IPAMDIR","ranges":[[{"subnet":%q}]],"routes":[{"dst":"0.0.0.0/0"}]}`, subnet)
}

// Each reference plugin frees all resources of a pod whose network namespace is missing after a
// reboot, and none fails.
func TestRealPluginsAfterReboot(t *testing.T) {
	for name, plugins := range map[string][]string{
		"bridge, sbr":    {`{"type":"bridge","bridge":"cni-reboot","isGateway":true,"ipMasq":true,"ipam":` + localIPAM("10.88.81.0/24") + `}`, `{"type":"sbr"}`},
		"bridge, tuning": {`{"type":"bridge","bridge":"cni-reboot","ipam":` + localIPAM("10.88.82.0/24") + `}`, `{"type":"tuning","dataDir":"IPAMDIR/tuning","mtu":1400}`},
		"bridge, all of them": {`{"type":"bridge","bridge":"cni-reboot","isGateway":true,"ipam":` + localIPAM("10.88.83.0/24") + `}`,
			`{"type":"portmap","capabilities":{"portMappings":true}}`, `{"type":"bandwidth","ingressRate":1000000,"ingressBurst":1000000}`, `{"type":"firewall","backend":"iptables"}`},
		"ptp, sbr":         {`{"type":"ptp","ipMasq":true,"ipam":` + localIPAM("10.88.84.0/24") + `}`, `{"type":"sbr"}`},
		"host-device":      {`{"type":"host-device","device":"cni-device","ipam":` + localIPAM("10.88.85.0/24") + `}`},
		"host-device, sbr": {`{"type":"host-device","device":"cni-device","ipam":` + localIPAM("10.88.86.0/24") + `}`, `{"type":"sbr"}`},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRealRig(t, "pod", fmt.Sprintf(`{"name":"reboot","cniVersion":"1.0.0","plugins":[%s]}`, strings.Join(plugins, ",")))
			if strings.HasPrefix(name, "host-device") {
				require.NoError(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "cni-device"}, PeerName: "cni-peer"}))
			}
			require.NoError(t, r.add(t.Context()))
			require.Len(t, r.addresses(t), 1)
			require.NoError(t, unix.Unmount(r.attachment.NetNSPath, unix.MNT_DETACH))

			require.NoError(t, r.del(t.Context()))
			require.True(t, r.attachment.Settled())
			require.Empty(t, r.addresses(t))
			if strings.HasPrefix(name, "bridge") {
				removeLink(t, "cni-reboot")
			}
			require.Eventually(t, func() bool { // the kernel takes its time to remove a namespace
				_, err := netlink.LinkByName("cni-peer")
				return errors.As(err, new(netlink.LinkNotFoundError))
			}, 10*time.Second, 10*time.Millisecond)
		})
	}
}

// DEL removes what ADD made by the backend of that time, whichever backend the network is
// configured for at DEL.
func TestRealBackendChanges(t *testing.T) {
	for _, plugin := range []string{
		`{"type":"portmap","backend":%q,"capabilities":{"portMappings":true}}`,
		`{"type":"bridge","bridge":"cni-backend","ipMasq":true,"ipMasqBackend":%q,"ipam":` + localIPAM("10.88.88.0/24") + `}`,
	} {
		for _, backends := range [][]string{{"iptables", "nftables"}, {"nftables", "iptables"}} {
			t.Run(plugin[:17]+" "+strings.Join(backends, " to "), func(t *testing.T) {
				bridge := `{"type":"bridge","bridge":"cni-backend","ipam":` + localIPAM("10.88.87.0/24") + `},`
				if strings.Contains(plugin, "bridge") {
					bridge = ""
				}
				conf := func(backend string) string {
					return fmt.Sprintf(`{"name":"backends","cniVersion":"1.0.0","plugins":[`+bridge+plugin+`]}`, backend)
				}
				r := newRealRig(t, "backendpod", conf(backends[0]))
				t.Cleanup(func() { removeLink(t, "cni-backend") })
				require.NoError(t, r.add(t.Context()))
				require.Contains(t, rules(t), "backendpod")

				later := newRealRig(t, "latercomer", conf(backends[1]))
				require.NoError(t, later.add(t.Context()))
				require.NoError(t, r.del(t.Context()))
				require.NotContains(t, rules(t), "backendpod")
				require.Contains(t, rules(t), "latercomer")
				require.NoError(t, later.del(t.Context()))
				require.NotContains(t, rules(t), "latercomer")
			})
		}
	}
}

// CHECK accepts a pod whose sysctls are written differently, or were changed by the pod.
func TestRealTuningCheck(t *testing.T) {
	const list = `{"name":"tuned","cniVersion":"1.0.0","plugins":[{"type":"bridge","bridge":"cni-tuned","ipam":%s},
		{"type":"tuning","dataDir":"IPAMDIR/tuning","sysctl":{%s}}]}`
	for name, test := range map[string]struct {
		sysctl string
		own    map[string]string // the pod's
		fails  bool
	}{
		"two numbers":     {sysctl: `"net.ipv4.ip_local_port_range":"1024 65535"`},
		"much space":      {sysctl: `"net.ipv4.ping_group_range":" 0   100 "`},
		"other digits":    {sysctl: `"net.ipv4.conf.IFNAME.rp_filter":"0x2","net.ipv4.ip_default_ttl":"0x41"`},
		"the pod's own":   {sysctl: `"net.ipv4.conf.IFNAME.arp_filter":"1"`, own: map[string]string{"net.ipv4.conf.eth0.arp_filter": "0"}},
		"neither of them": {sysctl: `"net.ipv4.conf.IFNAME.arp_filter":"1"`, fails: true},
		"three numbers":   {sysctl: `"net.ipv4.tcp_rmem":"4096 131072 6291456"`},
		"two ports":       {sysctl: `"net.ipv4.ip_local_reserved_ports":"8080,8081"`},
		"ranges of ports": {sysctl: `"net.ipv4.ip_local_reserved_ports":"65535,90-95,0x50,7,8-20,15-25,96,"`},
		"a port":          {sysctl: `"net.ipv4.ip_local_reserved_ports":"8080"`},
		"no port":         {sysctl: `"net.ipv4.ip_local_reserved_ports":""`},
		"space around":    {sysctl: `"net.ipv4.tcp_fastopen_key":" 00000000-00000000-00000000-00000001"`},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRealRig(t, "tunedpod", fmt.Sprintf(list, localIPAM("10.88.89.0/24"), test.sysctl))
			t.Cleanup(func() { removeLink(t, "cni-tuned") })
			require.NoError(t, r.add(t.Context()))
			if strings.Contains(test.sysctl, "arp_filter") {
				inNetNS(t, r.attachment.NetNSPath, func() error {
					return exec.Command("sysctl", "-w", "net.ipv4.conf.eth0.arp_filter=0").Run()
				})
			}
			err := r.driver.Check(t.Context(), r.attachment, test.own)
			if test.fails {
				require.ErrorContains(t, err, "arp_filter is 1, current value is 0")
			} else {
				require.NoError(t, err)
			}
			require.NoError(t, r.del(t.Context()))
		})
	}
}

// CHECK of a pod that has disabled IPv6 still checks the rest of the attachment.
func TestRealCheckWithoutIPv6(t *testing.T) {
	roottest.Require(t)
	ipam := `"ipam":{"type":"host-local","dataDir":"IPAMDIR","ranges":[[{"subnet":"10.88.90.0/24"}],[{"subnet":"fd00:88:90::/64"}]],
		"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}`
	ipv6Only := strings.Replace(ipam, `[{"subnet":"10.88.90.0/24"}],`, "", 1)
	for name, tc := range map[string]struct{ version, plugins string }{
		"bridge":    {"1.0.0", `{"type":"bridge","bridge":"cni-noipv6","isGateway":true,"ipMasq":true,` + ipam + `},` + portmap},
		"ptp":       {"1.1.0", `{"type":"ptp","ipMasq":true,` + ipam + `},` + portmap},
		"IPv6 only": {"0.4.0", `{"type":"bridge","bridge":"cni-noipv6","isGateway":true,` + ipv6Only + `},` + portmap},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRealRig(t, "pod", fmt.Sprintf(`{"name":"no-ipv6","cniVersion":%q,"plugins":[%s]}`, tc.version, tc.plugins))
			if strings.Contains(tc.plugins, "cni-noipv6") {
				t.Cleanup(func() { removeLink(t, "cni-noipv6") })
			}
			require.NoError(t, r.add(t.Context()))
			own := map[string]string{"net.ipv6.conf.eth0.disable_ipv6": "1"}
			inNetNS(t, r.attachment.NetNSPath, func() error {
				return exec.Command("sysctl", "-w", "net.ipv6.conf.eth0.disable_ipv6=1").Run()
			})
			require.ErrorContains(t, r.driver.Check(t.Context(), r.attachment, nil), "failed (check)", "IPv6 is missed")
			require.NoError(t, r.driver.Check(t.Context(), r.attachment, own))
			if name != "IPv6 only" {
				takeAddress(t, r.attachment.NetNSPath)
				require.ErrorContains(t, r.driver.Check(t.Context(), r.attachment, own), "failed (check)", "IPv4 is missed")
			}
			require.NoError(t, r.del(t.Context()))
		})
	}
}

func TestDisablesIPv6(t *testing.T) {
	for _, tc := range []struct {
		ifName, name, value string
		want                bool
	}{
		{"eth0", "net.ipv6.conf.eth0.disable_ipv6", "1", true},
		{"eth0", "net/ipv6/conf/all/disable_ipv6", " 1\n", true},
		{"net1", "net.ipv6.conf.net1.disable_ipv6", "1", true},
		{"eth0", "net.ipv6.conf.all.disable_ipv6", "0", false},
		{"eth0", "net.ipv6.conf.net1.disable_ipv6", "1", false},
		{"eth0", "net.ipv6.conf.default.disable_ipv6", "1", false}, // of interfaces that are yet to come
		{"eth0", "net.ipv6.conf.all.accept_ra", "1", false},
		{"eth0", "net.ipv4.conf.all.rp_filter", "1", false},
	} {
		require.Equal(t, tc.want, disablesIPv6(map[string]string{"net.core.somaxconn": "1", tc.name: tc.value}, tc.ifName), tc.name)
	}
	require.False(t, disablesIPv6(nil, "eth0"))
}
