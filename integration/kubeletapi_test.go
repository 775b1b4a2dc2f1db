package integration

import (
	"crypto/tls"
	"encoding/json"
	"io"
	"net/http"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/integration/kubelet"
)

// requireKubeletAPI does what kubectl and the metrics server do, through the kubelet.
func requireKubeletAPI(t *testing.T, n *harness.Node, k *kubelet.Kubelet) {
	t.Helper()
	name := kubeletPods(t.Context(), t, k)["private"].Metadata.Name
	f := forwardThrough(t, n, k.URL("/portForward/default/"+name), 8080)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: waitFor}
	resp, err := client.Get("http://" + f.local[8080] + "/page")
	require.NoError(t, err)
	defer resp.Body.Close()
	page, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, "from writer\n", string(page))

	client.Transport = &http.Transport{DialContext: n.Dial, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		resp, err := client.Get(k.URL("/stats/summary"))
		require.NoError(c, err)
		defer resp.Body.Close()
		var summary struct {
			Pods []struct {
				PodRef  struct{ Name string }
				Network *struct {
					Name    string
					RxBytes *uint64
				}
			}
		}
		require.NoError(c, json.NewDecoder(resp.Body).Decode(&summary))
		for _, pod := range summary.Pods {
			if pod.PodRef.Name == name {
				require.NotNil(c, pod.Network)
				require.Equal(c, "eth0", pod.Network.Name)
				require.NotZero(c, *pod.Network.RxBytes)
				return
			}
		}
		require.Fail(c, "the kubelet has no stats of the pod")
	}, kubeletWait, kubeletTick)
}
