package plugin

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/lifecycle"
)

func TestNodeStatus(t *testing.T) {
	w := newWorld(t)
	w.run(t, "aaa1", named("web"))
	w.host.do[AttachNetwork], w.host.undo[CaptureNetNS] = failing, func(string) error { return errNoLuck }
	require.NoError(t, w.create(t, "bbb1", named("bad")))
	_, err := w.Start(inCRI(t), "bbb1")
	require.Error(t, err)
	w.recovery.Meter = w.meters
	require.NoError(t, w.recovery.time(func() error {
		w.recovery.Recovered(lifecycle.RecoveryAdopted, time.Second)
		return nil
	}))

	response, err := (&api{controller: w.Controller}).Status(t.Context(), &podfsmv1.StatusRequest{})
	require.NoError(t, err)
	require.Equal(t, map[string]uint32{"Ready": 1, "CleanupOwed": 1}, response.GetSandboxes())
	require.EqualValues(t, 1, response.GetPendingCleanups())
	require.NotEmpty(t, response.GetSlowestStep().GetStep())
	require.NotNil(t, response.GetSlowestStep().GetDuration())
	require.Equal(t, map[string]uint32{"adopted": 1}, response.GetLastRecovery().GetOutcomes())
	require.Empty(t, response.GetDegraded())
	require.Nil(t, response.GetDrainingSince())
}
