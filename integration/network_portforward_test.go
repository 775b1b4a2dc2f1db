package integration

import (
	"bytes"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/client-go/tools/portforward"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// startForward forwards ports of a pod until the test ends.
func startForward(t *testing.T, n *harness.Node, pod *harness.Pod, ports ...int) *forward {
	t.Helper()
	resp, err := n.Runtime.PortForward(t.Context(), &runtime.PortForwardRequest{PodSandboxId: pod.ID})
	require.NoError(t, err)
	return forwardThrough(t, n, resp.GetUrl(), ports...)
}

func TestPortForward(t *testing.T) {
	for _, config := range []struct{ name, scheme, toml string }{
		{"plain", "http", ""},
		{"TLS", "https", "[plugins.'io.containerd.grpc.v1.cri']\nenable_tls_streaming = true"},
	} {
		t.Run(config.name, func(t *testing.T) {
			n := harness.StartNode(t, harness.Config{TOML: config.toml})
			before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
			require.NoError(t, err)
			t.Run("pods", func(t *testing.T) { forwardPorts(t, n, config.scheme) })
			n.RequireClean(t, before)
		})
	}
}

func forwardPorts(t *testing.T, n *harness.Node, scheme string) {
	pod := startPod(t, n, harness.PodfsmHandler, n.PodConfig("served"))
	page := func(name, address string) {
		startContainer(t, pod, name, harness.Run("httpd", "-f", "-p", address, "-h", "/www"))
	}
	page("both", "80")
	page("six", "[::1]:81")
	echo := startContainer(t, pod, "echo", harness.Run("nc", "-ll", "-p", "9000", "-e", "cat"))
	require.Eventually(t, func() bool {
		listening := exec(t, echo, "netstat", "-ltn")
		return strings.Contains(listening, ":80 ") && strings.Contains(listening, ":81 ") && strings.Contains(listening, ":9000 ")
	}, waitFor, tick)

	resp, err := n.Runtime.PortForward(t.Context(), &runtime.PortForwardRequest{PodSandboxId: pod.ID[:12]})
	require.NoError(t, err)
	require.Regexp(t, "^"+scheme+"://127.0.0.1:", resp.GetUrl())

	f := startForward(t, n, pod, 80, 81, 9000)
	require.Equal(t, harness.IndexPage, f.get(t, 80))
	require.Equal(t, harness.IndexPage, f.get(t, 81), "by IPv6")

	// Both ways at once, and the rest comes back after the client has closed its side.
	conn, err := net.Dial("tcp", f.local[9000])
	require.NoError(t, err)
	defer conn.Close()
	sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<20) // 16 MiB
	wrote := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		_ = conn.(*net.TCPConn).CloseWrite()
		wrote <- err
	}()
	got, err := io.ReadAll(conn)
	require.NoError(t, err)
	require.NoError(t, <-wrote)
	require.True(t, bytes.Equal(sent, got), "%d bytes of %d came back", len(got), len(sent))

	// A server on the node's localhost is not reachable.
	node, err := n.Listen()
	require.NoError(t, err)
	reached := make(chan struct{})
	go func() {
		conn, err := node.Accept()
		if err == nil {
			close(reached)
			conn.Close()
		}
	}()
	port := node.Addr().(*net.TCPAddr).Port
	closed := startForward(t, n, pod, port)
	visit(t, closed.local[port])
	require.ErrorIs(t, closed.waitEnd(t), portforward.ErrLostConnectionToPod, "a closed port ends kubectl's forward")
	select {
	case <-reached:
		t.Fatal("the node's localhost was reached")
	default:
	}
	require.Equal(t, harness.IndexPage, f.get(t, 80), "other forwards go on")

	// A pod on the node's network shares its localhost.
	hostPod := startPod(t, n, harness.PodfsmHandler, n.PodConfig("on-node", harness.HostNetwork()))
	visit(t, startForward(t, n, hostPod, port).local[port])
	<-reached
	node.Close()

	// A forward ends with its pod.
	require.NoError(t, pod.Stop(t.Context()))
	require.ErrorIs(t, f.waitEnd(t), portforward.ErrLostConnectionToPod)
	_, err = n.Runtime.PortForward(t.Context(), &runtime.PortForwardRequest{PodSandboxId: pod.ID})
	require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
}

// A client may close its side and wait for its answer.
func TestPortForwardOfASlowAnswer(t *testing.T) {
	t.Parallel()
	n := harness.StartNode(t, harness.Config{})
	for _, tc := range []struct{ handler, want string }{
		{harness.PodfsmHandler, "late\n"}, {harness.StockHandler, ""},
	} {
		t.Run(tc.handler, func(t *testing.T) {
			pod := startPod(t, n, tc.handler, n.PodConfig("slow-"+tc.handler))
			slow := startContainer(t, pod, "slow", harness.Run("nc", "-ll", "-p", "9000", "-e", "sh", "-c", "cat; sleep 3; echo late"))
			require.Eventually(t, func() bool { return strings.Contains(exec(t, slow, "netstat", "-ltn"), ":9000 ") }, waitFor, tick)
			f := startForward(t, n, pod, 9000)
			conn, err := net.Dial("tcp", f.local[9000])
			require.NoError(t, err)
			defer conn.Close()
			require.NoError(t, conn.(*net.TCPConn).CloseWrite())
			require.NoError(t, conn.SetDeadline(time.Now().Add(waitFor)))
			got, err := io.ReadAll(conn)
			require.NoError(t, err)
			require.Equal(t, tc.want, string(got))
		})
	}
}

// visit connects and waits until the connection is closed.
func visit(t *testing.T, address string) {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	require.NoError(t, err)
	defer conn.Close()
	require.NoError(t, conn.SetDeadline(time.Now().Add(waitFor)))
	_, _ = io.ReadAll(conn) // ends with a reset or without
}
