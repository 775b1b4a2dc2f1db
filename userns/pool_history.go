package userns

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
)

// history is the order in which a pool's ranges were used, in a file. Each time a pod releases a
// range, the file gets a line "uid gid" with the range's first ids. The file doesn't say which
// ranges are in use. So a lost line does no harm: nothing is fsynced, and unreadable lines are
// skipped.
type history struct {
	path  string
	slots map[Mappings]*slot
	clock uint64 // of the last use
	lines int    // of the file
}

// openHistory reads when each of the pool's ranges was last used.
func openHistory(path string, slots map[Mappings]*slot) *history {
	h := &history{path: path, slots: slots}
	text, _ := os.ReadFile(path)
	for line := range bytes.Lines(text) {
		h.lines++
		if m, ok := parseUse(line); ok && slots[m] != nil {
			h.clock++
			slots[m].lastUsed = h.clock
		}
	}
	_ = h.rewrite() // the next write reports the error
	return h
}

func parseUse(line []byte) (Mappings, bool) {
	var uid, gid uint32
	if n, err := fmt.Sscanf(string(line), "%d %d\n", &uid, &gid); n != 2 || err != nil {
		return Mappings{}, false
	}
	return Mappings{UIDs: Mapping{HostID: uid, Length: RangeSize}, GIDs: Mapping{HostID: gid, Length: RangeSize}}, true
}

func writeUse(b *bytes.Buffer, s *slot) {
	fmt.Fprintf(b, "%d %d\n", s.mappings.UIDs.HostID, s.mappings.GIDs.HostID)
}

// used records the use of a range. If most lines of the file are outdated, it rewrites the file.
func (h *history) used(s *slot) error {
	h.clock++
	s.lastUsed = h.clock
	note := h.append
	if h.lines >= max(1024, 4*len(h.slots)) {
		note = func(*slot) error { return h.rewrite() }
	}
	if err := note(s); err != nil {
		return fmt.Errorf("failed to record the use of an id range: %w", err)
	}
	return nil
}

func (h *history) append(s *slot) error {
	f, err := os.OpenFile(h.path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	writeUse(&b, s)
	h.lines++
	_, err = f.Write(b.Bytes())
	return errors.Join(err, f.Close())
}

func (h *history) rewrite() error {
	var used []*slot
	for _, s := range h.slots {
		if s.lastUsed > 0 {
			used = append(used, s)
		}
	}
	slices.SortFunc(used, byUse)
	var b bytes.Buffer
	for _, s := range used {
		writeUse(&b, s)
	}
	fresh := h.path + ".new"
	defer os.Remove(fresh) // no-op after the rename
	if err := os.WriteFile(fresh, b.Bytes(), 0o600); err != nil {
		return err
	}
	h.lines = len(used)
	return os.Rename(fresh, h.path)
}
