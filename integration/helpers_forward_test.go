package integration

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	//lint:ignore SA1019 client-go takes the connections of no other yet
	"k8s.io/apimachinery/pkg/util/httpstream/spdy"
	"k8s.io/client-go/tools/portforward"
	clientspdy "k8s.io/client-go/transport/spdy"

	"github.com/podfsm/podfsm/integration/harness"
)

// forward is a `kubectl port-forward`: that of client-go, on local ports of its choice.
type forward struct {
	local map[int]string // local addresses by the pod's port
	ended chan error
	said  *bytes.Buffer // the output of client-go; read it after the end
}

// forwardThrough forwards through a server that is reachable from the node: that of containerd or
// podfsm, or the kubelet.
func forwardThrough(t *testing.T, n *harness.Node, server string, ports ...int) *forward {
	t.Helper()
	address, err := url.Parse(server)
	require.NoError(t, err)
	transport := upgradeTransport(t, n)
	var wanted []string
	for _, port := range ports {
		wanted = append(wanted, fmt.Sprintf("0:%d", port))
	}
	f := &forward{local: map[int]string{}, ended: make(chan error, 1), said: &bytes.Buffer{}}
	stop, ready := make(chan struct{}), make(chan struct{})
	dialer := clientspdy.NewDialer(transport, &http.Client{Transport: transport}, http.MethodPost, address)
	forwarder, err := portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, wanted, stop, ready, io.Discard, f.said)
	require.NoError(t, err)
	go func() { f.ended <- forwarder.ForwardPorts() }()
	t.Cleanup(func() {
		close(stop)
		<-f.ended
	})
	select {
	case <-ready:
	case err := <-f.ended:
		f.ended <- err
		t.Fatal("the forward did not start: ", err)
	}
	got, err := forwarder.GetPorts()
	require.NoError(t, err)
	for _, port := range got {
		f.local[int(port.Remote)] = fmt.Sprintf("127.0.0.1:%d", port.Local)
	}
	return f
}

// upgradeTransport connects streams of client-go to servers that are reachable from the node and
// have self-signed certificates.
func upgradeTransport(t *testing.T, n *harness.Node) *spdy.SpdyRoundTripper {
	t.Helper()
	transport, err := spdy.NewRoundTripperWithConfig(spdy.RoundTripperConfig{
		UpgradeTransport: &http.Transport{DialContext: n.Dial, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}},
	})
	require.NoError(t, err)
	return transport
}

// waitEnd waits until client-go ends the forward.
func (f *forward) waitEnd(t *testing.T) error {
	t.Helper()
	select {
	case err := <-f.ended:
		f.ended <- err
		return err
	case <-time.After(waitFor):
		t.Fatal("the forward has not ended")
		return nil
	}
}

// get fetches the index page at a port of the pod.
func (f *forward) get(t *testing.T, port int) string {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: waitFor}
	resp, err := client.Get("http://" + f.local[port])
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return string(body)
}
