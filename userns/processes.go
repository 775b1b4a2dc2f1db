package userns

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/host"
)

// Process is a process, and the host ids that it uses.
type Process struct {
	Pid int
	Use
}

// Processes returns the host's processes that use ids from [MinHostID] up, which pods may have. A
// process uses the user and the group that it runs as. It also uses the ids that its user namespace
// maps, unless that is containerd's. Supplementary groups don't count: a process may have 65536 of
// them, in as many ranges, and is still not a process of the pods with these ranges.
//
// Errors: those of [host.Read], naming the process.
func Processes(ctx context.Context) ([]Process, error) {
	own, err := host.Read(ctx, os.Getpid(), "uid_map")
	if err != nil {
		return nil, fmt.Errorf("failed to read the id map of the host: %w", err)
	}
	pids, err := host.Pids()
	if err != nil {
		return nil, err
	}
	var all []Process
	for _, pid := range pids {
		p, err := process(ctx, pid, string(own))
		if errdefs.IsNotFound(err) {
			continue // the process has ended
		}
		if err != nil {
			return nil, fmt.Errorf("failed to look at process %d: %w", pid, err)
		}
		if len(p.UIDs) > 0 || len(p.GIDs) > 0 {
			all = append(all, p)
		}
	}
	return all, nil
}

// process returns the ids that one process uses. own is the id map of processes without a user
// namespace of their own.
func process(ctx context.Context, pid int, own string) (p Process, err error) {
	status, err := host.Read(ctx, pid, "status")
	if err != nil {
		return p, err
	}
	if ended(string(status)) {
		return p, nil
	}
	p = Process{pid, runsAs(string(status))}
	p.By = fmt.Sprintf("process %d (%s)", pid, p.By)
	uids, err := host.Read(ctx, pid, "uid_map")
	if err != nil || string(uids) == own {
		return p, err
	}
	gids, err := host.Read(ctx, pid, "gid_map")
	if err != nil {
		return p, err
	}
	return p, p.addMaps(string(uids), string(gids))
}

// ended reports whether a process has ended with all its threads, and only waits for its parent.
// The first thread of a process may end long before the others, and is a zombie until they have
// ended.
func ended(status string) bool {
	var zombie, alone bool
	for line := range strings.Lines(status) {
		key, value, _ := strings.Cut(line, ":")
		switch value = strings.TrimSpace(value); key {
		case "State":
			zombie = strings.HasPrefix(value, "Z") || strings.HasPrefix(value, "X")
		case "Threads":
			alone = value == "0" || value == "1"
		}
	}
	return zombie && alone
}

// runsAs returns the ids in /proc/PID/status, with the name of the process.
func runsAs(status string) (use Use) {
	for line := range strings.Lines(status) {
		key, values, _ := strings.Cut(line, ":")
		switch key {
		case "Name":
			use.By = strings.TrimSpace(values)
		case "Uid":
			use.UIDs = singles(values)
		case "Gid":
			use.GIDs = singles(values)
		}
	}
	return use
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

// singles returns the ids in a line of /proc/PID/status.
func singles(values string) (ids []Mapping) {
	for _, field := range strings.Fields(values) {
		if id, err := strconv.ParseUint(field, 10, 32); err == nil && id >= MinHostID {
			ids = append(ids, Mapping{HostID: uint32(id), Length: 1})
		}
	}
	return ids
}

// Within returns the part of the use that is in the given extents.
func (u Use) Within(uids, gids []Mapping) Use {
	return Use{UIDs: within(u.UIDs, uids), GIDs: within(u.GIDs, gids), By: u.By}
}

// within returns the parts of the used extents that are in the given ones.
func within(used, given []Mapping) (parts []Mapping) {
	for _, u := range used {
		for _, g := range given {
			if u.Length == 0 || g.Length == 0 || !u.overlaps(g) {
				continue
			}
			first, last := max(u.HostID, g.HostID), min(u.last(), g.last())
			parts = append(parts, Mapping{HostID: first, Length: uint32(last-uint64(first)) + 1})
		}
	}
	return parts
}
