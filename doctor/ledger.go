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

// Space below which podfsm can't write its records, and below which it soon can't. A pod's are a few KiB.
const (
	noBytes, fewBytes   = 1 << 20, 64 << 20
	noInodes, fewInodes = 16, 1000
)

// ledger says how the two files are.
func ledger(_ context.Context, n Node) []Finding {
	l, err := n.Ledger()
	if err != nil {
		return []Finding{fail(NoPods, err.Error(), "see \"When the ledger is damaged\" in the operators' page")}
	}
	if len(l.Damaged) > 0 {
		var texts, files []string
		for _, d := range l.Damaged {
			texts, files = append(texts, strings.TrimSuffix(d.File+": "+d.Reason, ": ")), append(files, d.File)
		}
		return []Finding{warn("damaged: "+strings.Join(texts, "; "), damagedRemedy(files))}
	}
	if len(l.Files) == 0 {
		return []Finding{ok("there is none yet in " + strings.Join(l.Dirs, " and "))}
	}
	var texts []string
	for _, file := range l.Files {
		info, err := os.Stat(file)
		if err != nil {
			return []Finding{fail(NoPods, err.Error(), "drain the node and restart containerd: what only that file had is lost with it")}
		}
		texts = append(texts, fmt.Sprintf("%s has %s", file, units.BytesSize(float64(info.Size()))))
	}
	return []Finding{ok(strings.Join(texts, "; ") + "; " + stateOn(n.State))}
}

// stateOn says whether the state directory is on a tmpfs, which makes the records of steps as fast as they are meant to be. Pods run with
// either.
func stateOn(dir string) string {
	var stat unix.Statfs_t
	if err := unix.Statfs(dir, &stat); err == nil && stat.Type == unix.TMPFS_MAGIC {
		return "the state directory is on a tmpfs"
	}
	return "the state directory is on no tmpfs, so each step's record costs a write to a disk"
}

// damagedRemedy differs for files that are kept aside, which nobody but the operator needs, and those in use.
func damagedRemedy(files []string) string {
	const look = "see with podfsm ps and podfsm leaks what became of the pods"
	aside := slices.DeleteFunc(files, func(file string) bool { return !strings.Contains(filepath.Base(file), ".damaged-") })
	if len(aside) == 0 {
		return "start containerd, which sets the file aside, and " + look
	}
	return look + ", then rm " + strings.Join(aside, " ")
}

// diskSpace looks at the filesystems of the ledger and of the snapshots.
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

// spaceIn says what is free on the filesystem of a directory. A filesystem without a number of inodes makes them as needed.
func spaceIn(dir string) Finding {
	var stat unix.Statfs_t
	if err := unix.Statfs(dir, &stat); err != nil {
		return unknown(fmt.Sprintf("failed to look at %s: %v", dir, err), "df "+dir)
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

// debts counts what is owed.
func debts(_ context.Context, n Node) []Finding {
	l, err := n.Ledger()
	switch {
	case err != nil:
		return []Finding{unknown(err.Error(), "see the check ledger")}
	case l.Owed > 0:
		return []Finding{warn(fmt.Sprintf("sandboxes whose cleanup is owed: %d", l.Owed), "podfsm cleanups names the causes; remove them, or write the cleanups off")}
	default:
		return []Finding{ok("nothing is owed")}
	}
}
