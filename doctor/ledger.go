package doctor

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"
)

// Free space below which podfsm can't write records, and below which it warns. The records of a pod
// have a few KiB.
const (
	noBytes, fewBytes   = 1 << 20, 64 << 20
	noInodes, fewInodes = 16, 1000
)

// ledger checks the files of the ledger.
func ledger(_ context.Context, n Node) []Finding {
	l, err := n.Ledger()
	if err != nil {
		return []Finding{fail(NoPods, err.Error(), "see docs/runbooks/quarantined.md on a damaged ledger")}
	}
	if len(l.Damaged) > 0 {
		var texts, files []string
		for _, d := range l.Damaged {
			texts, files = append(texts, strings.TrimSuffix(d.File+": "+d.Reason, ": ")), append(files, d.File)
		}
		return []Finding{warn("damaged: "+strings.Join(texts, "; "), damagedRemedy(files))}
	}
	if len(l.Files) == 0 {
		return []Finding{ok("no ledger yet in " + strings.Join(l.Dirs, " and "))}
	}
	var texts []string
	for _, file := range l.Files {
		info, err := os.Stat(file)
		if err != nil {
			return []Finding{fail(NoPods, err.Error(), "drain the node and restart containerd: records that only that file had are lost")}
		}
		texts = append(texts, fmt.Sprintf("%s has %s", file, units.BytesSize(float64(info.Size()))))
	}
	return []Finding{ok(strings.Join(texts, "; ") + "; " + stateOn(n.State))}
}

// stateOn says whether the state directory is on a tmpfs. Pods run without one, but their steps are
// slower.
func stateOn(dir string) string {
	var stat unix.Statfs_t
	if err := unix.Statfs(dir, &stat); err == nil && stat.Type == unix.TMPFS_MAGIC {
		return "the state directory is on a tmpfs"
	}
	return "the state directory is not on a tmpfs, so each record of a step is written to a disk"
}

// damagedRemedy returns the remedy. The operator removes files that are kept aside, but not those
// in use.
func damagedRemedy(files []string) string {
	const look = "check the pods with podfsm ps and podfsm leaks"
	aside := slices.DeleteFunc(files, func(file string) bool { return !strings.Contains(filepath.Base(file), ".damaged-") })
	if len(aside) == 0 {
		return "start containerd, which sets the file aside, and " + look
	}
	return look + ", then rm " + strings.Join(aside, " ")
}

// diskSpace checks the filesystems of the ledger and of the snapshots.
func diskSpace(_ context.Context, n Node) []Finding {
	l, err := n.Ledger()
	if err != nil && len(l.Dirs) == 0 {
		return []Finding{unknown(err.Error(), "see the check ledger")}
	}
	dirs := slices.Clone(l.Dirs)
	if n.Config != nil {
		for _, h := range n.Config.Handlers {
			if root := h.Snapshotter.Root; root != "" && !slices.Contains(dirs, root) {
				dirs = append(dirs, root)
			}
		}
	}
	for i, dir := range dirs {
		dirs[i] = existing(dir)
	}
	slices.Sort(dirs)
	var found []Finding
	for _, dir := range slices.Compact(dirs) {
		found = append(found, spaceIn(dir))
	}
	return found
}

// spaceIn checks the free space of a directory's filesystem. It ignores inodes if the filesystem
// makes them as needed.
func spaceIn(dir string) Finding {
	var stat unix.Statfs_t
	if err := unix.Statfs(dir, &stat); err != nil {
		return unknown(fmt.Sprintf("failed to get the free space of %s: %v", dir, err), "df "+dir)
	}
	bytes := stat.Bavail * uint64(stat.Bsize)
	inodes, counted := stat.Ffree, stat.Files > 0
	evidence := fmt.Sprintf("%s has %s free", dir, units.BytesSize(float64(bytes)))
	if counted {
		evidence += fmt.Sprintf(" and %d inodes", inodes)
	}
	switch {
	case bytes < noBytes || counted && inodes < noInodes:
		return fail(NoPods, evidence, "free some space there: no pod can start")
	case bytes < fewBytes || counted && inodes < fewInodes:
		return warn(evidence, "free some space there before it is full")
	default:
		return ok(evidence)
	}
}

// pendingCleanups counts the sandboxes with a pending cleanup.
func pendingCleanups(_ context.Context, n Node) []Finding {
	l, err := n.Ledger()
	switch {
	case err != nil:
		return []Finding{unknown(err.Error(), "see the check ledger")}
	case l.Pending > 0:
		return []Finding{warn(fmt.Sprintf("sandboxes with a pending cleanup: %d", l.Pending), "podfsm cleanups shows the causes; remove them, or write the cleanups off")}
	default:
		return []Finding{ok("no cleanup is pending")}
	}
}
