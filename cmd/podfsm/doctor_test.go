package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

var examination = &podfsmv1.DoctorResponse{Findings: []*podfsmv1.Finding{
	{Check: "kernel", Verdict: "ok", Evidence: "Linux 6.18.44"},
	{
		Check: "runtime", Subject: "podfsm, podfsm-auto", Verdict: "fail", RefusedPods: "with a user namespace",
		Evidence: "/usr/local/sbin/runc features: no idmapped mounts",
		Remedy:   "install runc 1.2 or later, or another runtime with these features",
	},
	{
		Check: "disk space", Verdict: "warn", Remedy: "free some space there before it is full",
		Evidence: "/var/lib/containerd/io.containerd.podsandbox.controller.v1.podfsm has 12MiB free and 400 inodes",
	},
	{Check: "networks", Verdict: "unknown", Evidence: "a name\x1b[2J of a network", Remedy: "start containerd"},
}}

func (fakeSandboxes) Doctor(context.Context, *podfsmv1.DoctorRequest) (*podfsmv1.DoctorResponse, error) {
	return examination, nil
}

func TestDoctor(t *testing.T) {
	address := serve(t, fakeSandboxes{})
	out, err := podfsm(t, "--address", address, "doctor")
	require.EqualError(t, err, "1 check has failed")
	require.Equal(t, 2, exitStatus(err))
	requireGolden(t, "doctor.txt", []byte(out))
	for line := range strings.Lines(out) {
		if !strings.Contains(line, "/var/lib/containerd/") { // a path is never broken
			require.LessOrEqual(t, len([]rune(line)), pageWidth+1)
		}
	}
	out, err = podfsm(t, "--address", address, "doctor", "-o", "json")
	require.Equal(t, 2, exitStatus(err))
	requireGolden(t, "doctor.json", []byte(out))
	_, err = podfsm(t, "--address", address, "doctor", "now")
	require.ErrorContains(t, err, "takes no arguments")
	require.Equal(t, 1, exitStatus(err))
	_, err = podfsm(t, "--address", serve(t, nil), "doctor")
	require.ErrorContains(t, err, "a containerd without podfsm")
	require.Equal(t, 1, exitStatus(err))

	require.NoError(t, failures(examination.GetFindings()[2:]), "warnings don't fail")
}

// Without a daemon what can be seen without it is, and the rest is unknown.
func TestDoctorWithoutDaemon(t *testing.T) {
	dir := t.TempDir()
	var out, errOut bytes.Buffer
	args := []string{"podfsm", "--address", filepath.Join(dir, "no.sock"), "--root", dir, "--state", dir, "doctor"}
	err := run(t.Context(), args, &out, &errOut)
	require.EqualError(t, err, "1 check has failed", "nobody may pass to a directory of tests")
	require.Contains(t, errOut.String(), "the daemon is down; what depends on its configuration is unknown")
	for _, row := range []string{
		`(?m)^ok +kernel +Linux \d`,
		`(?m)^ok +user namespaces +user.max_user_namespaces = \d+`,
		`(?m)^ok +overlay +idmap: idmapped`,
		`(?m)^fail +directories `,
		`(?m)^unknown +runtime +containerd's configuration isn't known$`,
		`(?m)^ok +ledger +there is none yet`,
	} {
		require.Regexp(t, row, out.String())
	}
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left, "what it makes for its tries is gone")
}
