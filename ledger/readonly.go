package ledger

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
)

// Snapshot is the ledger as it was at one moment.
type Snapshot struct {
	Sandboxes   []Sandbox // oldest first
	BootChanged bool      // see Ledger.BootChanged
	BootSeq     uint64    // see Ledger.BootSeq
	Damage      []Damage
	Aside       []string  // see Ledger.Aside
	Written     time.Time // the last write to a file of the ledger
	InUse       bool      // a daemon has the ledger open
}

// OpenReadOnly reads the ledger and changes nothing, also while a daemon has it open. It closes all
// files before it returns. It returns NotFound if there is no ledger.
func OpenReadOnly(rootDir, stateDir string) (*Snapshot, error) {
	return openReadOnly(rootDir, stateDir, BootIDFile)
}

func openReadOnly(rootDir, stateDir, bootIDFile string) (*Snapshot, error) {
	bootID, err := readBootID(bootIDFile)
	if err != nil {
		return nil, err
	}
	inUse, err := isLocked(rootDir)
	if err != nil {
		return nil, err
	}
	// A daemon writes the durable log first. So read it last: it has all durable records that the
	// other log has.
	inLog := readLog(logPath(stateDir))
	durable := readLog(durablePath(rootDir)).inMemory()
	if !durable.found && !inLog.found {
		return nil, fmt.Errorf("no ledger in %s and %s: %w", rootDir, stateDir, errdefs.ErrNotFound)
	}
	aside, err := asideIn(rootDir, stateDir)
	if err != nil {
		return nil, err
	}
	r := replay(durable, inLog, bootID)
	return &Snapshot{
		Sandboxes:   r.live.sandboxes(inLog.content),
		BootChanged: r.bootChanged,
		BootSeq:     r.bootSeq,
		Damage:      slices.DeleteFunc(slices.Concat(durable.damage, inLog.damage), func(d Damage) bool { return inUse && d.Torn }),
		Aside:       aside,
		Written:     lastWritten(durable.path, inLog.path),
		InUse:       inUse,
	}, nil
}

// Files returns the paths of a ledger's files in its two directories.
func Files(rootDir, stateDir string) []string {
	return []string{durablePath(rootDir), logPath(stateDir)}
}

func durablePath(rootDir string) string { return filepath.Join(rootDir, logName) }
func logPath(stateDir string) string    { return filepath.Join(stateDir, logName) }

// lastWritten returns the newest modification time of the files; zero if there is none.
func lastWritten(paths ...string) (newest time.Time) {
	for _, path := range paths {
		if info, err := os.Stat(path); err == nil && info.ModTime().After(newest) {
			newest = info.ModTime()
		}
	}
	return newest
}
