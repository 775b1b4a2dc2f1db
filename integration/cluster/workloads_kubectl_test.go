package cluster

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
)

// looked are the pods that the tests of kubectl use.
var looked = []podUsers{{"own", "", false}, {"auto", autoHandler, true}}

func runKubectl(t *testing.T, ns namespace) {
	for _, u := range looked {
		ns.apply(t, `
apiVersion: v1
kind: Pod
metadata: {name: `+u.name+`}
spec:
`+u.spec()+`
  terminationGracePeriodSeconds: 1
  containers:
  - name: server
    `+image+`
    command: [sh, -c, "echo hello from $HOSTNAME; exec httpd -f -p 8080 -h /www"]
    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1, timeoutSeconds: 10}
`)
	}
	ns.wait(t, "pods", "condition=Ready", "--all")
	for _, u := range looked {
		requireDebug(t, ns, u.name)
	}
	requireKubectl(t, ns)
}

// requireKubectl inspects pods with kubectl.
func requireKubectl(t *testing.T, ns namespace) {
	t.Helper()
	for _, u := range looked {
		requireExec(t, ns, u.name)
		require.Equal(t, "hello from "+u.name+"\n", ns.kubectl(t, "logs", u.name, "--container=server"))
		requireCopy(t, ns, u.name)
		requireForward(t, ns, u.name)
	}
}

func requireExec(t *testing.T, ns namespace, pod string) {
	t.Helper()
	require.Equal(t, "over and back", ns.kubectlWith(t, "over and back", "exec", "--stdin", pod, "--container=server", "--", "cat"))
	_, err := ns.Kubectl(t.Context(), "", "exec", "--namespace="+ns.name, pod, "--container=server", "--", "sh", "-c", "echo to stderr >&2; exit 42")
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit)
	require.Equal(t, 42, exit.ExitCode())
	require.ErrorContains(t, err, "to stderr")
}

// requireCopy copies a file into a pod and back.
func requireCopy(t *testing.T, ns namespace, pod string) {
	t.Helper()
	dir := t.TempDir()
	there, back := filepath.Join(dir, "there"), filepath.Join(dir, "back")
	content := bytes.Repeat([]byte("to and fro\n"), 10_000)
	require.NoError(t, os.WriteFile(there, content, 0o640))
	ns.kubectl(t, "cp", "--container=server", there, pod+":/tmp/copy")
	require.Equal(t, "0 640\n", ns.exec(t, pod, "stat", "-c", "%u %a", "/tmp/copy"))
	ns.kubectl(t, "cp", "--container=server", pod+":/tmp/copy", back)
	copied, err := os.ReadFile(back)
	require.NoError(t, err)
	require.True(t, bytes.Equal(content, copied))
}

// requireForward fetches the page of a pod through a port on the loopback of the node.
func requireForward(t *testing.T, ns namespace, pod string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	cmd := ns.KubectlCommand(ctx, "port-forward", "--namespace="+ns.name, pod, ":8080")
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	require.NoError(t, ns.node.Inside(cmd.Start))
	defer func() {
		_ = cmd.Process.Kill() // kubectl ends by itself only after a failure
		_ = cmd.Wait()
	}()
	line, err := bufio.NewReader(stdout).ReadString('\n')
	require.NoError(t, err)
	var port int
	_, err = fmt.Sscanf(line, "Forwarding from 127.0.0.1:%d -> 8080", &port)
	require.NoError(t, err, line)
	require.Equal(t, harness.IndexPage, ns.fetch(t, fmt.Sprintf("127.0.0.1:%d", port)))
}

// requireDebug adds an ephemeral container to a pod, which sees the processes of another container.
func requireDebug(t *testing.T, ns namespace, pod string) {
	t.Helper()
	ns.kubectl(t, "debug", pod, "--container=debugger", "--target=server", "--image="+harness.BusyboxImage, "--image-pull-policy=Never",
		"--profile=general", "--", "sh", "-c", "tr '\\0' ' ' < /proc/1/cmdline; cat /proc/1/root/www/index.html; ip -o -4 addr show eth0")
	ns.wait(t, "pod/"+pod, "jsonpath={.status.ephemeralContainerStatuses[0].state.terminated.exitCode}=0")
	said := ns.kubectl(t, "logs", pod, "--container=debugger")
	require.Contains(t, said, "httpd -f -p 8080 -h /www")
	require.Contains(t, said, harness.IndexPage)
	require.Contains(t, said, ns.kubectl(t, "get", "pod", pod, "--output=jsonpath={.status.podIP}"))
}
