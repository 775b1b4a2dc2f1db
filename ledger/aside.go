package ledger

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// keptAside is how many damaged versions of a file are kept: enough to examine, too few to fill a
// tmpfs.
const keptAside = 4

// keepAside links the file to path.damaged-N, with the lowest N above those in use. It removes the
// oldest of these links if there are too many. The file itself stays, so that a crash at this point
// loses nothing.
func keepAside(path string) (string, error) {
	kept, err := listAside(path)
	if err != nil {
		return "", err
	}
	n := 1
	if len(kept) > 0 {
		n = kept[len(kept)-1] + 1
	}
	aside := asideName(path, n)
	err = os.Link(path, aside)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil // the file was removed since
	}
	if err != nil {
		return "", fmt.Errorf("failed to keep damaged %s aside: %w", path, withClass(err))
	}
	for len(kept) >= keptAside {
		if err := os.Remove(asideName(path, kept[0])); err != nil {
			return "", fmt.Errorf("failed to remove an old damaged file: %w", withClass(err))
		}
		kept = kept[1:]
	}
	return aside, nil
}

// asideIn returns the paths of all damaged files that are kept in the two directories.
func asideIn(rootDir, stateDir string) ([]string, error) {
	var paths []string
	for _, path := range Files(rootDir, stateDir) {
		kept, err := listAside(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		for _, n := range kept {
			paths = append(paths, asideName(path, n))
		}
	}
	return paths, nil
}

func asideName(path string, n int) string { return path + ".damaged-" + strconv.Itoa(n) }

// listAside returns the numbers in use, in order.
func listAside(path string) ([]int, error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("failed to list damaged files: %w", withClass(err))
	}
	var kept []int
	for _, e := range entries {
		if suffix, ok := strings.CutPrefix(e.Name(), filepath.Base(path)+".damaged-"); ok {
			if n, err := strconv.Atoi(suffix); err == nil {
				kept = append(kept, n)
			}
		}
	}
	slices.SortFunc(kept, cmp.Compare[int])
	return kept, nil
}
