package cni

import (
	"encoding/json"
	"net"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	gocni "github.com/containerd/go-cni"
	"github.com/containernetworking/cni/libcni"
	"github.com/stretchr/testify/require"
)

func TestSelectIPs(t *testing.T) {
	for name, test := range map[string]struct {
		ips        []string
		preference string
		ip         string
		additional []string
	}{
		"one":                     {[]string{"10.0.0.1"}, "", "10.0.0.1", nil},
		"one of the other family": {[]string{"fd00::1"}, "ipv4", "fd00::1", nil},
		"ipv4 by default":         {[]string{"fd00::1", "10.0.0.1", "fd00::2", "10.0.0.2"}, "", "10.0.0.1", []string{"fd00::1", "fd00::2", "10.0.0.2"}},
		"ipv4":                    {[]string{"fd00::1", "10.0.0.1"}, "ipv4", "10.0.0.1", []string{"fd00::1"}},
		"unknown is ipv4":         {[]string{"fd00::1", "10.0.0.1"}, "ipv5", "10.0.0.1", []string{"fd00::1"}},
		"ipv6":                    {[]string{"10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"}, "ipv6", "fd00::1", []string{"10.0.0.1", "10.0.0.2", "fd00::2"}},
		"cni":                     {[]string{"fd00::1", "10.0.0.1"}, "cni", "fd00::1", []string{"10.0.0.1"}},
		"no ipv4":                 {[]string{"fd00::1", "fd00::2"}, "ipv4", "fd00::1", []string{"fd00::2"}},
		"no ipv6":                 {[]string{"10.0.0.1", "10.0.0.2"}, "ipv6", "10.0.0.1", []string{"10.0.0.2"}},
	} {
		t.Run(name, func(t *testing.T) {
			var configs []*gocni.IPConfig
			for _, ip := range test.ips {
				configs = append(configs, &gocni.IPConfig{IP: net.ParseIP(ip)})
			}
			ip, additional := selectIPs(configs, test.preference)
			require.Equal(t, test.ip, ip)
			require.Equal(t, test.additional, additional)
		})
	}
}

func TestResultInvalid(t *testing.T) {
	for name, test := range map[string]struct {
		result string
		text   string
	}{
		"not attached":        {``, "is not attached"},
		"null interface":      {`{"cniVersion":"1.0.0","interfaces":[null]}`, "interface is null"},
		"null address":        {`{"cniVersion":"1.0.0","ips":[null]}`, "address is null"},
		"empty address":       {`{"cniVersion":"1.0.0","ips":[{}]}`, "address is null"},
		"interface too large": {`{"cniVersion":"1.0.0","interfaces":[{"name":"eth0"}],"ips":[{"address":"10.0.0.1/24","interface":1}]}`, "on interface 1 of 1"},
		"interface negative":  {`{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.1/24","interface":-1}]}`, "on interface -1 of 0"},
		"no address":          {`{"cniVersion":"1.0.0"}`, "gave eth0 no address"},
		"address elsewhere":   {`{"cniVersion":"1.0.0","interfaces":[{"name":"net1"}],"ips":[{"address":"10.0.0.1/24","interface":0}]}`, "gave eth0 no address"},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := NewAttachment(Config{}, []Network{network(t, "net", "1.0.0", `{"type":"one"}`)}, "id", "/netns", nil, nil)
			require.NoError(t, err)
			if test.result != "" {
				a.Plugins[0].Result = json.RawMessage(test.result)
			}
			_, _, err = a.IPs("")
			require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
			require.ErrorContains(t, err, test.text)
		})
	}
}

func TestResultWithoutInterfaces(t *testing.T) {
	a, err := NewAttachment(Config{}, []Network{network(t, "net", "1.0.0", `{"type":"one"}`)}, "id", "/netns", nil, nil)
	require.NoError(t, err)
	a.Plugins[0].Result = json.RawMessage(`{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.1/24"},{"address":"fd00::1/64"}]}`)
	ip, additional, err := a.IPs("ipv6")
	require.NoError(t, err)
	require.Equal(t, "fd00::1", ip)
	require.Equal(t, []string{"10.0.0.1"}, additional)
}

// The reference is go-cni, which containerd uses: plugins get the same input, and the result is the
// same.
func TestSameAsGoCNI(t *testing.T) {
	const result = `[ $CNI_COMMAND = ADD ] || exit 0
printf '{"cniVersion":"1.0.0","interfaces":[{"name":"veth1","mac":"00:00:00:00:00:01"},{"name":"%s","mac":"00:00:00:00:00:02","sandbox":"%s"}],
"ips":[{"address":"10.1.2.3/24","gateway":"10.1.2.1","interface":1},{"address":"fd00::3/64","interface":1}],"routes":[{"dst":"0.0.0.0/0","gw":"10.1.2.1"}],"dns":{"nameservers":["10.0.0.10"]}}' $CNI_IFNAME $CNI_NETNS`
	const conf = `"capabilities":{"portMappings":true,"bandwidth":true,"dns":true,"cgroupPath":true,"io.kubernetes.cri.pod-annotations":true}`

	p := newPlugins(t)
	p.script("first", result)
	p.script("second", result)
	net := network(t, "net", "1.0.0", `{"type":"first","n":1,`+conf+`}`, `{"type":"second","n":1e21}`)
	r := newRig(t, p, Config{}, net)
	pod := podConfig()
	var err error
	r.attachment.Args, r.attachment.Capabilities, err = PodArgs(sandboxID, pod)
	require.NoError(t, err)

	require.NoError(t, r.add(t.Context()))
	got, err := r.attachment.GoCNIResult()
	require.NoError(t, err)
	require.NoError(t, r.del(t.Context()))
	calls := r.calls()
	inputs := readInputs(p)

	before := libcni.CacheDir
	libcni.CacheDir = t.TempDir()
	t.Cleanup(func() { libcni.CacheDir = before })
	stock, err := gocni.New(gocni.WithPluginDir(r.attachment.BinDirs), gocni.WithPluginConfDir(t.TempDir()), gocni.WithConfListBytes(net.Conflist))
	require.NoError(t, err)
	// As containerd makes them.
	labels := map[string]string{}
	for _, arg := range r.attachment.Args {
		labels[arg[0]] = arg[1]
	}
	opts := []gocni.NamespaceOpts{
		gocni.WithLabels(labels),
		gocni.WithCapability("io.kubernetes.cri.pod-annotations", pod.GetAnnotations()),
		gocni.WithCapabilityPortMap([]gocni.PortMapping{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp", HostIP: "127.0.0.1"}}),
		gocni.WithCapabilityBandWidth(gocni.BandWidth{IngressRate: 10000000, IngressBurst: 4294967295}),
		gocni.WithCapabilityDNS(gocni.DNS{Servers: []string{"10.0.0.10"}}),
		gocni.WithCapabilityCgroupPath("/kubepods/pod1"),
	}
	want, err := stock.Setup(t.Context(), sandboxID, r.attachment.NetNSPath, opts...)
	require.NoError(t, err)
	require.NoError(t, stock.Remove(t.Context(), sandboxID, r.attachment.NetNSPath, opts...))

	require.Equal(t, p.calls(), calls)
	for name, input := range readInputs(p) {
		require.JSONEq(t, input, inputs[name], name)
	}
	wantJSON, err := json.Marshal(want)
	require.NoError(t, err)
	gotJSON, err := json.Marshal(got)
	require.NoError(t, err)
	require.JSONEq(t, string(wantJSON), string(gotJSON))
}

func readInputs(p *plugins) map[string]string {
	p.t.Helper()
	files, err := filepath.Glob(filepath.Join(p.dir, "*.stdin"))
	require.NoError(p.t, err)
	require.Len(p.t, files, 4)
	inputs := map[string]string{}
	for _, file := range files {
		inputs[filepath.Base(file)] = p.read(filepath.Base(file))
	}
	return inputs
}
