package cni

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"github.com/podfsm/podfsm/internal/roottest"
)

// An IPAM plugin with a daemon: DEL frees the lease, also through a restarted daemon that has
// forgotten it. Without a daemon, DEL stays pending.
func TestDHCP(t *testing.T) {
	roottest.Require(t)
	const bridge, network = "cni-dhcp0", "10.88.90"
	dir := t.TempDir()
	dhcpServer(t, dir, bridge, network)
	stop := dhcpDaemon(t, dir)
	list := fmt.Sprintf(`{"name":"leased","cniVersion":"1.1.0","plugins":[
		{"type":"bridge","bridge":%q,"ipam":{"type":"dhcp","daemonSocketPath":%q}}]}`, bridge, filepath.Join(dir, "dhcp.sock"))
	before := hostState(t)

	r := newRealRig(t, "leased", list)
	require.NoError(t, r.add(t.Context()))
	ip, _, err := r.attachment.IPs("")
	require.NoError(t, err)
	require.Contains(t, ip, network)
	require.Equal(t, "hello", talk(t, r.attachment.NetNSPath, ip))
	require.NoError(t, r.driver.Check(t.Context(), r.attachment, nil))

	stop()
	for range 2 {
		require.ErrorContains(t, r.del(t.Context()), "error dialing DHCP daemon")
		require.False(t, r.attachment.Settled())
	}
	refused := newRealRig(t, "refused", list)
	require.ErrorContains(t, refused.add(t.Context()), "error dialing DHCP daemon")
	require.Error(t, refused.del(t.Context()), "bridge asks its IPAM plugin first")

	dhcpDaemon(t, dir)
	for _, r := range []*realRig{r, refused} {
		require.NoError(t, r.del(t.Context()))
		requireGone(t, r, before)
	}
}

// dhcpServer makes a bridge with a DHCP server for a /24.
func dhcpServer(t *testing.T, dir, bridge, network string) {
	t.Helper()
	link := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridge}}
	require.NoError(t, netlink.LinkAdd(link))
	t.Cleanup(func() { removeLink(t, bridge) })
	require.NoError(t, netlink.LinkSetUp(link))
	giveLink(t, bridge, network+".1/24")
	conf := fmt.Sprintf("interface %s\nstart %s.10\nend %s.200\noption subnet 255.255.255.0\noption router %s.1\nlease_file %s/leases\npidfile %s/udhcpd.pid\n",
		bridge, network, network, network, dir, dir)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "leases"), nil, 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "udhcpd.conf"), []byte(conf), 0o644))
	serve(t, "busybox", "udhcpd", "-f", "-a", "50", filepath.Join(dir, "udhcpd.conf"))
}

// dhcpDaemon starts the daemon of the dhcp plugin, which keeps leases.
func dhcpDaemon(t *testing.T, dir string) (stop func()) {
	t.Helper()
	socket := filepath.Join(dir, "dhcp.sock")
	require.NoError(t, os.RemoveAll(socket)) // of one that was killed
	stop = serve(t, filepath.Join(os.Getenv(pluginsEnv), "dhcp"), "daemon", "-socketpath", socket)
	require.Eventually(t, func() bool {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			conn.Close()
		}
		return err == nil
	}, 10*time.Second, 10*time.Millisecond)
	return stop
}

// serve runs a program until stop, or the test's end.
func serve(t *testing.T, program string, args ...string) (stop func()) {
	t.Helper()
	require.NoError(t, buildPlugins())
	cmd := exec.Command(program, args...)
	require.NoError(t, cmd.Start())
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cmd.Process.Kill()
			cmd.Wait()
		})
	}
	t.Cleanup(stop)
	return stop
}
