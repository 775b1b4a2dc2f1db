package integration

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"k8s.io/client-go/tools/remotecommand"
	clientexec "k8s.io/client-go/util/exec"

	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/integration/kubelet"
)

// requireForward fetches a page of a pod through the kubelet, as `kubectl port-forward` does.
func requireForward(t *testing.T, n *harness.Node, k *kubelet.Kubelet, pod string, port int, path, want string) {
	t.Helper()
	f := forwardThrough(t, n, k.URL(kubelet.PodPath("portForward", pod)), port)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: waitFor}
	resp, err := client.Get("http://" + f.local[port] + path)
	require.NoError(t, err)
	defer resp.Body.Close()
	page, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, want, string(page))
}

// podSummary is what a metrics server reads of a pod from the kubelet.
type podSummary struct {
	PodRef  struct{ Name string }
	CPU     struct{ UsageCoreNanoSeconds uint64 }
	Memory  struct{ UsageBytes uint64 }
	Network struct {
		Name    string
		RxBytes uint64
	}
	Containers []struct{ Name string }
}

// requireSummary waits until the kubelet has the containers of a pod, and network figures with at
// least this number of received bytes.
func requireSummary(t *testing.T, k *kubelet.Kubelet, pod string, received uint64, containers ...string) (of podSummary) {
	t.Helper()
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		name := kubeletPods(t.Context(), c, k)[pod].Metadata.Name
		var summary struct{ Pods []podSummary }
		require.NoError(c, k.GetJSON(t.Context(), "/stats/summary", &summary))
		i := slices.IndexFunc(summary.Pods, func(s podSummary) bool { return s.PodRef.Name == name })
		require.GreaterOrEqual(c, i, 0)
		of = summary.Pods[i]
		require.Equal(c, "eth0", of.Network.Name)
		require.GreaterOrEqual(c, of.Network.RxBytes, received)
		require.NotZero(c, of.CPU.UsageCoreNanoSeconds)
		require.NotZero(c, of.Memory.UsageBytes)
		var names []string
		for _, container := range of.Containers {
			names = append(names, container.Name)
		}
		require.ElementsMatch(c, containers, names)
	}, kubeletWait, kubeletTick)
	return of
}

// requireTrueSummary compares the kubelet's network figures of a pod with the counters in its first
// container.
func requireTrueSummary(t *testing.T, n *harness.Node, k *kubelet.Kubelet, pod string, containers ...string) {
	t.Helper()
	counted := func() uint64 {
		_, line, _ := strings.Cut(kubectlExec(t, n, k, pod, containers[0], "cat", "/proc/net/dev"), "eth0:")
		received, err := strconv.ParseUint(strings.Fields(line)[0], 10, 64)
		require.NoError(t, err)
		return received
	}
	summary := requireSummary(t, k, pod, counted(), containers...)
	require.LessOrEqual(t, summary.Network.RxBytes, counted())

	// What Prometheus reads. The last figure of a line is its time.
	line := regexp.MustCompile(`container_network_receive_bytes_total{.*interface="eth0".*pod="` + summary.PodRef.Name + `"} (\d+)`)
	found := line.FindStringSubmatch(kubeletText(t, k, "/metrics/cadvisor"))
	require.NotEmpty(t, found)
	received, err := strconv.ParseUint(found[1], 10, 64)
	require.NoError(t, err)
	require.GreaterOrEqual(t, received, summary.Network.RxBytes)
	require.LessOrEqual(t, received, counted())
}

// kubeletText returns the text at a path of the kubelet's API.
func kubeletText(t *testing.T, k *kubelet.Kubelet, path string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitFor)
	defer cancel()
	body, err := k.Get(ctx, path)
	require.NoError(t, err)
	defer body.Close()
	text, err := io.ReadAll(body)
	require.NoError(t, err)
	return string(text)
}

// streamer returns client-go's executor for an exec or attach through the kubelet, as kubectl makes
// it, with the streams of its options.
func streamer(t *testing.T, n *harness.Node, k *kubelet.Kubelet, path string, command []string, o remotecommand.StreamOptions) remotecommand.Executor {
	t.Helper()
	query := url.Values{"command": command}
	for name, wanted := range map[string]bool{"input": o.Stdin != nil, "output": o.Stdout != nil, "error": o.Stderr != nil, "tty": o.Tty} {
		if wanted {
			query.Set(name, "1")
		}
	}
	address, err := url.Parse(k.URL(path))
	require.NoError(t, err)
	address.RawQuery = query.Encode()
	transport := upgradeTransport(t, n)
	executor, err := remotecommand.NewSPDYExecutorForTransports(transport, transport, http.MethodPost, address)
	require.NoError(t, err)
	return executor
}

// stream runs a program through the kubelet until its end.
func stream(t *testing.T, n *harness.Node, k *kubelet.Kubelet, pod, container string, command []string, o remotecommand.StreamOptions) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitFor)
	defer cancel()
	return streamer(t, n, k, kubelet.PodPath("exec", pod, container), command, o).StreamWithContext(ctx, o)
}

// kubectlExec is `kubectl exec` of a program that succeeds and writes nothing to stderr. It returns
// its stdout.
func kubectlExec(t *testing.T, n *harness.Node, k *kubelet.Kubelet, pod, container string, command ...string) string {
	t.Helper()
	var stdout, stderr bytes.Buffer
	err := stream(t, n, k, pod, container, command, remotecommand.StreamOptions{Stdout: &stdout, Stderr: &stderr})
	require.NoError(t, err, "%q: %s", command, &stderr)
	require.Empty(t, stderr.String(), "%q", command)
	return stdout.String()
}

// kubectlLogs is `kubectl logs`, with options in the form of the kubelet's query.
func kubectlLogs(t *testing.T, k *kubelet.Kubelet, pod, container, options string) string {
	t.Helper()
	return kubeletText(t, k, kubelet.PodPath("containerLogs", pod, container)+"?"+options)
}

// size is the constant size of a terminal.
type size remotecommand.TerminalSize

func (s *size) Next() *remotecommand.TerminalSize {
	if s.Width == 0 {
		return nil
	}
	next := remotecommand.TerminalSize(*s)
	*s = size{}
	return &next
}

// requireExec runs programs in a container that fail, read, write, and look at their terminal.
func requireExec(t *testing.T, n *harness.Node, k *kubelet.Kubelet, pod, container string) {
	t.Helper()
	sent := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB
	var stdout, stderr bytes.Buffer
	err := stream(t, n, k, pod, container, []string{"sh", "-c", "cat; echo from stderr >&2; exit 7"},
		remotecommand.StreamOptions{Stdin: strings.NewReader(sent), Stdout: &stdout, Stderr: &stderr})
	var exit clientexec.CodeExitError
	require.ErrorAs(t, err, &exit)
	require.Equal(t, 7, exit.Code)
	require.Equal(t, "from stderr\n", stderr.String())
	require.True(t, sent == stdout.String(), "%d bytes of %d came back", stdout.Len(), len(sent))

	stdout.Reset()
	err = stream(t, n, k, pod, container, []string{"sh", "-c", `until [ "$(stty size 2> /dev/null)" = "40 100" ]; do sleep 0.1; done; test -t 2 && echo resized`},
		remotecommand.StreamOptions{Stdout: &stdout, Tty: true, TerminalSizeQueue: &size{Width: 100, Height: 40}})
	require.NoError(t, err)
	require.Equal(t, "resized\r\n", stdout.String())

	err = stream(t, n, k, pod, container, []string{"no-such-program"}, remotecommand.StreamOptions{Stdout: io.Discard})
	require.ErrorContains(t, err, "no-such-program")
}

// requireConversation attaches to a container that answers what it is told, and follows its log meanwhile.
func requireConversation(t *testing.T, n *harness.Node, k *kubelet.Kubelet, pod, container, word string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitFor)
	defer cancel()
	// The kubelet answers with the first line, so there has to be one.
	log, err := k.Get(ctx, kubelet.PodPath("containerLogs", pod, container)+"?follow=true&tailLines=1")
	require.NoError(t, err)
	defer log.Close()
	logged := bufio.NewScanner(log)
	require.True(t, logged.Scan(), "%v", logged.Err())

	in, said := io.Pipe()
	heard, out := io.Pipe()
	attached, detach := context.WithCancel(ctx)
	ended := make(chan error, 1)
	streams := remotecommand.StreamOptions{Stdin: in, Stdout: out}
	attach := streamer(t, n, k, kubelet.PodPath("attach", pod, container), nil, streams)
	go func() {
		ended <- attach.StreamWithContext(attached, streams)
		out.Close()
	}()
	// containerd starts an attach's input before its output, so that a quick answer is lost (Attach in its internal/cri/io): it is told
	// again, as a person would who hears nothing.
	answers := make(chan string, 1)
	go func() {
		answer, _ := bufio.NewReader(heard).ReadString('\n')
		answers <- answer
	}()
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		_, err := fmt.Fprintln(said, word)
		require.NoError(c, err)
		select {
		case answer := <-answers:
			require.Equal(c, "heard "+word+"\n", answer)
		case <-time.After(kubeletTick):
			require.Fail(c, "no answer")
		}
	}, waitFor, kubeletTick)
	detach()
	said.Close()
	require.ErrorIs(t, <-ended, context.Canceled)

	require.True(t, logged.Scan(), "%v", logged.Err())
	require.Equal(t, "heard "+word, logged.Text())
	require.True(t, strings.HasSuffix(kubectlLogs(t, k, pod, container, ""), "heard "+word+"\n"))
}
