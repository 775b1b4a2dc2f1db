package show

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

func TestDetail(t *testing.T) {
	require.Nil(t, detail(nil))
	require.Equal(t, map[string]string{"skipped": "why"}, detail(&lifecycle.Skipped{Reason: "why"}))
	require.Equal(t, "7", detail(&records.Pause{Pid: 7})["pid"])
	require.Contains(t, fmt.Sprint(detail(&records.Network{IP: "10.0.0.2", AdditionalIPs: []string{"fd00::2", "10.1.0.2"}})), "fd00::2,10.1.0.2")
	require.Equal(t, "", Text(nil))
}

// If all undos succeed and only the ledger fails, the removal is pending, too. It can be found, and
// has a line of its own.
func TestPendingWithoutAFailedUndo(t *testing.T) {
	view := lifecycle.View{
		Key: ledger.Key{Namespace: "k8s.io", ID: "0123456789abcdef"}, Pod: "ns/pod", Spec: &records.Spec{}, State: states.CleanupOwed, Err: errors.New("disk full"),
	}
	require.Equal(t, "disk full", Sandbox(view).GetPendingCleanups()[0].GetError())
	other := view
	other.State = states.Stopped
	require.Empty(t, Sandbox(other).GetPendingCleanups())
	for ref, found := range map[string]bool{
		"ns/pod": true, "0123456789abc": true, "0123456789abcdef": true,
		"pod": false, "0123456789ab": false, "0123456789abd": false,
	} {
		_, err := FindPendingExactly(ref, []lifecycle.View{view, other})
		require.Equal(t, found, err == nil, "%q: %v", ref, err)
	}
	_, err := FindPending("pod", []lifecycle.View{view})
	require.NoError(t, err)
}

func TestFailedStep(t *testing.T) {
	view := viewOf()
	require.Empty(t, failedStep(view))
	view.Transitions = []lifecycle.Transition{
		{Event: states.RollBack, Step: "attach_network", Err: errors.New("no luck")},
		{Event: states.LeaveCleanupPending, Step: "start_pause", Err: errors.New("no luck")},
		{Event: states.RollBack},
	}
	require.Equal(t, "attach_network", failedStep(view))
	require.Equal(t, "attach_network", Sandbox(view).GetFailedStep())
	require.Equal(t, "web", Transition(view).GetPodName())
	require.Equal(t, "roll_back", Transition(view).GetTransition().GetEvent())
}

func TestLongErrorsAreCut(t *testing.T) {
	text := Text(errors.New(strings.Repeat("x", maxText) + "ü"))
	require.Less(t, len(text), maxText+100)
	require.Contains(t, text, "(16386 bytes in all)")
}
