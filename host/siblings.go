package host

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Siblings returns the processes that this process or an earlier daemon in its place has started,
// and whose working directory is below dir. The values are the working directories.
//
// Siblings are in the cgroup of this process and in its user and mount namespaces, so that a path
// means the same there. No process of a pod ever is. A working directory may have been removed. dir
// may have symlinks.
func Siblings(ctx context.Context, dir string) (map[int]string, error) {
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("failed to read the cgroup of this process: %w", err)
	}
	pids, err := Pids()
	if err != nil {
		return nil, err
	}
	if resolved, err := filepath.EvalSymlinks(dir); err == nil {
		dir = resolved
	}
	found := map[int]string{}
	for _, pid := range pids {
		if pid == os.Getpid() {
			continue
		}
		if cwd, ok := workingDir(ctx, pid, groups); ok && strings.HasPrefix(cwd, dir+"/") {
			found[pid] = cwd
		}
	}
	return found, nil
}

// workingDir returns the working directory of a sibling. It checks cgroup and namespaces first,
// because a process chooses its working directory itself.
func workingDir(ctx context.Context, pid int, groups []byte) (string, bool) {
	theirs, err := Read(ctx, pid, "cgroup")
	if err != nil || !bytes.Equal(theirs, groups) {
		return "", false
	}
	for _, kind := range []string{"ns/user", "ns/mnt"} {
		own, err := os.Readlink(filepath.Join("/proc/self", kind))
		if err != nil {
			return "", false
		}
		if ns, err := Readlink(ctx, pid, kind); err != nil || ns != own {
			return "", false
		}
	}
	cwd, err := Readlink(ctx, pid, "cwd")
	return strings.TrimSuffix(cwd, " (deleted)"), err == nil
}

// KillIn kills the siblings whose working directory is dir, and returns once none is left.
func KillIn(ctx context.Context, dir string) error {
	parent := filepath.Dir(dir)
	if resolved, err := filepath.EvalSymlinks(parent); err == nil {
		parent = resolved
	}
	for pause := range pollIntervals {
		all, err := Siblings(ctx, parent)
		if err != nil {
			return err
		}
		left := 0
		for pid, cwd := range all {
			if cwd != filepath.Join(parent, filepath.Base(dir)) {
				continue
			}
			left++
			if err := killSibling(ctx, pid, cwd); err != nil {
				return err
			}
		}
		if left == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes in %q don't end: %w", dir, context.Cause(ctx))
		case <-time.After(pause):
		}
	}
	return nil
}

// killSibling kills a sibling. It checks the process again once its pidfd is open.
func killSibling(ctx context.Context, pid int, dir string) error {
	process, err := Open(pid)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer process.Close()
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	if cwd, ok := workingDir(ctx, pid, groups); !ok || cwd != dir {
		return nil
	}
	return process.Kill()
}
