package plugin

import (
	"cmp"
	"runtime/debug"

	"github.com/podfsm/podfsm/tracing"
)

// release is set by the linker (-X github.com/podfsm/podfsm/plugin.release=...). Without it the version of the module counts.
var release string

// releaseOf is the release of podfsm in a build: of its own daemon, or of a containerd that has the plugin compiled in.
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
