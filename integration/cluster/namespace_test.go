package cluster

import (
	"fmt"
	"io"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
)

// namespace is a namespace of Kubernetes.
type namespace struct {
	*cluster
	name string
}

func (c *cluster) namespaceOf(name string) namespace { return namespace{c, name} }

// label is the label of the namespaces of tests.
const label = "podfsm.test"

// namespace makes a namespace, and waits until pods can be created in it.
func (c *cluster) namespace(t *testing.T, name string) namespace {
	t.Helper()
	c.kubectlWith(t, fmt.Sprintf("apiVersion: v1\nkind: Namespace\nmetadata: {name: %s, labels: {%s: here}}\n", name, label), "apply", "--filename=-")
	ns := c.namespaceOf(name)
	ns.wait(t, "serviceaccount/default", "create")
	ns.wait(t, "configmap/kube-root-ca.crt", "create")
	return ns
}

func (ns namespace) kubectl(t require.TestingT, args ...string) string {
	return ns.kubectlWith(t, "", args...)
}

func (ns namespace) kubectlWith(t require.TestingT, stdin string, args ...string) string {
	return ns.cluster.kubectlWith(t, stdin, append([]string{"--namespace=" + ns.name}, args...)...)
}

func (ns namespace) getJSON(t require.TestingT, value any, args ...string) {
	ns.cluster.getJSON(t, value, append([]string{"--namespace=" + ns.name}, args...)...)
}

func (ns namespace) wait(t require.TestingT, object, what string, args ...string) {
	ns.cluster.wait(t, object, what, append(args, "--namespace="+ns.name)...)
}

func (ns namespace) apply(t require.TestingT, manifest string) {
	ns.kubectlWith(t, manifest, "apply", "--filename=-")
}

// rolledOut waits until all pods of a workload are up to date and ready.
func (ns namespace) rolledOut(t require.TestingT, workload string) {
	ns.kubectl(t, "rollout", "status", workload, "--timeout="+wait.String())
}

func (ns namespace) pods(t require.TestingT) []corev1.Pod {
	var pods corev1.PodList
	ns.getJSON(t, &pods, "get", "pods")
	return pods.Items
}

// exec runs a program in the first container of a pod and returns its stdout.
func (ns namespace) exec(t require.TestingT, pod string, command ...string) string {
	return ns.kubectl(t, append([]string{"exec", pod, "--"}, command...)...)
}

// fetch returns the page at an address, requested from the node.
func (ns namespace) fetch(t *testing.T, address string) string {
	t.Helper()
	client := ns.node.HTTP()
	client.Timeout = wait
	resp, err := client.Get("http://" + address)
	require.NoError(t, err)
	defer resp.Body.Close()
	page, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return string(page)
}
