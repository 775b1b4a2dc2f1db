package cni

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/internal/roottest"
)

// buildPlugins builds the reference plugins once, without symbols, which is fast.
var buildPlugins = sync.OnceValue(func() error { return compilePlugins("-ldflags=-s -w", "-o", os.Getenv(pluginsEnv)+"/") })

// compilePlugins builds the reference plugins of the module with their versions, and the delegating
// plugin of this module. Without flags it only fills Go's build cache.
func compilePlugins(flags ...string) error {
	for dir, packages := range map[string][]string{
		"../tools/modules/cni": {"tool"},
		"..":                   {"./integration/programs/delegate", "./integration/faults"}, // the second keeps a build without flags from leaving a file
	} {
		build := exec.Command("go", slices.Concat([]string{"build"}, flags, packages)...)
		build.Dir = dir
		build.Env = append(os.Environ(), "GOWORK=off")
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("failed to build CNI plugins: %w: %s", err, out)
		}
	}
	return nil
}

// realRig is an attachment to real networks. The test's own network namespace plays the host.
type realRig struct {
	*rig
	ipam string // the directory of host-local
}

func newRealRig(t *testing.T, id string, confs ...string) *realRig {
	t.Helper()
	roottest.Require(t)
	require.NoError(t, buildPlugins())
	ipam := t.TempDir()
	files := map[string]string{}
	for i, conf := range confs {
		files[fmt.Sprintf("%d.conflist", i)] = strings.ReplaceAll(conf, "IPAMDIR", ipam)
	}
	config := Config{BinDirs: []string{os.Getenv(pluginsEnv)}, ConfDir: confDir(t, files)}
	networks, err := Load(config)
	require.NoError(t, err)
	args, capabilities, err := PodArgs(id, podConfig())
	require.NoError(t, err)
	a, err := NewAttachment(config, networks, id, newNetNS(t), args, capabilities)
	require.NoError(t, err)
	return &realRig{&rig{ledger: &ledger{}, attachment: a, driver: newDriver(t, Options{})}, ipam}
}

// addresses returns the addresses that host-local has given out.
func (r *realRig) addresses(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(r.ipam, "*", "*"))
	require.NoError(t, err)
	var ips []string
	for _, file := range files {
		if ip := net.ParseIP(filepath.Base(file)); ip != nil {
			ips = append(ips, ip.String())
		}
	}
	return ips
}

const (
	bridgeNet = `{"name":"bridgenet","cniVersion":"1.0.0","plugins":[
		{"type":"bridge","bridge":"cni-test0","isGateway":true,"ipMasq":false,"ipam":{"type":"host-local","dataDir":"IPAMDIR","ranges":[[{"subnet":"10.88.71.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
		{"type":"portmap","capabilities":{"portMappings":true},"snat":false}]}`
	brokenNet = `{"name":"brokennet","cniVersion":"1.0.0","plugins":[
		{"type":"bridge","bridge":"cni-test0","isGateway":true,"ipMasq":false,"ipam":{"type":"host-local","dataDir":"IPAMDIR","ranges":[[{"subnet":"10.88.71.0/24"}]]}},
		{"type":"no-such-plugin"}]}`
	ptpNet = `{"name":"ptpnet","cniVersion":"1.0.0","plugins":[
		{"type":"ptp","ipMasq":false,"ipam":{"type":"host-local","dataDir":"IPAMDIR","ranges":[[{"subnet":"10.88.72.0/24"}]]}}]}`
)

func TestRealNetworks(t *testing.T) {
	r := newRealRig(t, "real1", bridgeNet, ptpNet)
	require.NoError(t, r.add(t.Context()))
	t.Cleanup(func() { removeLink(t, "cni-test0") })

	ip, additional, err := r.attachment.IPs("")
	require.NoError(t, err)
	require.Empty(t, additional)
	require.True(t, strings.HasPrefix(ip, "10.88.71."), ip)
	require.Len(t, r.addresses(t), 2)
	require.Equal(t, []string{"eth0", "eth1", "lo"}, links(t, r.attachment.NetNSPath))
	require.Contains(t, natRules(t), "real1")
	require.Equal(t, "hello", talk(t, r.attachment.NetNSPath, ip))

	require.NoError(t, r.del(t.Context()))
	require.True(t, r.attachment.Settled())
	require.Empty(t, r.addresses(t))
	require.Equal(t, []string{"lo"}, links(t, r.attachment.NetNSPath))
	require.NotContains(t, natRules(t), "real1")
	require.NoError(t, r.del(t.Context()))
}

// A first network without addresses is refused, as in containerd. A second one is accepted.
func TestRealNetworkWithoutAddresses(t *testing.T) {
	const bare = `{"name":"bare","cniVersion":"1.0.0","plugins":[{"type":"bridge","bridge":"cni-test1"}]}`
	alone := newRealRig(t, "alone", bare)
	t.Cleanup(func() { removeLink(t, "cni-test1") })
	require.ErrorContains(t, alone.add(t.Context()), "gave eth0 no address")
	require.NoError(t, alone.del(t.Context()))
	require.Equal(t, []string{"lo"}, links(t, alone.attachment.NetNSPath))

	beside := newRealRig(t, "beside", ptpNet, bare)
	require.NoError(t, beside.add(t.Context()))
	ip, _, err := beside.attachment.IPs("")
	require.NoError(t, err)
	require.Equal(t, []string{ip}, beside.addresses(t))
	require.NoError(t, beside.driver.Check(t.Context(), beside.attachment, nil))
	require.Equal(t, []string{"eth0", "eth1", "lo"}, links(t, beside.attachment.NetNSPath))
	require.NoError(t, beside.del(t.Context()))
	require.Equal(t, []string{"lo"}, links(t, beside.attachment.NetNSPath))
}

// A pod is retried on a chain whose last plugin fails: no address stays allocated, although every
// DEL succeeds.
func TestRealChainFails(t *testing.T) {
	r := newRealRig(t, "real2", brokenNet)
	t.Cleanup(func() { removeLink(t, "cni-test0") })
	for range 3 {
		a, err := NewAttachment(Config{BinDirs: r.attachment.BinDirs}, r.attachment.Networks, "real2", r.attachment.NetNSPath, nil, nil)
		require.NoError(t, err)
		r.attachment = a
		require.ErrorContains(t, r.add(t.Context()), `failed to find plugin "no-such-plugin"`)
		require.Len(t, r.addresses(t), 1)
		require.NoError(t, r.del(t.Context()))
		require.Empty(t, r.addresses(t))
		require.Equal(t, []string{"lo"}, links(t, r.attachment.NetNSPath))
	}
}

// After a reboot, or if the namespace was removed, DEL still frees what is outside of the
// namespace.
func TestRealNetNSGone(t *testing.T) {
	r := newRealRig(t, "real3", bridgeNet)
	t.Cleanup(func() { removeLink(t, "cni-test0") })
	require.NoError(t, r.add(t.Context()))
	require.NoError(t, unix.Unmount(r.attachment.NetNSPath, unix.MNT_DETACH))
	require.NoError(t, r.del(t.Context()))
	require.True(t, r.attachment.Settled())
	require.Empty(t, r.addresses(t))
	require.NotContains(t, natRules(t), "real3")
}

func links(t *testing.T, netns string) (names []string) {
	t.Helper()
	inNetNS(t, netns, func() error {
		list, err := netlink.LinkList()
		for _, link := range list {
			names = append(names, link.Attrs().Name)
		}
		return err
	})
	slices.Sort(names)
	return names
}

func removeLink(t *testing.T, name string) {
	link, err := netlink.LinkByName(name)
	require.NoError(t, err)
	require.NoError(t, netlink.LinkDel(link))
}

// natRules returns the NAT rules by which portmap publishes ports. Their comments name the sandbox.
func natRules(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("iptables", "-t", "nat", "-S").CombinedOutput()
	require.NoError(t, err, "%s", out)
	return string(out)
}

// talk sends a word from a server in the pod to the host. It waits for duplicate address detection
// first.
func talk(t *testing.T, netns, ip string) (word string) {
	t.Helper()
	var listener net.Listener
	inNetNS(t, netns, func() (err error) {
		listener, err = net.Listen("tcp", net.JoinHostPort(ip, "8000"))
		return err
	})
	var server sync.WaitGroup
	defer server.Wait()
	defer listener.Close()
	server.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			io.WriteString(conn, "hello")
			conn.Close()
		}
	})
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		client, err := net.DialTimeout("tcp", listener.Addr().String(), 500*time.Millisecond)
		require.NoError(c, err)
		defer client.Close()
		heard, err := io.ReadAll(client)
		require.NoError(c, err)
		word = string(heard)
	}, 10*time.Second, 10*time.Millisecond)
	return word
}
