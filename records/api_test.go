package records

import (
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

func TestDetail(t *testing.T) {
	require.Nil(t, detail(nil))
	require.Equal(t, map[string]string{"skipped": "why"}, detail(&lifecycle.Skipped{Reason: "why"}))
	require.Equal(t, "7", detail(&Pause{Pid: 7})["pid"])
	require.Contains(t, fmt.Sprint(detail(&Network{IP: "10.0.0.2", AdditionalIPs: []string{"fd00::2", "10.1.0.2"}})), "fd00::2,10.1.0.2")
	require.Equal(t, "", Text(nil))
}

// A removal that only the ledger's refusal keeps from its end is pending, too: it can be found, and has a line of its own.
func TestPendingWithoutAFailedUndo(t *testing.T) {
	view := lifecycle.View{
		Key: journal.Key{Namespace: "k8s.io", ID: "0123456789abcdef"}, Pod: "ns/pod", Spec: &Spec{}, State: states.CleanupOwed, Err: errors.New("disk full"),
	}
	require.Equal(t, "disk full", Sandbox(view).GetDebts()[0].GetError())
	other := view
	other.State = states.Stopped
	require.Empty(t, Sandbox(other).GetDebts())
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
