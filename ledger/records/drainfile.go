package records

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// DrainFile is the name of the file in the ledger's root directory that exists during a drain. The
// file is empty. Its modification time is the start of the drain.
const DrainFile = "draining"

// DrainingSince returns the start of the drain from the file in a directory; zero if there is no
// drain.
func DrainingSince(dir string) (time.Time, error) {
	info, err := os.Stat(filepath.Join(dir, DrainFile))
	switch {
	case errors.Is(err, os.ErrNotExist):
		return time.Time{}, nil
	case err != nil:
		return time.Time{}, fmt.Errorf("failed to determine whether the node is being drained: %w", err)
	}
	return info.ModTime(), nil
}
