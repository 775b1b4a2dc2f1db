package records

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// DrainFile is the name of the file that says that new pods are refused, in the directory of the ledger that outlives a reboot. It is
// empty; its time is when the drain began.
const DrainFile = "draining"

// DrainingSince is when the drain began that the file in a directory tells of; zero where there is none.
func DrainingSince(dir string) (time.Time, error) {
	info, err := os.Stat(filepath.Join(dir, DrainFile))
	switch {
	case errors.Is(err, os.ErrNotExist):
		return time.Time{}, nil
	case err != nil:
		return time.Time{}, fmt.Errorf("failed to find out whether the node is being drained: %w", err)
	}
	return info.ModTime(), nil
}
