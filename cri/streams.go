package cri

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	netutil "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/util/cert"
	"k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
)

// Streaming is how containerd's CRI configuration wants streams to be served, in its JSON form.
type Streaming struct {
	// Address is an IP address to listen on; "" is the one that the node's default route leaves from.
	Address string `json:"streamServerAddress"`
	// IdleTimeout is a positive duration like "4h", after which a connection without traffic is closed; "" is 4 hours.
	IdleTimeout string `json:"streamIdleTimeout"`
	// TLS asks for https, with a certificate that signs itself unless KeyPair names the files of another.
	TLS     bool `json:"enableTLSStreaming"`
	KeyPair struct {
		Cert string `json:"tlsCertFile"`
		Key  string `json:"tlsKeyFile"`
	} `json:"x509KeyPairStreaming"`
}

// ticketLife is how long a URL stays valid, containerd's own figure. maxTickets is how many URLs may be unused at a
// time.
const (
	ticketLife = time.Minute
	maxTickets = 1000
)

// cutTimeout is how long a client's kernel may acknowledge nothing of what it was sent. After that, the client's
// network counts as cut. The kernel's own limits are minutes for a quiet connection, and a quarter of an hour for
// one with data on its way.
const cutTimeout = 30 * time.Second

// streams serves port forwards into pods with a network of their own. It is an HTTP server on the address of
// containerd's streaming server, which would connect to the node's localhost, and on a port of its own. It listens
// from the first request on.
type streams struct {
	config Streaming
	pod    func(id string) (Sandbox, bool)
	ctx    context.Context // ends with close
	stop   context.CancelCauseFunc
	cut    time.Duration // see cutTimeout

	mu       sync.Mutex
	closed   bool
	server   *http.Server // nil before the first request
	url      url.URL
	idle     time.Duration
	tickets  map[string]ticket // by the secret in their URL
	sessions map[*session]struct{}
	running  sync.WaitGroup // everything that close waits for
}

// ticket is a URL whose client hasn't connected yet.
type ticket struct {
	pod   string
	ports []int32 // for a WebSocket client, which doesn't name them itself
	until time.Time
}

func newStreams(config Streaming, pod func(id string) (Sandbox, bool)) *streams {
	s := &streams{config: config, pod: pod, cut: cutTimeout, tickets: map[string]ticket{}, sessions: map[*session]struct{}{}}
	s.ctx, s.stop = context.WithCancelCause(context.Background())
	return s
}

// issue returns a URL that forwards into a pod, once, within a minute. It fails with Unavailable if the server can't
// listen.
func (s *streams) issue(pod string, ports []int32) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return "", errClosed
	}
	if s.server == nil {
		if err := s.listen(); err != nil {
			return "", fmt.Errorf("failed to serve port forwards on %q, the stream_server_address of containerd's CRI configuration: %w: %w", s.config.Address, err, errdefs.ErrUnavailable)
		}
	}
	now := time.Now()
	maps.DeleteFunc(s.tickets, func(_ string, t ticket) bool { return now.After(t.until) })
	if len(s.tickets) >= maxTickets {
		return "", fmt.Errorf("%d port forwards wait for their clients already; try again in a minute: %w", len(s.tickets), errdefs.ErrResourceExhausted)
	}
	secret := rand.Text()
	s.tickets[secret] = ticket{pod: pod, ports: ports, until: now.Add(ticketLife)}
	return s.url.JoinPath("portforward", secret).String(), nil
}

var errClosed = fmt.Errorf("containerd is stopping: %w", errdefs.ErrUnavailable)

// listen starts the server. The caller holds mu.
func (s *streams) listen() error {
	idle, secure, err := s.config.read()
	if err != nil {
		return err
	}
	address := s.config.Address
	if address == "" {
		ip, err := netutil.ResolveBindAddress(nil)
		if err != nil {
			return err
		}
		address = ip.String()
	}
	// On a quiet connection, the client's kernel has only these probes to acknowledge.
	keepAlive := net.KeepAliveConfig{Enable: true, Idle: s.cut / 2, Interval: s.cut / 4, Count: 2}
	listening := net.ListenConfig{KeepAliveConfig: keepAlive}
	listener, err := listening.Listen(s.ctx, "tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		return err
	}
	s.url, s.idle = url.URL{Scheme: "http", Host: listener.Addr().String()}, idle
	if secure != nil {
		s.url.Scheme = "https"
		listener = tls.NewListener(listener, secure)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/portforward/{secret}", s.serve)
	s.server = &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: ticketLife,
		IdleTimeout:       ticketLife,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
	}
	s.running.Go(func() {
		if err := s.server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			log.L.WithError(err).Error("port forward server failed")
		}
	})
	return nil
}

// connKey finds a request's connection in its context.
type connKey struct{}

// read parses the configuration of containerd's own server.
func (c Streaming) read() (idle time.Duration, secure *tls.Config, err error) {
	idle = streaming.DefaultConfig.StreamIdleTimeout
	if c.IdleTimeout != "" {
		if idle, err = time.ParseDuration(c.IdleTimeout); err != nil {
			return 0, nil, fmt.Errorf("invalid stream_idle_timeout: %w", err)
		}
	}
	if !c.TLS {
		return idle, nil, nil
	}
	load := selfSigned
	if c.KeyPair.Cert != "" {
		load = func() (tls.Certificate, error) { return tls.LoadX509KeyPair(c.KeyPair.Cert, c.KeyPair.Key) }
	}
	certificate, err := load()
	if err != nil {
		return 0, nil, fmt.Errorf("failed to load the certificate for TLS: %w", err)
	}
	// Streams are upgraded connections, which HTTP/2 doesn't have.
	return idle, &tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: []string{"http/1.1"}}, nil
}

// selfSigned makes a certificate for the node's name and addresses, as containerd does if none is configured.
func selfSigned() (tls.Certificate, error) {
	host, err := os.Hostname()
	if err != nil {
		return tls.Certificate{}, err
	}
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		return tls.Certificate{}, err
	}
	var ips []net.IP
	var names []string // for clients that look for an address among the names
	for _, address := range addresses {
		if network, ok := address.(*net.IPNet); ok {
			ips, names = append(ips, network.IP), append(names, network.IP.String())
		}
	}
	chain, key, err := cert.GenerateSelfSignedCertKey(host, ips, names)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.X509KeyPair(chain, key)
}

// serve serves a client with a ticket. It returns when the client's connection has ended.
func (s *streams) serve(w http.ResponseWriter, r *http.Request) {
	session, err := s.begin(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	defer s.end(session)
	s.running.Go(session.watch)
	portforward.ServePortForward(w, r, session, session.pod, "", &portforward.V4Options{Ports: session.ports},
		s.idle, streaming.DefaultConfig.StreamCreationTimeout, portforward.SupportedProtocols)
}

// begin redeems the ticket of a request.
func (s *streams) begin(r *http.Request) (*session, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	secret := r.PathValue("secret")
	ticket, ok := s.tickets[secret]
	delete(s.tickets, secret)
	switch {
	case s.closed:
		return nil, errClosed
	case !ok || time.Now().After(ticket.until):
		return nil, errors.New("this URL is unknown, used, or older than a minute")
	}
	one := newSession(s, r, ticket)
	s.sessions[one] = struct{}{}
	s.running.Add(1)
	return one, nil
}

func (s *streams) end(one *session) {
	one.unwatch()
	one.cancel(errClientGone)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, one)
	s.running.Done()
}

// enter counts a forward in until the caller calls leave.
func (s *streams) enter() (leave func(), _ error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed
	}
	s.running.Add(1)
	return s.running.Done, nil
}

// endPod ends all forwards into a pod, and their clients' connections.
func (s *streams) endPod(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for one := range s.sessions {
		if one.pod == id {
			one.cancel(errPodStopped)
		}
	}
}

// close ends the server and all that it serves, and waits for the end.
func (s *streams) close() error {
	s.mu.Lock()
	s.closed = true
	server := s.server
	s.mu.Unlock()
	s.stop(errClosed)
	var err error
	if server != nil {
		err = server.Close()
	}
	s.running.Wait()
	return err
}
