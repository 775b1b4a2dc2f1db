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

// Pins returns the names in dir that [Handle.Pin] may have made: pinned namespaces, and mount
// points without a mount. It skips all other files. A missing directory has no pins.
func Pins(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("failed to list network namespaces: %w", err)
	}
	var pins []string
	for _, entry := range entries {
		target, _, err := openTarget(filepath.Join(dir, entry.Name()))
		if errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
			continue // removed meanwhile, or not made by Pin
		}
		if err != nil {
			return nil, err
		}
		target.Close()
		pins = append(pins, entry.Name())
	}
	return pins, nil
}

// Users returns the pids of the processes in the network namespace pinned at path, none if no
// namespace is pinned there.
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
	// All network namespaces are on one nsfs, so the inode identifies them.
	of := fmt.Sprintf("net:[%d]", pinned.Inode)
	var users []int
	for _, pid := range pids {
		switch ns, err := host.Readlink(ctx, pid, "ns/net"); {
		case errdefs.IsNotFound(err), errors.Is(err, fs.ErrPermission): // the process has ended, or has capabilities that this process lacks
		case err != nil:
			return nil, fmt.Errorf("failed to look for processes in network namespace %q: %w", path, err)
		case ns == of:
			users = append(users, pid)
		}
	}
	return users, nil
}
