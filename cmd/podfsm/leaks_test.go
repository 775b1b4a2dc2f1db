package main

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

const lostID = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

// someLeaks is an answer without a fix.
func someLeaks() *podfsmv1.LeaksResponse {
	return &podfsmv1.LeaksResponse{
		Leaks: []*podfsmv1.Leak{
			{SandboxId: ready.GetId(), Kind: "CNI plugin", Name: "4711"},
			{SandboxId: lostID, Kind: "files", Name: lostID},
			{SandboxId: lostID, Kind: "netns", Name: "/var/run/netns/podfsm-" + lostID},
		},
		DamagedLedgerFiles: []string{"/var/lib/containerd/io.containerd.podsandbox.controller.v1.podfsm/ledger.log.damaged-1"},
	}
}

func fixedLeaks() *podfsmv1.LeaksResponse {
	fixed := someLeaks()
	fixed.Leaks[0].Removed = true
	fixed.Leaks[1].Removed = true
	fixed.Leaks[2].Error = "processes [1] are in\nit"
	return fixed
}

func TestLeaksTable(t *testing.T) {
	for _, tc := range []struct {
		golden   string
		response *podfsmv1.LeaksResponse
		fix      bool
	}{
		{"leaks.txt", someLeaks(), false},
		{"leaks-fixed.txt", fixedLeaks(), true},
		{"leaks-none.txt", &podfsmv1.LeaksResponse{}, false},
	} {
		t.Run(tc.golden, func(t *testing.T) {
			var b bytes.Buffer
			require.NoError(t, writeLeaks(&b, tc.response, tc.fix))
			requireGolden(t, tc.golden, b.Bytes())
		})
	}
}

func TestLeaksExitStatus(t *testing.T) {
	all := fixedLeaks()
	all.Leaks[2].Removed = true
	one := someLeaks()
	one.Leaks = one.Leaks[:1]
	for _, tc := range []struct {
		name     string
		response *podfsmv1.LeaksResponse
		args     []string
		stderr   string
		code     int
	}{
		{"none", &podfsmv1.LeaksResponse{}, []string{"leaks"}, "", 0},
		{"some", someLeaks(), []string{"leaks"}, "podfsm: 3 things have leaked\n", 2},
		{"one", one, []string{"leaks", "-o", "json"}, "podfsm: 1 thing has leaked\n", 2},
		{"not all fixed", fixedLeaks(), []string{"leaks", "--fix"}, "podfsm: 1 thing has leaked and could not be removed; 2 removed\n", 2},
		{"all fixed", all, []string{"leaks", "--fix"}, "", 0},
		{"a daemon that fails", nil, []string{"leaks"}, "podfsm: the daemon at ADDRESS is a containerd without podfsm", 3},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var asked bool
			var service podfsmv1.SandboxesServer
			if tc.response != nil {
				service = fakeSandboxes{leaks: func(r *podfsmv1.LeaksRequest) *podfsmv1.LeaksResponse {
					asked = r.GetFix()
					return tc.response
				}}
			}
			address := serve(t, service)
			stdout, stderr, code := runProgram(t, append([]string{"--address", address}, tc.args...)...)
			require.Equal(t, tc.code, code)
			require.Equal(t, tc.args[len(tc.args)-1] == "--fix", asked)
			if tc.response == nil {
				require.Empty(t, stdout)
				require.Contains(t, stderr, "podfsm: the daemon at "+address+" is a containerd without podfsm")
				return
			}
			require.Equal(t, tc.stderr, stderr)
			for _, leak := range tc.response.GetLeaks() {
				require.Contains(t, stdout, leak.GetName())
			}
		})
	}
}

func TestLeaksJSON(t *testing.T) {
	address := serve(t, fakeSandboxes{leaks: func(*podfsmv1.LeaksRequest) *podfsmv1.LeaksResponse { return fixedLeaks() }})
	out, err := podfsm(t, "--address", address, "leaks", "-o", "json")
	require.ErrorAs(t, err, new(leftError))
	requireGolden(t, "leaks.json", []byte(out))
}
