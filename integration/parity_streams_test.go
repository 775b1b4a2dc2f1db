package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	//lint:ignore SA1019 client-go takes the connections of no other yet
	"k8s.io/apimachinery/pkg/util/httpstream/spdy"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/util/cert"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// streamConfig serves streams by TLS, with a certificate of the node.
const streamConfig = `
[plugins.'io.containerd.grpc.v1.cri']
enable_tls_streaming = true
x509_key_pair_streaming = {tls_cert_file = %q, tls_key_file = %q}
`

// makeKeyPair makes a certificate for 127.0.0.1, and returns the files and the certificate as PEM.
func makeKeyPair(t *testing.T) (certFile, keyFile string, authority []byte) {
	t.Helper()
	chain, key, err := cert.GenerateSelfSignedCertKey("node", []net.IP{net.IPv4(127, 0, 0, 1)}, nil)
	require.NoError(t, err)
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	require.NoError(t, os.WriteFile(certFile, chain, 0o600))
	require.NoError(t, os.WriteFile(keyFile, key, 0o600))
	return certFile, keyFile, chain
}

// execClient runs programs in containers as kubectl does.
type execClient struct {
	t         *testing.T
	n         *harness.Node
	authority []byte // of the certificate of the streaming server
}

// trusted returns a TLS configuration for the streaming server at a host.
func (s *execClient) trusted(host string) *tls.Config {
	s.t.Helper()
	known := x509.NewCertPool()
	require.True(s.t, known.AppendCertsFromPEM(s.authority))
	return &tls.Config{RootCAs: known, ServerName: host}
}

// terminal is a size that is sent once.
type terminal struct{ told sync.Once }

func (q *terminal) Next() (size *remotecommand.TerminalSize) {
	q.told.Do(func() { size = &remotecommand.TerminalSize{Width: 123, Height: 45} })
	return size
}

// listener keeps the output of a program. Its channel is closed at the first output.
type listener struct {
	text  bytes.Buffer
	heard chan struct{}
	first sync.Once
}

func newListener() *listener { return &listener{heard: make(chan struct{})} }

func (l *listener) Write(p []byte) (int, error) {
	l.first.Do(func() { close(l.heard) })
	return l.text.Write(p)
}

// said returns the output without greetings.
func (l *listener) said() string {
	said := greetings.ReplaceAllString(l.text.String(), "")
	if len(said) > 1<<10 {
		said = fmt.Sprintf("%d bytes, %x", len(said), sha256.Sum256([]byte(said)))
	}
	return said
}

// greet is a shell program that greets until its input arrives. containerd starts the input of an
// attach before its output, so that a quick answer is lost (Attach in its internal/cri/io). A
// greeted client receives everything.
const greet = "(while sleep 0.05; do echo greetings; echo greetings >&2; done) & "

var greetings = regexp.MustCompile(`greetings\r?\n`)

// stream is what a client saw of a session. With wait, it sends nothing before the greeting.
func (s *execClient) stream(address string, tty, waits bool, in string) string {
	s.t.Helper()
	at, err := url.Parse(address)
	require.NoError(s.t, err)
	transport, err := spdy.NewRoundTripperWithConfig(spdy.RoundTripperConfig{
		UpgradeTransport: &http.Transport{DialContext: s.n.Dial, TLSClientConfig: s.trusted(at.Hostname())},
	})
	require.NoError(s.t, err)
	executor, err := remotecommand.NewSPDYExecutorForTransports(transport, transport, http.MethodPost, at)
	require.NoError(s.t, err)

	ctx, cancel := context.WithTimeout(s.t.Context(), waitFor)
	defer cancel()
	out, errors := newListener(), newListener()
	typed, keyboard := io.Pipe()
	defer keyboard.Close() // a terminal needs an open input
	options := remotecommand.StreamOptions{Stdin: typed, Stdout: out, Stderr: errors, Tty: tty}
	greeters := []*listener{out, errors}
	if tty {
		options.Stderr, options.TerminalSizeQueue, greeters = nil, &terminal{}, greeters[:1]
	}
	go func() {
		for _, from := range greeters {
			if !waits {
				break
			}
			select {
			case <-from.heard:
			case <-ctx.Done():
			}
		}
		_, _ = io.WriteString(keyboard, in)
		if !tty {
			keyboard.Close()
		}
	}()
	ended := executor.StreamWithContext(ctx, options)
	return fmt.Sprintf("out %q, err %q, end: %v", out.said(), errors.said(), ended)
}

func (s *execClient) exec(container *harness.Container, tty bool, in string, command ...string) string {
	s.t.Helper()
	resp, err := s.n.Runtime.Exec(s.t.Context(), &runtime.ExecRequest{ContainerId: container.ID, Cmd: command, Tty: tty, Stdin: true, Stdout: true, Stderr: !tty})
	require.NoError(s.t, err)
	return s.stream(resp.GetUrl(), tty, false, in)
}

// restart restarts containerd and waits for its streaming server: containerd serves requests before
// that listens, and until then its URLs have port 0, for pods of every handler.
func (s *execClient) restart(container *harness.Container) {
	s.t.Helper()
	require.NoError(s.t, s.n.Restart(s.t.Context()))
	require.EventuallyWithT(s.t, func(c *assert.CollectT) {
		resp, err := s.n.Runtime.Exec(s.t.Context(), &runtime.ExecRequest{ContainerId: container.ID, Cmd: []string{"true"}, Stdout: true})
		require.NoError(c, err)
		at, err := url.Parse(resp.GetUrl())
		require.NoError(c, err)
		require.NotEqual(c, "0", at.Port())
	}, waitFor, tick)
}

func (s *execClient) attach(container *harness.Container, tty bool, in string) string {
	s.t.Helper()
	resp, err := s.n.Runtime.Attach(s.t.Context(), &runtime.AttachRequest{ContainerId: container.ID, Tty: tty, Stdin: true, Stdout: true, Stderr: !tty})
	require.NoError(s.t, err)
	return s.stream(resp.GetUrl(), tty, true, in)
}

// sessionsOf returns what a client sees of programs in a pod, before and after a restart of
// containerd.
func (s *execClient) sessionsOf(handler string, config *runtime.PodSandboxConfig) facts {
	t, all := s.t, facts{}
	t.Helper()
	pod := startPod(t, s.n, handler, config)
	withStdin := func(tty, once bool, command ...string) harness.ContainerOption {
		return func(c *runtime.ContainerConfig) { c.Command, c.Stdin, c.StdinOnce, c.Tty = command, true, once, tty }
	}
	main := startContainer(t, pod, "main")
	cat := startContainer(t, pod, "cat", withStdin(false, true, "sh", "-c", greet+"cat; kill $!; echo bye >&2; exit 4"))
	shell := startContainer(t, pod, "shell", withStdin(true, false, "sh", "-c", "stty -echo; "+greet+"read line; kill $!; echo in $line; exit 5"))

	const both = "cat; echo to stderr >&2; exit 7"
	const sized = `until [ "$(stty size 2>&1)" = "45 123" ]; do sleep 0.02; done; read line; echo got $line; exit 7`
	look := func(when string) {
		all[when+" exec"] = s.exec(main, false, "hello\n", "sh", "-c", both)
		_, all[when+" exec on a terminal"], _ = strings.Cut(s.exec(main, true, "x\n", "sh", "-c", sized), "got") // the echo before may be missing
		all[when+" exec with much output"] = s.exec(main, false, "", "sh", "-c", "head -c 3000000 /dev/zero")
		all[when+" exec of a missing program"] = chance.ReplaceAllString(s.exec(main, false, "", "/nowhere"), "ID")
		resp, err := s.n.Runtime.ExecSync(t.Context(), &runtime.ExecSyncRequest{ContainerId: main.ID, Cmd: []string{"sh", "-c", both + "5"}})
		require.NoError(t, err)
		all[when+" exec sync"] = fmt.Sprintf("out %q, err %q, code %d", resp.GetStdout(), resp.GetStderr(), resp.GetExitCode())
	}
	look("first")
	all["attach"] = s.attach(cat, false, "to cat\n")
	all["attach ended"] = fmt.Sprint(waitExit(t, cat))
	s.restart(main)
	look("restarted")
	all["attach to a terminal, restarted"] = s.attach(shell, true, "x\n")
	all["attach to a terminal ended"] = fmt.Sprint(waitExit(t, shell))

	// A URL works once, and comes from the configured server.
	resp, err := s.n.Runtime.Exec(t.Context(), &runtime.ExecRequest{ContainerId: main.ID, Cmd: []string{"true"}, Stdin: true, Stdout: true, Stderr: true})
	require.NoError(t, err)
	all["a URL"] = s.stream(resp.GetUrl(), false, false, "")
	all["a URL again"] = s.stream(resp.GetUrl(), false, false, "")
	forwarded, err := s.n.Runtime.PortForward(t.Context(), &runtime.PortForwardRequest{PodSandboxId: pod.ID})
	require.NoError(t, err)
	all["certificate of forwards"] = s.certificate(forwarded.GetUrl())
	all["certificate"] = s.certificate(resp.GetUrl())
	return all
}

// certificate returns the certificate of the server at an address, and requires that it is valid
// for it.
func (s *execClient) certificate(address string) string {
	s.t.Helper()
	at, err := url.Parse(address)
	require.NoError(s.t, err)
	require.Equal(s.t, "https", at.Scheme)
	conn, err := s.n.Dial(s.t.Context(), "tcp", at.Host)
	require.NoError(s.t, err)
	secure := tls.Client(conn, s.trusted(at.Hostname()))
	defer secure.Close()
	require.NoError(s.t, secure.HandshakeContext(s.t.Context()))
	shown := secure.ConnectionState().PeerCertificates
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: shown[0].Raw}))
}

// A client of exec and attach sees the same of a program in a podfsm pod as in a stock pod.
func TestStreamsLikeStock(t *testing.T) {
	certFile, keyFile, authority := makeKeyPair(t)
	n := harness.StartNode(t, harness.Config{TOML: fmt.Sprintf(streamConfig, certFile, keyFile)})
	require.NoError(t, n.SetChain(t.Context(), bridge(n, "cni0", harness.Subnet)))
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	t.Run("pods", func(t *testing.T) {
		s := &execClient{t: t, n: n, authority: authority}
		stock, ours := s.sessionsOf(harness.StockHandler, n.PodConfig("stock")), s.sessionsOf(harness.PodfsmHandler, n.PodConfig("ours"))
		require.Equal(t, stock, ours)
		// The output is that of the program.
		const both = `out "hello\n", err "to stderr\n", end: command terminated with exit code 7`
		for _, when := range []string{"first", "restarted"} {
			require.Equal(t, both, ours[when+" exec"])
			require.Equal(t, ` x\r\n", err "", end: command terminated with exit code 7`, ours[when+" exec on a terminal"])
			require.Contains(t, ours[when+" exec with much output"], "3000000 bytes")
			require.Equal(t, `out "", err "to stderr\n", code 75`, ours[when+" exec sync"])
		}
		require.Equal(t, `out "to cat\n", err "bye\n", end: <nil>`, ours["attach"])
		require.Equal(t, "4", ours["attach ended"])
		require.Equal(t, `out "in x\r\n", err "", end: <nil>`, ours["attach to a terminal, restarted"])
		require.Equal(t, "5", ours["attach to a terminal ended"])
		require.Contains(t, ours["a URL"], "end: <nil>")
		require.Contains(t, ours["a URL again"], "404 page not found")
		require.Equal(t, ours["certificate"], ours["certificate of forwards"])
		require.True(t, strings.HasPrefix(string(authority), ours["certificate"]), "it is the one that was configured")
	})
	n.RequireClean(t, before)
}
