package userns

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// SubIDs returns the ranges that subuid(5) and subgid(5) files give to a user. The user needs no
// account. It fails with FailedPrecondition if there are none, and with InvalidArgument if an entry
// of the user is invalid.
func SubIDs(name, subuid, subgid string) (Ranges, error) {
	names := []string{name}
	if account, err := user.Lookup(name); err == nil {
		names = append(names, account.Uid) // entries have the name or the uid
	}
	uids, err := subIDFile(subuid, names)
	if err != nil {
		return Ranges{}, err
	}
	gids, err := subIDFile(subgid, names)
	return Ranges{UIDs: uids, GIDs: gids}, err
}

func subIDFile(path string, names []string) ([]Extent, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s does not exist, so user %q has no ids: %w", path, names[0], errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, fmt.Errorf("failed to open %s: %w", path, err)
	}
	defer f.Close()
	extents, err := parseSubIDs(f, names)
	if err != nil {
		return nil, fmt.Errorf("failed to read %s: %w", path, err)
	}
	if len(extents) == 0 {
		return nil, fmt.Errorf("%s gives no ids to user %q; add a line \"%s:FIRST:COUNT\": %w", path, names[0], names[0], errdefs.ErrFailedPrecondition)
	}
	return extents, nil
}

// parseSubIDs reads lines "name:first:count". It skips lines of other users, valid or not. An
// invalid line of this user is an error, because a misread number would give the ids of others to
// pods.
func parseSubIDs(r io.Reader, names []string) (extents []Extent, err error) {
	lines := bufio.NewScanner(r)
	for number := 1; lines.Scan(); number++ {
		line := strings.TrimSpace(lines.Text())
		for _, name := range names {
			if rest, ok := strings.CutPrefix(line, name+":"); ok {
				extent, err := parseExtent(rest)
				if err != nil {
					return nil, invalid("line %d, %q: %s", number, line, err)
				}
				extents = append(extents, extent)
			}
		}
	}
	return extents, lines.Err()
}

// parseExtent reads "first:count".
func parseExtent(text string) (Extent, error) {
	first, count, ok := strings.Cut(text, ":")
	if !ok {
		return Extent{}, errors.New("not of the form name:first:count")
	}
	e := Extent{}
	for _, number := range []struct {
		text string
		into *uint64
	}{{first, &e.First}, {count, &e.Size}} {
		var err error
		if *number.into, err = strconv.ParseUint(number.text, 10, 32); err != nil {
			return Extent{}, fmt.Errorf("invalid number of ids %q", number.text)
		}
	}
	return e, nil
}
