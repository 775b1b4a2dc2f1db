package journal

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Snapshot is the ledger as it was at one moment.
type Snapshot struct {
	Sandboxes   []Sandbox // oldest first
	BootChanged bool      // see Ledger.BootChanged
	BootSeq     uint64    // see Ledger.BootSeq
	Damage      []Damage
	Aside       []string  // see Ledger.Aside
	Written     time.Time // when a file of the ledger was last written to
}

// OpenReadOnly reads the ledger without changing anything, for use while no daemon runs. It holds no file when it returns.
// It returns Unavailable when a daemon has the ledger open (after waiting some seconds for it to go), and NotFound when there is
// no ledger.
func OpenReadOnly(rootDir, stateDir string) (*Snapshot, error) {
	return openReadOnly(rootDir, stateDir, BootIDFile, lockWait)
}

func openReadOnly(rootDir, stateDir, bootIDFile string, wait time.Duration) (*Snapshot, error) {
	bootID, err := readBootID(bootIDFile)
	if err != nil {
		return nil, err
	}
	f, inDB, err := findDurable(filepath.Join(rootDir, durableName), os.O_RDONLY, unix.LOCK_SH, wait)
	if err != nil {
		return nil, err
	}
	if f != nil {
		defer f.Close() // and with it the lock, which keeps a daemon from rewriting the log meanwhile
	}
	inLog := readLog(filepath.Join(stateDir, logName))
	if !inDB.found && !inLog.found {
		return nil, fmt.Errorf("no ledger in %s and %s: %w", rootDir, stateDir, errdefs.ErrNotFound)
	}
	aside, err := asideIn(rootDir, stateDir)
	if err != nil {
		return nil, err
	}
	r := replay(inDB, inLog, bootID)
	return &Snapshot{
		Sandboxes:   r.live.sandboxes(inLog.content),
		BootChanged: r.bootChanged,
		BootSeq:     r.bootSeq,
		Damage:      slices.Concat(inDB.damage, inLog.damage),
		Aside:       aside,
		Written:     lastWritten(inDB.path, inLog.path),
	}, nil
}

// Files are the paths of a ledger's files, below its two directories.
func Files(rootDir, stateDir string) []string {
	return []string{filepath.Join(rootDir, durableName), filepath.Join(stateDir, logName)}
}

// lastWritten is the newest modification of the files; zero when there is none.
func lastWritten(paths ...string) (newest time.Time) {
	for _, path := range paths {
		if info, err := os.Stat(path); err == nil && info.ModTime().After(newest) {
			newest = info.ModTime()
		}
	}
	return newest
}
