package plugin

import (
	"runtime/debug"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestReleaseOf(t *testing.T) {
	own := &debug.BuildInfo{Main: debug.Module{Path: "github.com/podfsm/podfsm", Version: "v0.1.0"}, Deps: []*debug.Module{{Path: "example.org/x", Version: "v7.0.0"}}}
	embedded := &debug.BuildInfo{Main: debug.Module{Path: "example.org/containerd", Version: "v2.4.2"}, Deps: []*debug.Module{{Path: "github.com/podfsm/podfsm", Version: "v0.2.0"}}}
	require.Equal(t, "v0.1.0", releaseOf("", own))
	require.Equal(t, "v0.2.0", releaseOf("", embedded))
	require.Equal(t, "v0.3.0", releaseOf("v0.3.0", own))
	require.Equal(t, "unknown", releaseOf("", &debug.BuildInfo{}))
}

func TestRevisionOf(t *testing.T) {
	stamped := []debug.BuildSetting{{Key: "vcs", Value: "git"}, {Key: "vcs.revision", Value: "0123abc"}}
	own := &debug.BuildInfo{Main: debug.Module{Path: "github.com/podfsm/podfsm"}, Settings: stamped}
	embedded := &debug.BuildInfo{Main: debug.Module{Path: "example.org/containerd"}, Settings: stamped}
	require.Equal(t, "0123abc", revisionOf("", own))
	require.Equal(t, "unknown", revisionOf("", embedded), "the commit is the other module's")
	require.Equal(t, "4567def", revisionOf("4567def", embedded))
	require.Equal(t, "4567def", revisionOf("4567def", own))
}
