package integration

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// answerUDP answers each packet to a port of a pod with a word and the packet, until the end of the
// network or of the test.
func answerUDP(t *testing.T, n *harness.Node, pod *harness.Pod, port int, word string) (end func()) {
	t.Helper()
	var conn *net.UDPConn
	require.NoError(t, ns.WithNetNSPath(pinOf(n, pod), func(ns.NetNS) (err error) {
		conn, err = net.ListenUDP("udp4", &net.UDPAddr{Port: port})
		return err
	}))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			packet := make([]byte, 16)
			size, from, err := conn.ReadFromUDP(packet)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = conn.WriteToUDP(append([]byte(word), packet[:size]...), from)
			}
		}
	}()
	end = func() {
		conn.Close()
		<-ended
	}
	t.Cleanup(end)
	return end
}

// A UDP port of the node moves from one pod to the next while a client keeps sending from the same
// port. The kernel keeps the flow for half a minute. The flow reaches the new pod, also if the
// client has sent while there was no pod.
func testUDPPortOfAReplacedPod(t *testing.T, n *harness.Node) {
	const port = 5300
	config := func(name string) *runtime.PodSandboxConfig {
		return n.PodConfig(name, func(c *runtime.PodSandboxConfig) {
			c.PortMappings = []*runtime.PortMapping{{Protocol: runtime.Protocol_UDP, ContainerPort: port, HostPort: port}}
		})
	}
	before := warmUp(t, n, harness.PodfsmHandler, config("pod"))
	for _, tc := range []struct {
		name      string
		meanwhile func(ask func() string)
	}{
		{"and is silent meanwhile", func(func() string) {}},
		{"and goes on meanwhile", func(ask func() string) { require.Empty(t, ask()) }},
		{"and containerd restarted", func(func() string) { require.NoError(t, n.Restart(t.Context())) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var client net.Conn
			require.NoError(t, n.Inside(func() (err error) {
				client, err = net.Dial("udp4", net.JoinHostPort(harness.Gateway, "5300"))
				return err
			}))
			defer client.Close()
			asked := 0
			ask := func() string {
				asked++
				question := fmt.Sprint("?", asked)
				if _, err := client.Write([]byte(question)); err != nil {
					return "" // the port had no server
				}
				require.NoError(t, client.SetReadDeadline(time.Now().Add(200*time.Millisecond)))
				for answer := make([]byte, 32); ; {
					size, err := client.Read(answer)
					if err != nil {
						return ""
					}
					if word, found := strings.CutSuffix(string(answer[:size]), question); found {
						return word
					} // else it answers an earlier question
				}
			}
			first := runPod(t, n, config("first"))
			end := answerUDP(t, n, first, port, "first")
			require.Eventually(t, func() bool { return ask() == "first" }, waitFor, tick)
			end()
			require.NoError(t, first.StopAndRemove(t.Context()))
			tc.meanwhile(ask)
			second := runPod(t, n, config("second"))
			end = answerUDP(t, n, second, port, "second")
			require.Eventually(t, func() bool { return ask() == "second" }, 15*time.Second, tick, "long before the kernel forgets the flow")
			end()
			require.NoError(t, second.StopAndRemove(t.Context()))
			n.RequireClean(t, before)
		})
	}
}
