package cni

import (
	"encoding/json"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// FuzzPodArgs fuzzes the metadata and annotations of a pod. Plugins get exactly the five arguments
// with exactly these values, and a bandwidth is one that Kubernetes accepts.
func FuzzPodArgs(f *testing.F) {
	f.Add("web", "default", "uid", "10M", "1k", "10.0.0.1", int32(80))
	f.Add("web;K8S_POD_UID=0", "a=b", "\x00", "1e999999999", "-1", "::1%eth0", int32(-1))
	f.Add("", "", "", "1P", "0.0000000001E", "", int32(1<<30))
	f.Fuzz(func(t *testing.T, name, namespace, uid, ingress, egress, hostIP string, port int32) {
		config := &runtime.PodSandboxConfig{
			Metadata:     &runtime.PodSandboxMetadata{Name: name, Namespace: namespace, Uid: uid},
			Annotations:  map[string]string{ingressAnnotation: ingress, egressAnnotation: egress},
			PortMappings: []*runtime.PortMapping{nil, {HostPort: port, ContainerPort: port, HostIp: hostIP}},
		}
		args, capabilities, err := PodArgs("id", config)
		if err != nil {
			require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
			return
		}
		var joined []string
		for _, arg := range args {
			joined = append(joined, arg[0]+"="+arg[1])
		}
		read := strings.Split(strings.Join(joined, ";"), ";")
		require.Equal(t, []string{"IgnoreUnknown=1", "K8S_POD_NAMESPACE=" + namespace, "K8S_POD_NAME=" + name, "K8S_POD_INFRA_CONTAINER_ID=id", "K8S_POD_UID=" + uid}, read)
		for name, value := range capabilities {
			require.True(t, json.Valid(value), name)
		}
		var limits struct{ IngressRate, EgressRate uint64 }
		require.NoError(t, json.Unmarshal(capabilities[capBandwidth], &limits))
		for _, rate := range []uint64{limits.IngressRate, limits.EgressRate} {
			require.GreaterOrEqual(t, rate, uint64(1000))
			require.LessOrEqual(t, rate, uint64(1e15))
		}
	})
}

// FuzzResult fuzzes the output of ADD. A result either has valid addresses or is refused.
func FuzzResult(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.0.0","interfaces":[{"name":"eth0"}],"ips":[{"address":"10.0.0.2/24","interface":0}]}`))
	f.Add([]byte(`{"cniVersion":"0.3.1","ips":[{"version":"4","address":"10.0.0.2/24"}],"dns":{}}`))
	f.Add([]byte(`{"cniVersion":"1.1.0","interfaces":[null],"ips":[null,{"interface":-1}]}`))
	f.Add([]byte(`{"cniVersion":"1.0.0","ips":[{}]}`))
	f.Add([]byte(`{"cniVersion":"0.2.0","ip4":{"ip":"10.0.0.2/24"}}`))
	f.Add([]byte(`null`))
	network, err := networkOfConf([]byte(`{"name":"a","cniVersion":"1.0.0","type":"bridge"}`))
	require.NoError(f, err)
	f.Fuzz(func(t *testing.T, result []byte) {
		a, err := NewAttachment(Config{}, []Network{network}, "id", "/netns", nil, nil)
		require.NoError(t, err)
		a.Plugins[0].Phase, a.Plugins[0].Result = Added, result
		if ip, additional, err := a.IPs("ipv4"); err == nil {
			for _, text := range append(additional, ip) {
				_, err := netip.ParseAddr(text)
				require.NoError(t, err, "%q of %q", text, result)
			}
		}
		list, err := network.list()
		require.NoError(t, err)
		_, _ = a.lastResult(0, list)
	})
}

// FuzzPluginError fuzzes the output of a failing plugin, which becomes part of gRPC answers and
// events.
func FuzzPluginError(f *testing.F) {
	f.Add([]byte(`{"code":7,"msg":"no addresses","details":"range is full"}`), []byte("warning"))
	f.Add([]byte(`{"code":"7"}`), []byte{})
	f.Add([]byte("\xff\xfe"), []byte(strings.Repeat("x", maxText+1)))
	f.Add([]byte("null"), []byte("\xff"))
	f.Fuzz(func(t *testing.T, stdout, stderr []byte) {
		out, errs := &tail{limit: maxStdout}, &tail{limit: maxText}
		_, _ = out.Write(stdout)
		_, _ = errs.Write(stderr)
		err := pluginError(&exec.ExitError{}, out, errs)
		require.Error(t, err)
		require.LessOrEqual(t, len(err.Error()), 5*maxText)
	})
}

// FuzzAttachment fuzzes the recorded networks and events of a pod. No method of what was read
// panics.
func FuzzAttachment(f *testing.F) {
	network, err := networkOfConf([]byte(`{"name":"a","cniVersion":"1.0.0","type":"bridge"}`))
	require.NoError(f, err)
	a, err := NewAttachment(Config{BinDirs: []string{"/opt"}}, []Network{network}, "id", "/netns", Args{{"A", "B"}}, nil)
	require.NoError(f, err)
	sound, err := json.Marshal(a)
	require.NoError(f, err)
	f.Add(sound, []byte(`{"network":0,"plugin":0,"phase":"adding"}`))
	f.Add(sound, []byte(`{"network":-1,"plugin":9,"phase":"deleted","result":[]}`))
	f.Add([]byte(`{"networks":[{"name":"x","conflist":null}],"plugins":[{"network":5}]}`), []byte(`null`))
	f.Add([]byte(`{"networks":null}`), []byte(`{}`))
	f.Fuzz(func(t *testing.T, record, fact []byte) {
		a, p := &Attachment{}, Progress{}
		if json.Unmarshal(record, a) != nil || json.Unmarshal(fact, &p) != nil {
			return
		}
		before := slices.Clone(a.Plugins)
		if err := a.Apply(p); err != nil {
			require.True(t, errdefs.IsDataLoss(err), "%v", err)
			require.Equal(t, before, a.Plugins)
		} else {
			require.NoError(t, a.Apply(p), "applying the last event again changes nothing")
		}
		a.Settled()
		_, _, _ = a.IPs("cni")
		a.Suspect()
		require.Equal(t, len(a.Plugins) == 0, a.Settled())
	})
}
