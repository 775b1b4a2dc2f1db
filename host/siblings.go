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

// Siblings are the processes that this process, or an earlier daemon in its place, has started and that work in a directory below dir, by
// that directory: processes in its own cgroup and in its own user and mount namespaces, where a path means what it means here. No
// process of a pod is ever there. Their directories may have been removed, and dir may lead over symlinks, which the kernel has resolved.
func Siblings(ctx context.Context, dir string) (map[int]string, error) {
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("failed to read the own cgroup: %w", err)
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

// workingDir is that of a sibling. It looks at nothing that a process can choose before it is known whose process it is.
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

// KillIn kills the siblings that work in a directory, and returns when none is left.
func KillIn(ctx context.Context, dir string) error {
	parent := filepath.Dir(dir)
	if resolved, err := filepath.EvalSymlinks(parent); err == nil {
		parent = resolved
	}
	for pause := range pauses {
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

// killSibling kills a process if it still is the one that was found when it is held.
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
