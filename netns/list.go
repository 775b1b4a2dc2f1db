package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
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
func Users(path string) ([]int, error) {
	pinned, err := Inspect(path)
	if err != nil || !pinned.Pinned {
		return nil, err
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("failed to look for processes in network namespace %q: %w", path, err)
	}
	var users []int
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		var st unix.Stat_t
		// All network namespaces are on one nsfs, so the inode says it all. A process that has ended has none.
		if unix.Stat(filepath.Join("/proc", entry.Name(), "ns/net"), &st) == nil && st.Ino == pinned.Inode {
			users = append(users, pid)
		}
	}
	return users, nil
}
