package cni

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"
)

// Running is a process of a sandbox's plugins.
type Running struct {
	Pid int
	ID  string // the sandbox's
}

// Plugins are the processes of plugins, and of what they have started, that work on network namespaces in netNSDir, whoever has
// started them. Those of a container with a root directory of its own, where the same paths are others, are left out.
func Plugins(netNSDir string) ([]Running, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("failed to look for CNI plugins: %w", err)
	}
	marker, netns := []byte(sandboxEnv+"="), []byte("CNI_NETNS="+filepath.Clean(netNSDir)+"/")
	var running []Running
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		environ, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "environ"))
		if err != nil {
			continue // it has ended, or is a kernel thread
		}
		variables := bytes.Split(environ, []byte{0})
		at := slices.IndexFunc(variables, func(v []byte) bool { return bytes.HasPrefix(v, marker) })
		inDir := slices.ContainsFunc(variables, func(v []byte) bool { return bytes.HasPrefix(v, netns) })
		if at >= 0 && inDir && onOurRoot(pid) {
			running = append(running, Running{Pid: pid, ID: string(bytes.TrimPrefix(variables[at], marker))})
		}
	}
	return running, nil
}

// onOurRoot says whether a process sees the same root directory as this one.
func onOurRoot(pid int) bool {
	ours, err := os.Stat("/")
	if err != nil {
		return false
	}
	theirs, err := os.Stat(fmt.Sprintf("/proc/%d/root", pid))
	return err == nil && os.SameFile(ours, theirs)
}

// End returns when no process of a sandbox's plugins is left: those of a DEL get patience to come to their end, the others are
// killed at once. It is for sandboxes that no [Driver] works on.
func End(ctx context.Context, id string, patience time.Duration) error {
	return endSurvivors(ctx, id, patience)
}
