package cluster

import (
	"context"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
)

// withoutKubelet are two nodes that need no kubelet, a pod of podfsm-deploy on one of them, and the right to read nodes, which kubectl
// needs for each patch.
const withoutKubelet = `
apiVersion: v1
kind: Node
metadata: {name: own, labels: {zone: a}}
---
apiVersion: v1
kind: Node
metadata: {name: other}
---
apiVersion: v1
kind: Pod
metadata: {name: podfsm-deploy, namespace: kube-system}
spec:
  serviceAccountName: podfsm-deploy
  nodeName: own
  containers: [{name: main, image: none}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: reader}
rules: [{apiGroups: [""], resources: [nodes], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: reader}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: reader}
subjects: [{kind: ServiceAccount, name: podfsm-deploy, namespace: kube-system}]
`

// The token of podfsm-deploy's pod changes one label of one node.
func TestAccountOfDeploy(t *testing.T) {
	programs, err := harness.BuildCluster(t.Context())
	require.NoError(t, err)
	n := harness.StartNode(t, harness.Config{})
	_, err = n.WarmUp(t.Context(), harness.PodfsmHandler) // makes the bridge
	require.NoError(t, err)
	control, err := NewControlPlane(t.Context(), n, programs)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, control.Close(context.WithoutCancel(t.Context()))) })
	manifests, err := os.ReadFile("../../deploy/manifests/podfsm.yaml")
	require.NoError(t, err)
	kubectl := func(stdin string, args ...string) (string, error) {
		return control.Kubectl(t.Context(), stdin, args...)
	}
	require.EventuallyWithT(t, func(t *assert.CollectT) { // until the controllers have made the namespace
		_, err := kubectl(withoutDaemonSet(string(manifests))+"\n---\n"+withoutKubelet, "apply", "-f", "-")
		require.NoError(t, err)
	}, wait, tick)
	token, err := kubectl("", "create", "token", "podfsm-deploy", "--namespace", "kube-system", "--bound-object-kind", "Pod", "--bound-object-name", "podfsm-deploy")
	require.NoError(t, err)
	patch := func(token, node, patch string) error {
		_, err := kubectl("", "--token", strings.TrimSpace(token), "patch", "node", node, "--type", "merge", "--patch", patch)
		return err
	}
	const label = `{"metadata": {"labels": {"podfsm.io/installed": "true"}}}`
	require.EventuallyWithT(t, func(t *assert.CollectT) { // until the API server enforces the policy
		assert.ErrorContains(t, patch(token, "other", label), "podfsm-deploy may change only the node that it runs on")
	}, wait, tick)
	for _, patched := range []string{label, `{"metadata": {"labels": {"podfsm.io/installed": null}}}`} {
		require.NoError(t, patch(token, "own", patched))
	}
	for _, patched := range []string{
		`{"metadata": {"labels": {"zone": "b"}}}`,
		`{"metadata": {"labels": {"zone": null}}}`,
		`{"metadata": {"labels": {"new": "label"}}}`,
		`{"metadata": {"labels": null}}`,
		`{"metadata": {"annotations": {"new": "annotation"}}}`,
		`{"metadata": {"finalizers": ["new.example/finalizer"]}}`,
		`{"spec": {"unschedulable": true}}`,
		`{"spec": {"taints": [{"key": "new", "effect": "NoExecute"}]}}`,
	} {
		require.ErrorContains(t, patch(token, "own", patched), "podfsm-deploy may change only the label podfsm.io/installed", patched)
	}
	unbound, err := kubectl("", "create", "token", "podfsm-deploy", "--namespace", "kube-system")
	require.NoError(t, err)
	require.ErrorContains(t, patch(unbound, "own", label), "podfsm-deploy may change only the node that it runs on", "a token of no pod")
}

// withoutDaemonSet are manifests without the DaemonSet.
func withoutDaemonSet(manifests string) string {
	var kept []string
	for _, document := range strings.Split(manifests, "\n---\n") {
		if !strings.Contains(document, "kind: DaemonSet") {
			kept = append(kept, document)
		}
	}
	return strings.Join(kept, "\n---\n")
}
