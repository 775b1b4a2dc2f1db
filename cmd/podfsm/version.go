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
	return describe(version, buildInfo())
}

func buildInfo() *debug.BuildInfo {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return &debug.BuildInfo{}
	}
	return info
}

func describe(linked string, info *debug.BuildInfo) string {
	return fmt.Sprintf("%s (containerd %s)", cmp.Or(linked, info.Main.Version, "unknown"), containerdIn(info))
}

// containerdIn is the version of containerd that a program is built with.
func containerdIn(info *debug.BuildInfo) string {
	for _, dep := range info.Deps {
		if dep.Path == containerdModule && dep.Replace != nil {
			return cmp.Or(dep.Replace.Version, dep.Replace.Path)
		}
		if dep.Path == containerdModule {
			return dep.Version
		}
	}
	return "unknown"
}
