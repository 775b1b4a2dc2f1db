package netns

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/host"
)

// Pins are the names in dir of what [Handle.Pin] makes: pinned namespaces, and mount points without a mount. What else there is
// is left out. A directory that doesn't exist has none.
func Pins(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("failed to list network namespaces: %w", err)
	}
	var pins []string
	for _, entry := range entries {
		target, _, err := openTarget(filepath.Join(dir, entry.Name()))
		if errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
			continue // it has gone meanwhile, or is something else
		}
		if err != nil {
			return nil, err
		}
		target.Close()
		pins = append(pins, entry.Name())
	}
	return pins, nil
}

// Users are the pids of the processes in the network namespace that is pinned at path; none where none is pinned.
//
// Errors: those of [host.Readlink], naming the process.
func Users(ctx context.Context, path string) ([]int, error) {
	pinned, err := Inspect(path)
	if err != nil || !pinned.Pinned {
		return nil, err
	}
	pids, err := host.Pids()
	if err != nil {
		return nil, err
	}
	// All network namespaces are on one nsfs, so the inode says it all.
	of := fmt.Sprintf("net:[%d]", pinned.Inode)
	var users []int
	for _, pid := range pids {
		switch ns, err := host.Readlink(ctx, pid, "ns/net"); {
		case errdefs.IsNotFound(err), errors.Is(err, fs.ErrPermission): // it has ended, or has capabilities that this process lacks
		case err != nil:
			return nil, fmt.Errorf("failed to look for processes in network namespace %q: %w", path, err)
		case ns == of:
			users = append(users, pid)
		}
	}
	return users, nil
}
