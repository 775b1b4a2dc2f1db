package cri

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/websocket"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/util/cert"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/podfsm/podfsm/internal/roottest"
)

// nodeNetNS is the network namespace that the tests run in. /proc/self stands for the main thread, which stays in a pod's namespace for good
// when it is the one that has made it: Go ends any other thread that is never unlocked.
const nodeNetNS = "/proc/thread-self/ns/net"

// podNetNS pins a new network namespace with its lo up, as a pod's.
func podNetNS(t *testing.T) string {
	t.Helper()
	roottest.Require(t)
	path := filepath.Join(t.TempDir(), "netns")
	require.NoError(t, os.WriteFile(path, nil, 0o444))
	done := make(chan error)
	go func() {
		goruntime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- errors.Join(
			unix.Unshare(unix.CLONE_NEWNET),
			unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""))
	}()
	require.NoError(t, <-done)
	t.Cleanup(func() { require.NoError(t, unix.Unmount(path, unix.MNT_DETACH)) })
	inside(t, path, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	return path
}

func inside(t *testing.T, path string, f func() error) {
	t.Helper()
	require.NoError(t, ns.WithNetNSPath(path, func(ns.NetNS) error { return f() }))
}

// listenIn serves connections to an address in a network namespace with f, and returns the port.
func listenIn(t *testing.T, path, address string, f func(*net.TCPConn)) int {
	t.Helper()
	var listener net.Listener
	inside(t, path, func() (err error) {
		listener, err = net.Listen("tcp", address)
		return err
	})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			f(conn.(*net.TCPConn))
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		listener.Close()
		<-ended
	})
	return listener.Addr().(*net.TCPAddr).Port
}

// forwarding are streams into the pod "s1", which has a network of its own, with the daemon's localhost beside it.
func forwarding(t *testing.T, config Streaming) (s *streams, netNS string) {
	netNS = podNetNS(t)
	pods := map[string]Sandbox{"s1": {Config: podConfig(), Ready: true, NetNSPath: netNS}}
	config.Address = "127.0.0.1"
	s = newStreams(config, func(id string) (Sandbox, bool) { pod, ok := pods[id]; return pod, ok })
	t.Cleanup(func() { require.NoError(t, s.close()) })
	return s, netNS
}

// client is a SPDY client as kubectl is one.
type client struct {
	t    *testing.T
	conn httpstream.Connection
	last int
}

func connect(t *testing.T, address string) *client {
	t.Helper()
	transport, err := spdy.NewRoundTripper(&tls.Config{InsecureSkipVerify: true})
	require.NoError(t, err)
	request, err := http.NewRequest(http.MethodPost, address, nil)
	require.NoError(t, err)
	request.Header.Set(httpstream.HeaderProtocolVersion, portforward.SupportedProtocols[0])
	response, err := (&http.Client{Transport: transport, Timeout: soon}).Do(request)
	require.NoError(t, err)
	defer response.Body.Close()
	conn, err := transport.NewConnection(response)
	require.NoError(t, err)
	t.Cleanup(func() {
		conn.Close()
		<-conn.CloseChan()
	})
	return &client{t: t, conn: conn}
}

// open begins a forward. What comes on the stream of errors ends with the forward.
func (c *client) open(port int) (data httpstream.Stream, ended <-chan string) {
	c.t.Helper()
	c.last++
	headers := http.Header{}
	headers.Set(portforward.PortHeader, strconv.Itoa(port))
	headers.Set(portforward.PortForwardRequestIDHeader, strconv.Itoa(c.last))
	headers.Set(portforward.StreamType, portforward.StreamTypeError)
	failures, err := c.conn.CreateStream(headers)
	require.NoError(c.t, err)
	failures.Close()
	headers.Set(portforward.StreamType, portforward.StreamTypeData)
	data, err = c.conn.CreateStream(headers)
	require.NoError(c.t, err)
	text := make(chan string, 1)
	go func() {
		all, _ := io.ReadAll(failures)
		text <- string(all)
	}()
	return data, text
}

func (c *client) end(ended <-chan string) string {
	c.t.Helper()
	select {
	case text := <-ended:
		return text
	case <-time.After(soon):
		c.t.Fatal("the forward has not ended")
		return ""
	}
}

// forwardTo is a client of a new forward to a port.
func forwardTo(t *testing.T, s *streams, port int) (*client, httpstream.Stream, <-chan string) {
	t.Helper()
	address, err := s.issue("s1", nil)
	require.NoError(t, err)
	c := connect(t, address)
	data, ended := c.open(port)
	return c, data, ended
}

func echo(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) }

func TestForwardMovesMuchBothWays(t *testing.T) {
	s, netNS := forwarding(t, Streaming{})
	c, data, ended := forwardTo(t, s, listenIn(t, netNS, "127.0.0.1:0", echo))

	sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<20) // 16 MiB
	wrote := make(chan error, 1)
	go func() {
		_, err := io.Copy(data, struct{ io.Reader }{bytes.NewReader(sent)}) // in frames, which have a greatest size
		wrote <- errors.Join(err, data.Close())
	}()
	got, err := io.ReadAll(data)
	require.NoError(t, err)
	require.NoError(t, <-wrote)
	require.True(t, bytes.Equal(sent, got), "%d bytes of %d came back", len(got), len(sent))
	require.Empty(t, c.end(ended))
}

// The end of what one side sends is not the end of what the other does, however long that takes.
func TestForwardHalfCloses(t *testing.T) {
	t.Run("client", func(t *testing.T) {
		s, netNS := forwarding(t, Streaming{})
		c, data, ended := forwardTo(t, s, listenIn(t, netNS, "127.0.0.1:0", func(conn *net.TCPConn) {
			asked, _ := io.ReadAll(conn)
			time.Sleep(2*lingering + lingering/2) // an answer that takes long
			fmt.Fprintf(conn, "%d bytes", len(asked))
		}))
		_, err := data.Write([]byte("question"))
		require.NoError(t, err)
		require.NoError(t, data.Close())
		got, err := io.ReadAll(data)
		require.NoError(t, err)
		require.Equal(t, "8 bytes", string(got))
		require.Empty(t, c.end(ended))
	})
	t.Run("pod", func(t *testing.T) {
		s, netNS := forwarding(t, Streaming{})
		received := make(chan string, 1)
		c, data, ended := forwardTo(t, s, listenIn(t, netNS, "127.0.0.1:0", func(conn *net.TCPConn) {
			_ = conn.CloseWrite()
			all, _ := io.ReadAll(conn)
			received <- string(all)
		}))
		got, err := io.ReadAll(data)
		require.NoError(t, err)
		require.Empty(t, got)
		var sent strings.Builder
		for part := range 4 { // longer than the pod is waited for when nothing comes
			fmt.Fprint(&sent, part)
			_, err := fmt.Fprint(data, part)
			require.NoError(t, err)
			time.Sleep(lingering / 2)
		}
		require.NoError(t, data.Close())
		require.Empty(t, c.end(ended))
		require.Equal(t, sent.String(), <-received)
	})
}

// Clients wait for the end of a forward before they close what they have been told is closed.
func TestForwardEndsAfterThePod(t *testing.T) {
	s, netNS := forwarding(t, Streaming{})
	c, data, ended := forwardTo(t, s, listenIn(t, netNS, "127.0.0.1:0", func(conn *net.TCPConn) { fmt.Fprint(conn, "bye") }))
	got, err := io.ReadAll(data)
	require.NoError(t, err)
	require.Equal(t, "bye", string(got))
	require.Empty(t, c.end(ended))
}

func TestForwardByIPv6(t *testing.T) {
	s, netNS := forwarding(t, Streaming{})
	c, data, ended := forwardTo(t, s, listenIn(t, netNS, "[::1]:0", func(conn *net.TCPConn) { fmt.Fprint(conn, "six") }))
	got, err := io.ReadAll(data)
	require.NoError(t, err)
	require.Equal(t, "six", string(got))
	require.Empty(t, c.end(ended))
}

// A port that is open on the node and not in the pod is closed. The connection goes on for other ports.
func TestForwardNeverReachesTheNode(t *testing.T) {
	s, netNS := forwarding(t, Streaming{})
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		port := listenIn(t, nodeNetNS, address, func(*net.TCPConn) { t.Error("the node's localhost was reached") })
		c, _, ended := forwardTo(t, s, port)
		text := c.end(ended)
		require.Contains(t, text, fmt.Sprintf("failed to connect to port %d on the localhost of pod \"default/web\"", port))
		require.Equal(t, 2, strings.Count(text, "connection refused"), text)

		data, ended := c.open(listenIn(t, netNS, "127.0.0.1:0", echo))
		_, err := data.Write([]byte("still there"))
		require.NoError(t, err)
		require.NoError(t, data.Close())
		got, err := io.ReadAll(data)
		require.NoError(t, err)
		require.Equal(t, "still there", string(got))
		require.Empty(t, c.end(ended))
	}
}

// Whoever ends a forward, the pod's connection ends with it.
func TestForwardIsCancelled(t *testing.T) {
	for name, cancel := range map[string]func(*testing.T, *streams, *client, httpstream.Stream){
		"the client goes":              func(_ *testing.T, _ *streams, c *client, _ httpstream.Stream) { c.conn.Close() },
		"the client gives a stream up": func(t *testing.T, _ *streams, _ *client, data httpstream.Stream) { require.NoError(t, data.Reset()) },
		"the pod is stopped": func(_ *testing.T, s *streams, c *client, _ httpstream.Stream) {
			s.endPod("s2")
			select {
			case <-c.conn.CloseChan():
				t.Error("another pod's end has ended it")
			default:
			}
			s.endPod("s1")
			<-c.conn.CloseChan()
		},
		"containerd stops": func(t *testing.T, s *streams, c *client, _ httpstream.Stream) {
			require.NoError(t, s.close())
			<-c.conn.CloseChan()
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, netNS := forwarding(t, Streaming{})
			accepted, gone := make(chan struct{}), make(chan struct{})
			// It ignores that the client has closed its side.
			c, data, _ := forwardTo(t, s, listenIn(t, netNS, "127.0.0.1:0", func(conn *net.TCPConn) {
				close(accepted)
				for _, err := conn.Write([]byte("on and on")); err == nil; _, err = conn.Write([]byte("on and on")) {
					time.Sleep(10 * time.Millisecond)
				}
				close(gone)
			}))
			<-accepted
			cancel(t, s, c, data)
			select {
			case <-gone:
			case <-time.After(soon):
				t.Fatal("the pod's connection is still there")
			}
		})
	}
}

// cuttable passes the connections of clients on to a server. After the cut, no packet of the server arrives any more, and none is sent.
func cuttable(t *testing.T, address string) (through string, cut func()) {
	server, err := url.Parse(address)
	require.NoError(t, err)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	target := server.Host
	var passing sync.WaitGroup
	var mu sync.Mutex
	var to []*net.TCPConn
	passing.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			conn, err := (&net.Dialer{KeepAlive: -1}).Dial("tcp", target)
			if err != nil {
				client.Close()
				return
			}
			mu.Lock()
			to = append(to, conn.(*net.TCPConn))
			mu.Unlock()
			passing.Go(func() { _, _ = io.Copy(conn, client); conn.Close() })
			passing.Go(func() { _, _ = io.Copy(client, conn); client.Close() })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		mu.Lock()
		for _, conn := range to {
			conn.Close()
		}
		mu.Unlock()
		passing.Wait()
	})
	server.Host = listener.Addr().String()
	return server.String(), func() {
		mu.Lock()
		defer mu.Unlock()
		nothing := &unix.SockFprog{Len: 1, Filter: &unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}}
		for _, conn := range to {
			raw, err := conn.SyscallConn()
			require.NoError(t, err)
			require.NoError(t, raw.Control(func(fd uintptr) {
				require.NoError(t, unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, nothing))
			}))
		}
	}
}

// The network of many clients is cut, of quiet ones and of ones that are being sent something. What their forwards hold is given back.
func TestForwardsWhoseNetworkIsCut(t *testing.T) {
	for name, send := range map[string]func(*net.TCPConn){
		"quiet": func(conn *net.TCPConn) { _, _ = io.Copy(io.Discard, conn) },
		"busy": func(conn *net.TCPConn) {
			for _, err := conn.Write([]byte("on and on")); err == nil; _, err = conn.Write([]byte("on and on")) {
				time.Sleep(10 * time.Millisecond)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			const clients = 50
			s, netNS := forwarding(t, Streaming{})
			s.cut = time.Second
			var reached, gone atomic.Int32
			var connections sync.WaitGroup
			port := listenIn(t, netNS, "127.0.0.1:0", func(conn *net.TCPConn) {
				reached.Add(1)
				own, err := conn.File() // it is the listener's to close
				require.NoError(t, err)
				duplicate, err := net.FileConn(own)
				own.Close()
				require.NoError(t, err)
				connections.Go(func() {
					send(duplicate.(*net.TCPConn))
					duplicate.Close()
					gone.Add(1)
				})
			})
			var cuts []func()
			for range clients {
				address, err := s.issue("s1", nil)
				require.NoError(t, err)
				through, cut := cuttable(t, address)
				cuts = append(cuts, cut)
				connect(t, through).open(port)
			}
			require.Eventually(t, func() bool { return reached.Load() == clients }, soon, time.Millisecond)
			for _, cut := range cuts {
				cut()
			}
			require.Eventually(t, func() bool {
				s.mu.Lock()
				defer s.mu.Unlock()
				return len(s.sessions) == 0
			}, soon, 10*time.Millisecond, "the sessions go on")
			require.Eventually(t, func() bool { return gone.Load() == clients }, soon, 10*time.Millisecond, "connections into the pod stay")
			connections.Wait()
		})
	}
}

// A client may read nothing for longer than a network may be cut: its kernel acknowledges the probes of its closed window. It then gets
// everything.
func TestForwardToAPausedClient(t *testing.T) {
	for name, config := range map[string]Streaming{"plain": {}, "TLS": {TLS: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const size = 32 << 20
			s, netNS := forwarding(t, config)
			s.cut = time.Second
			sent := make(chan struct{})
			c, data, ended := forwardTo(t, s, listenIn(t, netNS, "127.0.0.1:0", func(conn *net.TCPConn) {
				_, _ = io.Copy(conn, io.LimitReader(zeros{}, size))
				close(sent)
			}))
			select {
			case <-sent:
				t.Fatal("the forward has ended, or the buffers hold everything")
			case <-time.After(4 * s.cut):
			}
			got, err := io.Copy(io.Discard, data)
			require.NoError(t, err)
			require.EqualValues(t, size, got)
			require.Empty(t, c.end(ended))
		})
	}
}

// The kernel's figures say a cut only while something that was sent waits for its acknowledgement.
func TestUnansweredFor(t *testing.T) {
	for name, tc := range map[string]struct {
		info unix.TCPInfo
		want time.Duration
	}{
		"quiet":                        {unix.TCPInfo{Last_ack_recv: 90_000, Last_data_sent: 90_000}, 0},
		"a first probe":                {unix.TCPInfo{Probes: 1, Last_ack_recv: 90_000}, 4 * time.Second},
		"probes, lately answered":      {unix.TCPInfo{Probes: 1, Last_ack_recv: 300}, 300 * time.Millisecond},
		"data on its way":              {unix.TCPInfo{Unacked: 3, Last_data_sent: 100, Last_ack_recv: 2000}, 2 * time.Second},
		"data in a full buffer's wait": {unix.TCPInfo{Unacked: 3, Last_data_sent: 60_000, Last_ack_recv: 60_000}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, tc.want, unansweredFor(&tc.info, 4*time.Second))
		})
	}
}

// A client that doesn't read must not hold up what ends the forward.
func TestForwardToADeafClientIsCancelled(t *testing.T) {
	s, netNS := forwarding(t, Streaming{})
	sending := make(chan struct{})
	forwardTo(t, s, listenIn(t, netNS, "127.0.0.1:0", func(conn *net.TCPConn) {
		_, _ = io.Copy(conn, io.LimitReader(zeros{}, 64<<20))
		close(sending)
	}))
	select {
	case <-sending:
		t.Fatal("the client reads")
	case <-time.After(lingering):
	}
	s.endPod("s1")
	<-sending
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func TestForwardByTLS(t *testing.T) {
	dir := t.TempDir()
	chain, key, err := cert.GenerateSelfSignedCertKey("node", nil, nil)
	require.NoError(t, err)
	files := Streaming{TLS: true}
	files.KeyPair.Cert, files.KeyPair.Key = filepath.Join(dir, "chain"), filepath.Join(dir, "key")
	require.NoError(t, os.WriteFile(files.KeyPair.Cert, chain, 0o600))
	require.NoError(t, os.WriteFile(files.KeyPair.Key, key, 0o600))

	for name, config := range map[string]Streaming{"signs itself": {TLS: true}, "from files": files} {
		t.Run(name, func(t *testing.T) {
			s, netNS := forwarding(t, config)
			c, data, ended := forwardTo(t, s, listenIn(t, netNS, "127.0.0.1:0", func(conn *net.TCPConn) { fmt.Fprint(conn, "sealed") }))
			require.Equal(t, "https", s.url.Scheme)
			got, err := io.ReadAll(data)
			require.NoError(t, err)
			require.Equal(t, "sealed", string(got))
			require.Empty(t, c.end(ended))
			plain, err := http.Get("http://" + s.url.Host)
			require.NoError(t, err)
			plain.Body.Close()
			require.Equal(t, http.StatusBadRequest, plain.StatusCode) // Go's server tells a plain client what is wrong
		})
	}
	t.Run("files that aren't there", func(t *testing.T) {
		files.KeyPair.Cert = filepath.Join(dir, "none")
		s, _ := forwarding(t, files)
		_, err := s.issue("s1", nil)
		require.True(t, errdefs.IsUnavailable(err), "%v", err)
	})
}

// A WebSocket carries pairs of channels, for the ports that the CRI request named.
func TestForwardByWebSocket(t *testing.T) {
	s, netNS := forwarding(t, Streaming{})
	over := make(chan struct{}, 1)
	port := listenIn(t, netNS, "127.0.0.1:0", func(conn *net.TCPConn) {
		echo(conn)
		over <- struct{}{}
	})
	address, err := s.issue("s1", []int32{int32(port), 70000})
	require.NoError(t, err)
	address = "ws" + strings.TrimPrefix(address, "http")
	config, err := websocket.NewConfig(address, "http://localhost")
	require.NoError(t, err)
	config.Protocol = []string{"v4.channel.k8s.io"}
	ws, err := config.DialContext(t.Context())
	require.NoError(t, err)
	require.NoError(t, ws.SetDeadline(time.Now().Add(soon)))

	require.NoError(t, websocket.Message.Send(ws, []byte("\x00hello")))
	got := make(map[byte][]byte)
	for !strings.HasSuffix(string(got[0]), "hello") || !strings.Contains(string(got[3]), "70000") {
		var frame []byte
		require.NoError(t, websocket.Message.Receive(ws, &frame))
		got[frame[0]] = append(got[frame[0]], frame[1:]...)
	}
	require.Equal(t, string(binary.LittleEndian.AppendUint16(nil, uint16(port)))+"hello", string(got[0]))
	require.Contains(t, string(got[3]), "invalid port 70000")
	require.NoError(t, ws.Close())
	<-over
}

func TestTicketsAreForOneUse(t *testing.T) {
	s, _ := forwarding(t, Streaming{})
	first, err := s.issue("s1", nil)
	require.NoError(t, err)
	second, err := s.issue("s1", nil)
	require.NoError(t, err)
	require.NotEqual(t, first, second)

	connect(t, first)
	late, err := url.Parse(second)
	require.NoError(t, err)
	s.mu.Lock()
	one := s.tickets[filepath.Base(late.Path)]
	one.until = time.Now().Add(-time.Second)
	s.tickets[filepath.Base(late.Path)] = one
	s.mu.Unlock()
	for name, address := range map[string]string{"used": first, "late": second, "unknown": first + "x"} {
		response, err := http.Post(address, "", nil)
		require.NoError(t, err, name)
		response.Body.Close()
		require.Equal(t, http.StatusNotFound, response.StatusCode, name)
	}
	// A client that does not speak SPDY gets an error.
	odd, err := s.issue("s1", nil)
	require.NoError(t, err)
	response, err := http.Post(odd, "", nil)
	require.NoError(t, err)
	said, err := io.ReadAll(response.Body)
	require.NoError(t, err)
	response.Body.Close()
	require.Equal(t, http.StatusBadRequest, response.StatusCode)
	require.Contains(t, string(said), "unable to upgrade")
	http.DefaultClient.CloseIdleConnections()

	s.mu.Lock()
	clear(s.tickets)
	s.mu.Unlock()
	for range maxTickets {
		_, err := s.issue("s1", nil)
		require.NoError(t, err)
	}
	_, err = s.issue("s1", nil)
	require.True(t, errdefs.IsResourceExhausted(err), "%v", err)
	require.NoError(t, s.close())
	_, err = s.issue("s1", nil)
	require.True(t, errdefs.IsUnavailable(err), "%v", err)
}

// What was a running pod when the URL was handed out may have stopped by the time its client comes.
func TestForwardIntoAPodThatHasStopped(t *testing.T) {
	for name, pod := range map[string]*Sandbox{
		"gone":         nil,
		"not ready":    {Config: podConfig(), NetNSPath: "/somewhere"},
		"without path": {Config: podConfig(), Ready: true},
		"no namespace": {Config: podConfig(), Ready: true, NetNSPath: os.DevNull},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStreams(Streaming{Address: "127.0.0.1"}, func(string) (Sandbox, bool) {
				if pod == nil {
					return Sandbox{}, false
				}
				return *pod, true
			})
			t.Cleanup(func() { require.NoError(t, s.close()) })
			c, _, ended := forwardTo(t, s, 80)
			require.Contains(t, c.end(ended), "error forwarding port 80")
		})
	}
}

func TestStreamingRefusesWhatItCannotServe(t *testing.T) {
	for name, config := range map[string]Streaming{
		"address": {Address: "192.0.2.1"},
		"timeout": {Address: "127.0.0.1", IdleTimeout: "long"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStreams(config, nil)
			_, err := s.issue("s1", nil)
			require.True(t, errdefs.IsUnavailable(err), "%v", err)
			require.NoError(t, s.close())
		})
	}
	_, err := dialInside(context.Background(), nodeNetNS, 0)
	require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
}
