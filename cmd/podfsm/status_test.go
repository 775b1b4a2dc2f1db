package main

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

// faring is a node with something of everything.
var faring = &podfsmv1.StatusResponse{
	Version: "v0.1.0", ContainerdVersion: "v2.4.2", StartedAt: at(0), DrainingSince: at(0), Degraded: "unknown option\ncni_gcc",
	Sandboxes: map[string]uint32{"Ready": 2, "CleanupOwed": 1, "Frozen": 1}, PendingCleanups: 1,
	FailedChecks: []string{"kernel", "networks"},
	SlowestStep:  &podfsmv1.SlowestStep{Step: "attach_network", SandboxId: ready.GetId(), PodName: "web", PodNamespace: "default", StartedAt: at(0), Duration: took(55 * ms)},
	IdPool:       &podfsmv1.IDPoolUse{Free: 60, Held: 3, Quarantined: 1},
	LastRecovery: &podfsmv1.Recovery{
		StartedAt: at(0), Duration: took(120 * ms), Outcomes: map[string]uint32{"rolled_back": 1, "adopted": 2},
	},
}

func TestStatus(t *testing.T) {
	well := proto.CloneOf(faring)
	well.DrainingSince, well.Degraded, well.FailedChecks, well.PendingCleanups, well.Sandboxes = nil, "", nil, 0, map[string]uint32{"Ready": 2}
	well.SlowestStep.Duration, well.SlowestStep.PodName = nil, ""
	for golden, response := range map[string]*podfsmv1.StatusResponse{
		"status.txt": faring, "status-well.txt": well, "status-down.txt": {},
	} {
		t.Run(golden, func(t *testing.T) {
			var b bytes.Buffer
			require.NoError(t, writeStatus(&b, response, now))
			requireGolden(t, golden, b.Bytes())
		})
	}

	out, err := podfsm(t, "--address", serve(t, fakeSandboxes{status: faring}), "status", "-o", "json")
	require.EqualError(t, err, "podfsm is degraded: podfsm doctor; cleanups are pending: podfsm cleanups")
	require.Equal(t, exitLeft, exitStatus(err))
	requireGolden(t, "status.json", []byte(out))
	out, err = podfsm(t, "--address", serve(t, fakeSandboxes{status: well}), "status")
	require.NoError(t, err)
	require.Regexp(t, `(?m)^Sandboxes: +2: 2 Ready$`, out)
	unfit := &podfsmv1.StatusResponse{FailedChecks: []string{"kernel"}}
	_, err = podfsm(t, "--address", serve(t, fakeSandboxes{status: unfit}), "status")
	require.EqualError(t, err, "checks fail: podfsm doctor")
	quarantined := &podfsmv1.StatusResponse{Sandboxes: map[string]uint32{"Quarantined": 1}}
	_, err = podfsm(t, "--address", serve(t, fakeSandboxes{status: quarantined}), "status")
	require.Equal(t, exitLeft, exitStatus(err))
}
