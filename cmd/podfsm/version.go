package main

import (
	"cmp"
	"fmt"
	"runtime/debug"
)

const containerdModule = "github.com/containerd/containerd/v2"

// version is set by the linker (-X main.version=...); without it the version of
// the main module counts.
var version string

// versions names the version of podfsm and that of the containerd it was built
// with, which is in the build info because client.go imports a package of it.
func versions() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = &debug.BuildInfo{}
	}
	return describe(version, info)
}

func describe(linked string, info *debug.BuildInfo) string {
	own := cmp.Or(linked, info.Main.Version, "unknown")
	containerd := "unknown"
	for _, dep := range info.Deps {
		if dep.Path == containerdModule {
			containerd = dep.Version
			if dep.Replace != nil {
				containerd = cmp.Or(dep.Replace.Version, dep.Replace.Path)
			}
		}
	}
	return fmt.Sprintf("%s (containerd %s)", own, containerd)
}
