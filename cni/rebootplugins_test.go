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
)

// localIPAM is the configuration of host-local for a subnet.
func localIPAM(subnet string) string {
	return fmt.Sprintf(`{"type":"host-local","dataDir":"IPAMDIR","ranges":[[{"subnet":%q}]],"routes":[{"dst":"0.0.0.0/0"}]}`, subnet)
}

// Each reference plugin frees what a pod has, and none fails, when the pod's network namespace went with the last boot.
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

// DEL takes back what ADD has made by the backend of that day, whatever the network is configured for by then.
func TestRealBackendChanges(t *testing.T) {
	rules := func() string {
		t.Helper()
		all := natRules(t)
		out, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
		require.NoError(t, err, "%s", out)
		return all + string(out)
	}
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
				require.Contains(t, rules(), "backendpod")

				later := newRealRig(t, "latercomer", conf(backends[1]))
				require.NoError(t, later.add(t.Context()))
				require.NoError(t, r.del(t.Context()))
				require.NotContains(t, rules(), "backendpod")
				require.Contains(t, rules(), "latercomer")
				require.NoError(t, later.del(t.Context()))
				require.NotContains(t, rules(), "latercomer")
			})
		}
	}
}

// CHECK doesn't say that a pod is not as it should be because of how a value is written, or because the pod has asked for another.
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
