package plugin

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/history"
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

// gone is a sandbox that ended some time ago.
func gone(id string, ago time.Duration) lifecycle.View {
	return lifecycle.View{
		Key: journal.Key{Namespace: "k8s.io", ID: id}, Spec: &Spec{Config: &runtime.PodSandboxConfig{}},
		State: states.Removed, Since: time.Now().Add(-ago),
	}
}

func TestEndedSandboxesAreKeptUpToABound(t *testing.T) {
	e := &ended{}
	var err error
	e.file, err = history.Open(filepath.Join(t.TempDir(), history.FileName))
	require.NoError(t, err)
	for i := range maxEnded + 1 {
		e.add(gone(fmt.Sprint("s", i), time.Duration(maxEnded-i)*time.Minute))
	}
	_, ok := e.find(gone("s0", 0).Key)
	require.False(t, ok)
	view, ok := e.find(gone("s1", 0).Key)
	require.True(t, ok)
	require.Equal(t, "s1", view.Key.ID)
	require.Len(t, e.within(time.Hour*24), maxEnded)
	require.Equal(t, []journal.Key{gone(fmt.Sprint("s", maxEnded), 0).Key}, e.within(30*time.Second))
}
