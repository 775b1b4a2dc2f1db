package userns

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Processes are the host ids that the host's processes use: those that their user namespaces map, where these aren't ours, and those
// that they run as. Ids below 65536 are left out: no pod has them.
func Processes(ctx context.Context) ([]Use, error) { return processes(ctx, "/proc") }

func processes(ctx context.Context, proc string) (uses []Use, err error) {
	own, err := os.ReadFile(filepath.Join(proc, "self/uid_map"))
	if err != nil {
		return nil, fmt.Errorf("failed to read the id map of the host: %w", err)
	}
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, fmt.Errorf("failed to list the host's processes: %w", err)
	}
	for _, entry := range entries {
		if _, err := strconv.Atoi(entry.Name()); err != nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("failed to look at the host's processes: %w", err)
		}
		use, err := process(filepath.Join(proc, entry.Name()), string(own))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has ended meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("failed to look at process %s: %w", entry.Name(), err)
		}
		if len(use.UIDs) > 0 || len(use.GIDs) > 0 {
			use.By = fmt.Sprintf("process %s (%s)", entry.Name(), use.By)
			uses = append(uses, use)
		}
	}
	return uses, nil
}

// process is what one process uses, by its name. own is the id map that means no user namespace of its own.
func process(dir, own string) (use Use, err error) {
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return use, err
	}
	for line := range strings.Lines(string(status)) {
		key, values, _ := strings.Cut(line, ":")
		switch key {
		case "Name":
			use.By = strings.TrimSpace(values)
		case "Uid":
			use.UIDs = append(use.UIDs, singles(values)...)
		case "Gid", "Groups":
			use.GIDs = append(use.GIDs, singles(values)...)
		}
	}
	uids, err := os.ReadFile(filepath.Join(dir, "uid_map"))
	if err != nil || string(uids) == own {
		return use, err
	}
	gids, err := os.ReadFile(filepath.Join(dir, "gid_map"))
	if err != nil {
		return use, err
	}
	return use, use.addMaps(string(uids), string(gids))
}

// addMaps adds the host ids of a user namespace's maps.
func (u *Use) addMaps(uids, gids string) error {
	for _, side := range []struct {
		text string
		into *[]Mapping
	}{{uids, &u.UIDs}, {gids, &u.GIDs}} {
		extents, err := parseExtents(side.text)
		if err != nil {
			return err
		}
		*side.into = append(*side.into, extents...)
	}
	return nil
}

// singles are the ids of a line of /proc/PID/status.
func singles(values string) (ids []Mapping) {
	for _, field := range strings.Fields(values) {
		if id, err := strconv.ParseUint(field, 10, 32); err == nil && id >= minHostID {
			ids = append(ids, Mapping{HostID: uint32(id), Length: 1})
		}
	}
	return ids
}
