package cni

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// DEL removes the masquerade rules of a pod from the node, whatever has become of the pod's
// interface and its addresses.
func TestRealMasqueradeRulesGo(t *testing.T) {
	confs := map[string]string{
		"bridge": `{"type":"bridge","bridge":"cni-masq","isGateway":true,"ipMasq":true,%s}`,
		"ptp":    `{"type":"ptp","ipMasq":true,%s}`,
	}
	for name, tc := range map[string]struct {
		inPod string // what the pod does
		spoil func(t *testing.T, r *realRig, p *plugins)
		fails string // the text of the first DEL, if it fails
	}{
		"IPAM fails once": {fails: "the IPAM daemon is down", spoil: func(t *testing.T, _ *realRig, p *plugins) {
			require.NoError(t, os.WriteFile(filepath.Join(p.dir, "broken"), nil, 0o600))
		}},
		"namespace gone": {spoil: func(t *testing.T, r *realRig, _ *plugins) {
			require.NoError(t, unix.Unmount(r.attachment.NetNSPath, unix.MNT_DETACH))
		}},
		"IPv6 disabled":     {inPod: "sysctl -w net.ipv6.conf.all.disable_ipv6=1"},
		"MTU without IPv6":  {inPod: "ip link set eth0 mtu 1000"},
		"addresses deleted": {inPod: "ip address flush dev eth0"},
		"interface deleted": {inPod: "ip link del eth0"},
		"interface renamed": {inPod: "ip link set eth0 down name other"},
		"another interface": {inPod: "ip link del eth0 && ip link add eth0 type bridge"},
		"alternative name":  {inPod: "ip link set eth0 down name other && ip link property add dev other altname eth0"},
		"other addresses": { // the plugin removes the chain for each address, also while another address needs it
			fails: "Device or resource busy",
			inPod: "ip address flush dev eth0 && ip address add 192.0.2.1/24 dev eth0 && ip address add 2001:db8::1/64 dev eth0",
		},
		"names of all links": {inPod: "ip link del eth0 && ip link add veth0 type veth peer name veth1"},
	} {
		for plugin, conf := range confs {
			t.Run(plugin+" "+name, func(t *testing.T) {
				p := newPlugins(t)
				p.script("flaky", `rm $dir/broken && echo '{"code":11,"msg":"the IPAM daemon is down"}' && exit 1
exec `+os.Getenv(pluginsEnv)+`/host-local < $dir/flaky.$CNI_COMMAND.stdin`)
				ipam := strings.Replace(hostLocal("10.88.91.0/24", "fd00:88:91::/64"), "host-local", "flaky", 1)
				list := fmt.Sprintf(`{"name":"masquerade","cniVersion":"1.0.0","plugins":[%s]}`, fmt.Sprintf(conf, ipam))
				pod := func(id string) *realRig {
					r := newRealRig(t, id, list)
					r.attachment.LookIn([]string{p.dir})
					inPod(t, r, "sysctl -w net.ipv6.conf.default.accept_dad=0") // ptp waits for it
					require.NoError(t, r.add(t.Context()))
					return r
				}
				require.NoError(t, pod("first").del(t.Context())) // leaves what all pods share
				if plugin == "bridge" {
					t.Cleanup(func() { removeLink(t, "cni-masq") })
				}
				before := rules(t)

				r := pod(plugin + strings.ReplaceAll(name, " ", "-"))
				require.NotEqual(t, before, rules(t))
				if tc.spoil != nil {
					tc.spoil(t, r, p)
				} else {
					inPod(t, r, tc.inPod)
				}
				if tc.fails != "" {
					require.ErrorContains(t, r.del(t.Context()), tc.fails)
				}
				require.NoError(t, r.del(t.Context()))
				require.True(t, r.attachment.Settled())
				require.Empty(t, r.addresses(t))
				require.Equal(t, before, rules(t))
			})
		}
	}
}

// inPod runs a shell command in the pod's network namespace.
func inPod(t *testing.T, r *realRig, command string) {
	t.Helper()
	inNetNS(t, r.attachment.NetNSPath, func() error {
		out, err := exec.Command("sh", "-c", command).CombinedOutput()
		require.NoError(t, err, "%s", out)
		return nil
	})
}

// Before release 1.6, bridge and ptp fail if the chain of their rules is missing, as after a reboot:
// DEL must not fail forever.
func TestDelWithoutMasqueradeChain(t *testing.T) {
	for backend, text := range map[string]string{
		"iptables-nft":    "exit status 2: iptables v1.8.9 (nf_tables): Chain 'CNI-ecef08a657987418bb9b4047' does not exist",
		"iptables-legacy": "exit status 2: iptables v1.8.9 (legacy): Couldn't load target `CNI-ecef08a657987418bb9b4047':No such file or directory",
	} {
		t.Run(backend, func(t *testing.T) {
			p := newPlugins(t)
			p.script("bridge", good("10.1.2.3"))
			r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"bridge"}`))
			require.NoError(t, r.add(t.Context()))
			require.NoError(t, unix.Unmount(r.attachment.NetNSPath, unix.MNT_DETACH))
			r.calls()
			p.script("bridge", fmt.Sprintf(`nsenter --net=$CNI_NETNS ip link del $CNI_IFNAME || exit 0
cat <<'END'
{"msg":%q}
END
exit 1`, text))
			require.NoError(t, r.del(t.Context()))
			require.Equal(t, []string{"DEL bridge eth0", "DEL bridge eth0"}, r.calls())
			require.True(t, r.attachment.Settled())
		})
	}
}

// DEL runs even if the pod's interface can't get its addresses.
func TestDelWithoutRestoredAddresses(t *testing.T) {
	p := newPlugins(t)
	p.script("bridge", good("ff02::1"))
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"bridge"}`))
	require.NoError(t, r.add(t.Context()))
	require.ErrorContains(t, restoreAddresses(r.attachment.NetNSPath, "eth0", addresses(t, "ff02::1/24")),
		"failed to add address ff02::1/24")
	require.NoError(t, r.del(t.Context()))
	require.True(t, r.attachment.Settled())
}

// A new interface is made only if the pod's can't be used.
func TestRestoreKeepsInterface(t *testing.T) {
	netns := newNetNS(t)
	want := addresses(t, "10.1.2.3/24", "fd00::3/64")
	index := func() (index int) {
		require.NoError(t, restoreAddresses(netns, "eth0", want))
		inNetNS(t, netns, func() error {
			link, err := netlink.LinkByName("eth0")
			require.NoError(t, err)
			index = link.Attrs().Index
			return nil
		})
		return index
	}
	first := index()
	require.Equal(t, first, index(), "nothing is missing")
	takeAddress(t, netns)
	require.Equal(t, first, index(), "only an address is missing")
}

func addresses(t *testing.T, texts ...string) (all []*net.IPNet) {
	t.Helper()
	for _, text := range texts {
		address, err := netlink.ParseIPNet(text)
		require.NoError(t, err)
		all = append(all, address)
	}
	return all
}
