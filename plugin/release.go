package plugin

import (
	"cmp"
	"runtime"
	"runtime/debug"

	"github.com/containerd/containerd/v2/version"

	"github.com/podfsm/podfsm/tracing"
)

// release and revision are set by the linker (-X github.com/podfsm/podfsm/plugin.release=...). If
// unset, the version of the module and the commit that Go recorded are used.
var release, revision string

// releaseOf returns podfsm's release in a build: of podfsm's own daemon, or of a containerd with
// the plugin compiled in.
func releaseOf(linked string, info *debug.BuildInfo) string {
	version := info.Main.Version
	for _, dep := range info.Deps {
		if dep.Path == tracing.Name {
			version = dep.Version
		}
	}
	return cmp.Or(linked, version, "unknown")
}

func thisRelease() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = &debug.BuildInfo{}
	}
	return releaseOf(release, info)
}

// revisionOf returns podfsm's commit in a build. Go only records the commit of the main module,
// which may be one that imports podfsm.
func revisionOf(linked string, info *debug.BuildInfo) string {
	if info.Main.Path == tracing.Name {
		for _, setting := range info.Settings {
			if setting.Key == "vcs.revision" {
				linked = cmp.Or(linked, setting.Value)
			}
		}
	}
	return cmp.Or(linked, "unknown")
}

// buildInfo returns the label values of the metric build_info.
func buildInfo() []string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = &debug.BuildInfo{}
	}
	return []string{releaseOf(release, info), revisionOf(revision, info), version.Version, runtime.Version()}
}
