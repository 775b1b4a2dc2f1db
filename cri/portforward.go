package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/plugins/pkg/ns"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream/wsstream"

	"github.com/podfsm/podfsm/ledger/records"
)

const (
	// dialTimeout bounds the connection to a port, once for IPv4 and once for IPv6. A pod's firewall may drop packets.
	dialTimeout = 10 * time.Second
	// lingering is how long the client must be quiet before a forward ends whose pod has closed its side. It is the
	// figure of containerd and of socat.
	lingering = time.Second
)

var (
	errClientGone = errors.New("the client has gone")
	errPodStopped = errors.New("the pod was stopped")
	errCut        = errors.New("the client acknowledges nothing any more")
)

// PortForward answers for podfsm pods with a network of their own. containerd's service takes them for pods on the
// node's network, and would forward to the node's localhost.
func (s *service) PortForward(ctx context.Context, r *runtime.PortForwardRequest) (*runtime.PortForwardResponse, error) {
	id, pod, ok := s.find(ctx, r.GetPodSandboxId())
	if !ok || records.OnNodeNetwork(pod.Config) {
		return s.RuntimeServiceServer.PortForward(ctx, r)
	}
	if err := forwardable(pod); err != nil {
		return nil, err
	}
	url, err := s.streams.issue(id, r.GetPort())
	if err != nil {
		return nil, err
	}
	return &runtime.PortForwardResponse{Url: url}, nil
}

// forwardable fails with FailedPrecondition unless the pod is up.
func forwardable(pod Sandbox) error {
	if !pod.Ready || pod.NetNSPath == "" {
		return fmt.Errorf("pod %q isn't ready, so no port can be forwarded into it: %w", records.PodName(pod.Config), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// session is one client's connection: any number of forwards into one pod.
type session struct {
	streams *streams
	pod     string
	ports   []int32
	conn    net.Conn
	// duplex says that the client can close one direction of a stream, as in SPDY: it may still read after the last
	// byte that it sends. A WebSocket's channels end only with their connection.
	duplex bool
	ctx    context.Context
	cancel context.CancelCauseFunc
	// unwatch detaches the connection from the session, whose end would end it. The client may still wait for an
	// answer.
	unwatch func() bool
}

func newSession(s *streams, r *http.Request, t ticket) *session {
	one := &session{streams: s, pod: t.pod, ports: t.ports, duplex: !wsstream.IsWebSocketRequest(r)}
	one.ctx, one.cancel = context.WithCancelCause(s.ctx)
	// The end of the session ends all that blocks on the client's connection. Whoever gets that error closes it.
	one.conn = r.Context().Value(connKey{}).(net.Conn)
	one.unwatch = context.AfterFunc(one.ctx, func() { _ = one.conn.SetDeadline(time.Now()) })
	return one
}

// PortForward forwards one stream to a port of the pod's localhost, until both sides have closed it. It implements
// portforward.PortForwarder, whose context never ends; the session's does.
func (s *session) PortForward(_ context.Context, _, _ string, port int32, stream io.ReadWriteCloser) error {
	leave, err := s.streams.enter()
	if err != nil {
		return err
	}
	defer leave()
	conn, err := s.dial(port)
	if err != nil {
		// Write returns once the client knows that its stream is open. A stream that is reset earlier carries no reason.
		_, _ = stream.Write(nil)
		return err
	}
	return s.forward(conn, stream)
}

// dial connects to a port of the pod, which may have stopped since the session began.
func (s *session) dial(port int32) (*net.TCPConn, error) {
	pod, ok := s.streams.pod(s.pod)
	if !ok {
		return nil, fmt.Errorf("sandbox %q is gone: %w", s.pod, errdefs.ErrNotFound)
	}
	if err := forwardable(pod); err != nil {
		return nil, err
	}
	conn, err := dialInside(s.ctx, pod.NetNSPath, port)
	if err != nil {
		return nil, fmt.Errorf("failed to connect to port %d on the localhost of pod %q: %w", port, records.PodName(pod.Config), err)
	}
	return conn, nil
}

// dialInside connects to a port of the localhost in a network namespace, by IPv4, then by IPv6. Only the dialing
// thread enters the namespace, and leaves it afterwards.
func dialInside(ctx context.Context, netNS string, port int32) (*net.TCPConn, error) {
	if port < 1 || port > 65535 {
		return nil, fmt.Errorf("invalid port %d: %w", port, errdefs.ErrInvalidArgument)
	}
	var conn net.Conn
	err := ns.WithNetNSPath(netNS, func(ns.NetNS) error {
		dialer := &net.Dialer{Timeout: dialTimeout}
		// One literal address at a time. For a name or for several addresses, the dialer starts goroutines, which run on
		// other threads.
		var err4, err6 error
		if conn, err4 = dialer.DialContext(ctx, "tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port)))); err4 == nil {
			return nil
		}
		if conn, err6 = dialer.DialContext(ctx, "tcp6", net.JoinHostPort("::1", strconv.Itoa(int(port)))); err6 != nil {
			return fmt.Errorf("%w; %w", err4, err6)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

// forward copies both ways until both sides have closed, or one is gone. It owns conn. The error is that of the pod's side.
func (s *session) forward(conn *net.TCPConn, stream io.ReadWriteCloser) error {
	toPod, toClient := startCopy(conn, stream, conn.CloseWrite), startCopy(stream, conn, stream.Close)
	err := s.await(toPod, toClient, stream)
	conn.Close()
	stream.Close()
	if stream, ok := stream.(interface{ Reset() error }); ok {
		_ = stream.Reset() // wakes its readers, which Close alone doesn't
	}
	<-toPod.done
	<-toClient.done
	return err
}

// await returns when a forward is over.
func (s *session) await(toPod, toClient *copying, stream io.ReadWriteCloser) error {
	select {
	case <-toClient.done:
		// The client may still send, and the pod may still read. Not every client closes its side after the pod did.
		for sent := int64(-1); toClient.err == nil && sent != toPod.moved.Load(); {
			sent = toPod.moved.Load()
			if s.within(lingering, toPod.done) {
				break
			}
		}
	case <-toPod.done:
		for s.duplex && !wasReset(stream) && !s.within(lingering, toClient.done) {
			continue // the pod may take its time to answer
		}
	case <-s.ctx.Done():
	}
	switch cause := context.Cause(s.ctx); {
	case errors.Is(cause, errClientGone):
		return nil // no client is left to tell
	case cause != nil:
		return cause
	case toClient.over():
		return toClient.err
	default:
		return nil
	}
}

// within waits for done, at most for a time. The end of the session counts as done.
func (s *session) within(limit time.Duration, done <-chan struct{}) bool {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-s.ctx.Done():
		return true
	case <-timer.C:
		return false
	}
}

// wasReset says whether the client gave up a stream that it had not closed before. A SPDY stream ends its readers
// the same way after a reset and after the client's last byte, and accepts writes without an error.
func wasReset(stream io.ReadWriteCloser) bool {
	spdy, ok := stream.(interface{ IsFinished() bool })
	return ok && spdy.IsFinished()
}

// copying is one direction of a forward.
type copying struct {
	moved atomic.Int64  // bytes
	done  chan struct{} // closed once err is set
	err   error
}

// startCopy copies until from ends, then closes that direction of to.
func startCopy(to io.Writer, from io.Reader, closeWrite func() error) *copying {
	c := &copying{done: make(chan struct{})}
	go func() {
		defer close(c.done)
		_, c.err = io.Copy(to, io.TeeReader(from, c))
		_ = closeWrite() // fails where the other side has gone, as the copy then has
	}()
	return c
}

// Write counts what passes by.
func (c *copying) Write(p []byte) (int, error) {
	c.moved.Add(int64(len(p)))
	return len(p), nil
}

func (c *copying) over() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}
