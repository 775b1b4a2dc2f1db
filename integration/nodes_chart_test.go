package integration

import (
	"bytes"
	"io"
	"os"
	osexec "os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	k8syaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"

	"github.com/podfsm/podfsm/integration/harness"
)

const chart = "../deploy/helm/podfsm"

// rendered are the objects of the chart.
type rendered struct {
	daemonSet    appsv1.DaemonSet
	account      corev1.ServiceAccount
	role         rbacv1.ClusterRole
	binding      rbacv1.ClusterRoleBinding
	policy       admissionv1.ValidatingAdmissionPolicy
	enforced     admissionv1.ValidatingAdmissionPolicyBinding
	runtimeClass *nodev1.RuntimeClass
}

// The chart's objects have no field that Kubernetes doesn't know, whatever the values are, and may do no more than they need.
func TestChart(t *testing.T) {
	helm, err := harness.BuildHelm(t.Context())
	require.NoError(t, err)
	run := func(args ...string) (string, error) {
		var stderr bytes.Buffer
		cmd := osexec.CommandContext(t.Context(), helm, args...)
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		return string(out) + stderr.String(), err
	}
	render := func(values ...string) rendered {
		args := []string{"template", "podfsm", chart, "--namespace", "kube-system"}
		for _, value := range values {
			args = append(args, "--set", value)
		}
		out, err := run(args...)
		require.NoError(t, err, out)
		return decode(t, out)
	}
	out, err := run("lint", "--strict", chart)
	require.NoError(t, err, out)

	r := render()
	container := r.daemonSet.Spec.Template.Spec.Containers[0]
	require.Equal(t, []string{"install"}, container.Args)
	require.Equal(t, "podfsm-deploy:0.1.0", container.Image)
	require.Equal(t, []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: []string{"patch"}}}, r.role.Rules)
	require.Equal(t, []rbacv1.Subject{{Kind: "ServiceAccount", Name: r.account.Name, Namespace: "kube-system"}}, r.binding.Subjects)
	require.Equal(t, r.account.Name, r.daemonSet.Spec.Template.Spec.ServiceAccountName)
	require.Equal(t, `request.userInfo.username == "system:serviceaccount:kube-system:podfsm-deploy"`, r.policy.Spec.MatchConditions[0].Expression)
	require.Equal(t, r.policy.Name, r.enforced.Spec.PolicyName)
	require.Equal(t, []admissionv1.ValidationAction{admissionv1.Deny}, r.enforced.Spec.ValidationActions)
	require.False(t, r.daemonSet.Spec.Template.Spec.HostNetwork)
	require.Len(t, r.daemonSet.Spec.Template.Spec.Volumes, 2, "of the host, podfsm-deploy's own directory is all that it mounts")
	require.Equal(t, map[string]string{"podfsm.io/installed": "true"}, r.runtimeClass.Scheduling.NodeSelector)
	require.Equal(t, "podfsm", r.runtimeClass.Handler)

	r = render("mode=uninstall", "uninstall.force=true", "image.repository=r.example:5000/podfsm-deploy", "image.tag=1.2.3", "imagePullSecrets[0].name=s",
		"affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchFields[0].key=metadata.name",
		"tolerations=null", "runtimeClass.create=false", "maxUnavailable=10%", "nodeSelector.pool=a")
	container = r.daemonSet.Spec.Template.Spec.Containers[0]
	require.Equal(t, []string{"uninstall"}, container.Args)
	require.Equal(t, "r.example:5000/podfsm-deploy:1.2.3", container.Image)
	require.Contains(t, container.Env, corev1.EnvVar{Name: "PODFSM_DRAIN_FORCE", Value: "1"})
	require.Equal(t, "s", r.daemonSet.Spec.Template.Spec.ImagePullSecrets[0].Name)
	require.Empty(t, r.daemonSet.Spec.Template.Spec.Tolerations)
	require.Nil(t, r.runtimeClass)

	for _, wrong := range []string{"mode=remove", "unknown=1", "containerdSocket=relative"} {
		out, err := run("template", "podfsm", chart, "--set", wrong)
		require.Error(t, err, out)
	}
}

// The manifests are the chart with its own values.
func TestManifests(t *testing.T) {
	helm, err := harness.BuildHelm(t.Context())
	require.NoError(t, err)
	out, err := osexec.CommandContext(t.Context(), helm, "template", "podfsm", chart, "--namespace", "kube-system").Output()
	require.NoError(t, err)
	is, err := os.ReadFile("../deploy/manifests/podfsm.yaml")
	require.NoError(t, err)
	require.Equal(t, "# Rendered from deploy/helm/podfsm by make manifests; do not edit.\n"+string(out), string(is), "make manifests writes it")
}

// The commands in the page about the chart have values that the chart knows, and name its DaemonSet.
func TestCommandsOfChart(t *testing.T) {
	helm, err := harness.BuildHelm(t.Context())
	require.NoError(t, err)
	page, err := os.ReadFile("../docs/howto/install-on-a-cluster.md")
	require.NoError(t, err)
	ran := map[string]int{}
	for command := range strings.Lines(strings.ReplaceAll(string(page), "\\\n", " ")) {
		args := strings.Fields(command)
		if len(args) < 3 || args[0] != "$" {
			continue
		}
		ran[args[1]+" "+args[2]]++
		switch {
		case args[1] == "helm":
			require.Equal(t, []string{"podfsm", "deploy/helm/podfsm", "--namespace", "kube-system"}, args[3:7])
			values := slices.DeleteFunc(args[7:], func(arg string) bool { return arg == "--reuse-values" })
			cmd := osexec.CommandContext(t.Context(), helm, append([]string{"template", "podfsm", chart}, values...)...)
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, "%s: %s", command, out)
			name := decode(t, string(out)).daemonSet.Name
			require.Contains(t, string(page), "rollout status daemonset/"+name)
			require.Contains(t, string(page), "logs --selector app.kubernetes.io/name="+name)
		case args[1] == "kubectl":
			require.Equal(t, []string{"--namespace", "kube-system"}, args[2:4])
		case args[1] == "journalctl":
			require.Equal(t, "podfsm-switch", args[3], "as in podfsm-deploy")
		default:
			require.Fail(t, "no test runs this command", command)
		}
	}
	require.Equal(t, map[string]int{"helm install": 1, "helm upgrade": 2, "kubectl --namespace": 3, "journalctl --unit": 1}, ran)
}

// decode reads objects strictly, each of which there is once at most.
func decode(t *testing.T, text string) (r rendered) {
	t.Helper()
	for documents := k8syaml.NewDocumentDecoder(io.NopCloser(bytes.NewBufferString(text))); ; {
		document := make([]byte, 1<<16)
		n, err := documents.Read(document)
		if err == io.EOF {
			return r
		}
		require.NoError(t, err)
		document = document[:n]
		var kind metav1.TypeMeta
		require.NoError(t, yaml.Unmarshal(document, &kind))
		var object any
		switch kind.APIVersion + " " + kind.Kind {
		case "apps/v1 DaemonSet":
			object = &r.daemonSet
		case "v1 ServiceAccount":
			object = &r.account
		case "rbac.authorization.k8s.io/v1 ClusterRole":
			object = &r.role
		case "rbac.authorization.k8s.io/v1 ClusterRoleBinding":
			object = &r.binding
		case "admissionregistration.k8s.io/v1 ValidatingAdmissionPolicy":
			object = &r.policy
		case "admissionregistration.k8s.io/v1 ValidatingAdmissionPolicyBinding":
			object = &r.enforced
		case "node.k8s.io/v1 RuntimeClass":
			r.runtimeClass = &nodev1.RuntimeClass{}
			object = r.runtimeClass
		default:
			require.FailNow(t, "unexpected object", "%s", document)
		}
		require.NoError(t, yaml.UnmarshalStrict(document, object), "%s", document)
	}
}
