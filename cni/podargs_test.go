package cni

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestPodArgs(t *testing.T) {
	args, capabilities, err := PodArgs("id", &runtime.PodSandboxConfig{
		Metadata:    &runtime.PodSandboxMetadata{Name: "web", Namespace: "shop", Uid: "u-1"},
		Annotations: map[string]string{"kubernetes.io/ingress-bandwidth": "10M", "a": "b"},
		Linux:       &runtime.LinuxPodSandboxConfig{CgroupParent: "/kubepods/pod1"},
		DnsConfig:   &runtime.DNSConfig{Servers: []string{"10.0.0.10"}, Searches: []string{"svc"}, Options: []string{"ndots:5"}},
		PortMappings: []*runtime.PortMapping{
			{ContainerPort: 80, HostPort: 8080, HostIp: "127.0.0.1"},
			{ContainerPort: 81},
			{ContainerPort: 53, HostPort: 53, Protocol: runtime.Protocol_UDP},
			{ContainerPort: 99, HostPort: 99, Protocol: runtime.Protocol_SCTP},
			{ContainerPort: 82, HostPort: -1},
			nil,
		},
	})
	require.NoError(t, err)
	require.Equal(t, Args{
		{"IgnoreUnknown", "1"},
		{"K8S_POD_NAMESPACE", "shop"},
		{"K8S_POD_NAME", "web"},
		{"K8S_POD_INFRA_CONTAINER_ID", "id"},
		{"K8S_POD_UID", "u-1"},
	}, args)
	want := map[string]string{
		"io.kubernetes.cri.pod-annotations": `{"kubernetes.io/ingress-bandwidth":"10M","a":"b"}`,
		"bandwidth":                         `{"IngressRate":10000000,"IngressBurst":4294967295,"EgressRate":0,"EgressBurst":0}`,
		"cgroupPath":                        `"/kubepods/pod1"`,
		"dns":                               `{"Servers":["10.0.0.10"],"Searches":["svc"],"Options":["ndots:5"]}`,
		"portMappings": `[
			{"HostPort":8080,"ContainerPort":80,"Protocol":"tcp","HostIP":"127.0.0.1"},
			{"HostPort":53,"ContainerPort":53,"Protocol":"udp","HostIP":""},
			{"HostPort":99,"ContainerPort":99,"Protocol":"sctp","HostIP":""}]`,
	}
	require.Len(t, capabilities, len(want))
	for name, value := range want {
		require.JSONEq(t, value, string(capabilities[name]), name)
	}
}

func TestPodArgsOfNothing(t *testing.T) {
	args, capabilities, err := PodArgs("id", nil)
	require.NoError(t, err)
	require.Contains(t, args, [2]string{"K8S_POD_NAME", ""})
	require.Len(t, capabilities, 1)
	require.Contains(t, capabilities, capPodAnnotations)
}

func TestPodArgsForged(t *testing.T) {
	for _, metadata := range []*runtime.PodSandboxMetadata{
		{Name: "a;K8S_POD_UID=other"},
		{Namespace: "a=b"},
		{Uid: "a\x00b"},
	} {
		_, _, err := PodArgs("id", &runtime.PodSandboxConfig{Metadata: metadata})
		require.True(t, errdefs.IsInvalidArgument(err), "%v: %v", metadata, err)
	}
}

func TestBandwidth(t *testing.T) {
	const ingress, egress = "kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth"
	for name, test := range map[string]struct {
		annotations map[string]string
		want        string // "" is invalid, null no limit
	}{
		"none":        {nil, `null`},
		"others":      {map[string]string{"x": "1M"}, `null`},
		"ingress":     {map[string]string{ingress: "1M"}, `{"IngressRate":1000000,"IngressBurst":4294967295,"EgressRate":0,"EgressBurst":0}`},
		"egress":      {map[string]string{egress: "1Mi"}, `{"IngressRate":0,"IngressBurst":0,"EgressRate":1048576,"EgressBurst":4294967295}`},
		"both":        {map[string]string{ingress: "1k", egress: "1P"}, `{"IngressRate":1000,"IngressBurst":4294967295,"EgressRate":1000000000000000,"EgressBurst":4294967295}`},
		"not one":     {map[string]string{ingress: "fast"}, ""},
		"empty":       {map[string]string{egress: ""}, ""},
		"too small":   {map[string]string{ingress: "999"}, ""},
		"zero":        {map[string]string{egress: "0"}, ""},
		"negative":    {map[string]string{egress: "-1M"}, ""},
		"too large":   {map[string]string{egress: "1001T"}, ""},
		"astronomic":  {map[string]string{egress: "1e999999999"}, ""},
		"tiny":        {map[string]string{egress: "1e-999999999"}, ""},
		"exponent":    {map[string]string{egress: "1e+6"}, `{"IngressRate":0,"IngressBurst":0,"EgressRate":1000000,"EgressBurst":4294967295}`},
		"long":        {map[string]string{egress: strings.Repeat("0", 1<<20) + "1M"}, ""},
		"one invalid": {map[string]string{ingress: "1M", egress: "x"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, capabilities, err := PodArgs("id", &runtime.PodSandboxConfig{Annotations: test.annotations})
			if test.want == "" {
				require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
				return
			}
			require.NoError(t, err)
			if test.want == "null" {
				require.NotContains(t, capabilities, "bandwidth")
				return
			}
			require.JSONEq(t, test.want, string(capabilities["bandwidth"]))
		})
	}
}

// podConfig returns a pod that uses all arguments and capabilities.
func podConfig() *runtime.PodSandboxConfig {
	return &runtime.PodSandboxConfig{
		Metadata:     &runtime.PodSandboxMetadata{Name: "web", Namespace: "shop", Uid: "u-1"},
		Annotations:  map[string]string{ingressAnnotation: "10M"},
		Linux:        &runtime.LinuxPodSandboxConfig{CgroupParent: "/kubepods/pod1"},
		DnsConfig:    &runtime.DNSConfig{Servers: []string{"10.0.0.10"}},
		PortMappings: []*runtime.PortMapping{{ContainerPort: 80, HostPort: 8080, HostIp: "127.0.0.1"}},
	}
}
