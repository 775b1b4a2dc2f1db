package main

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

func (fakeSandboxes) IDs(context.Context, *podfsmv1.IDsRequest) (*podfsmv1.IDsResponse, error) {
	return allIDs, nil
}

func userNS(hostID uint32) *podfsmv1.UserNamespace {
	return &podfsmv1.UserNamespace{Uids: mapping(hostID), Gids: mapping(hostID)}
}

var allIDs = &podfsmv1.IDsResponse{
	Pool: &podfsmv1.IDPool{
		Source: `/etc/subuid and /etc/subgid of user "pods"`, Ranges: 40, Held: 1, Free: 37,
		Quarantine: []*podfsmv1.QuarantinedIDs{
			{Userns: userNS(1000000000), UsedBy: "process 4711 (\x1b[2Jsh)"},
			{Userns: userNS(1000065536)},
		},
	},
	Holders: []*podfsmv1.IDHolder{
		{SandboxId: ready.GetId(), ContainerdNamespace: "k8s.io", PodName: "web", PodNamespace: "default", Origin: "request", Userns: userNS(131072), Since: at(0)},
		{SandboxId: "9d", ContainerdNamespace: "k8s.io", PodName: "slow", PodNamespace: "default", Origin: "auto", Userns: userNS(1000131072), Since: at(5 * time.Minute)},
	},
	Refusals: []*podfsmv1.IDRefusal{
		{PodName: "thief", PodNamespace: "default", Reason: "host uids\n131072 to 196607 are taken", At: at(time.Minute), Count: 7},
	},
}

func TestIDs(t *testing.T) {
	for golden, response := range map[string]*podfsmv1.IDsResponse{
		"ids.txt":       allIDs,
		"ids-none.txt":  {},
		"ids-error.txt": {Pool: &podfsmv1.IDPool{Source: "userns_pool.ranges", Ranges: 1, Held: 1}, SearchError: "failed to list mounts: no luck"},
	} {
		t.Run(golden, func(t *testing.T) {
			var b bytes.Buffer
			require.NoError(t, writeIDs(&b, response, now))
			requireGolden(t, golden, b.Bytes())
		})
	}
	address := serve(t, fakeSandboxes{})
	out, err := podfsm(t, "--address", address, "ids", "-o", "json")
	require.NoError(t, err)
	requireGolden(t, "ids.json", []byte(out))
	out, err = podfsm(t, "--address", address, "ids")
	require.NoError(t, err)
	require.Contains(t, out, "default/thief")
	_, err = podfsm(t, "--address", address, "ids", "all")
	require.ErrorContains(t, err, "takes no arguments")
}
