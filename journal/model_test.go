package journal

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// A model of the two files, as the package comment states them: entries in the order of their sequence numbers, without bytes,
// pages or locks.
type model struct {
	db  []modelEntry // the durable records of sandboxes that aren't forgotten
	log []modelEntry // records and tombstones
}

type modelEntry struct {
	seq       int
	id        string // of the sandbox
	says      string // of a record; equal for records that say the same
	durable   bool
	canWait   bool
	tombstone bool
}

// committed is the model once ledger.db has an operation, and logged once the log has it, too.
func (m model) committed(e modelEntry) model {
	next := model{db: slices.Clone(m.db), log: m.log}
	switch {
	case e.tombstone:
		next.db = slices.DeleteFunc(next.db, func(old modelEntry) bool { return old.id == e.id })
	case e.inTransaction():
		next.db = firstAndNewest(slices.Concat(next.db, m.waiting(e.id), []modelEntry{e}))
	}
	return next
}

// inTransaction says that an operation is one of ledger.db before it is one of the log.
func (e modelEntry) inTransaction() bool { return e.tombstone || e.durable && !e.canWait }

// waiting are the records that the next durable one of a sandbox takes along.
func (m model) waiting(id string) []modelEntry {
	return slices.DeleteFunc(m.replay(false), func(e modelEntry) bool { return e.id != id || !e.durable || slices.Contains(m.db, e) })
}

func (m model) logged(e modelEntry) model {
	return model{db: m.db, log: append(slices.Clone(m.log), e)}
}

// replay is what both files say together: ledger.db decides which sandboxes there are, unless it is lost.
func (m model) replay(dbLost bool) []modelEntry {
	first := map[string]int{} // of each sandbox in ledger.db
	for _, e := range slices.Backward(m.db) {
		first[e.id] = e.seq
	}
	forgot := map[string]int{}
	for _, e := range m.log {
		if e.tombstone {
			forgot[e.id] = e.seq
		}
	}
	var all []modelEntry
	for _, e := range m.log {
		since, exists := first[e.id]
		if !e.tombstone && e.seq > forgot[e.id] && (dbLost || exists && e.seq >= since) {
			all = append(all, e)
		}
	}
	for _, e := range m.db {
		if !slices.Contains(all, e) {
			all = append(all, e)
		}
	}
	slices.SortFunc(all, func(a, b modelEntry) int { return cmp.Compare(a.seq, b.seq) })
	return firstAndNewest(all)
}

// opened is the model after a restart, which writes the log anew. A reboot has emptied the directory that it was in.
func (m model) opened(reboot bool) model {
	if reboot {
		m.log = nil
	}
	return model{db: m.db, log: m.replay(false)}
}

// firstAndNewest keeps two of the records that say the same.
func firstAndNewest(all []modelEntry) []modelEntry {
	return slices.DeleteFunc(slices.Clone(all), func(e modelEntry) bool {
		same := func(o modelEntry) bool { return o.id == e.id && o.says == e.says }
		earlier := slices.ContainsFunc(all, func(o modelEntry) bool { return same(o) && o.seq < e.seq })
		later := slices.ContainsFunc(all, func(o modelEntry) bool { return same(o) && o.seq > e.seq })
		return earlier && later
	})
}

// rendered has the form of lines: the oldest sandbox first.
func rendered(entries []modelEntry) []string {
	first := map[string]int{}
	for _, e := range slices.Backward(entries) {
		first[e.id] = e.seq
	}
	slices.SortStableFunc(entries, func(a, b modelEntry) int { return cmp.Compare(first[a.id], first[b.id]) })
	var out []string
	for _, e := range entries {
		out = append(out, e.id+" "+e.says)
	}
	return out
}

// crash is a moment at which the daemon may be killed: the files then, and what the model says of them.
type crash struct {
	when  string
	files dirs
	model model
	torn  bool
}

// TestCrashAnywhere runs random operations on a ledger and on the model, and kills the daemon at every point of each: what a restart
// finds is what the model says. From time to time the operations go on after one of these kills.
func TestCrashAnywhere(t *testing.T) {
	const sequences, operations = 12, 14
	t.Setenv("TMPDIR", "/dev/shm") // whose files are synced at once, which has no part in this
	for seed := range uint64(sequences) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			w := &sequence{rand: rand.New(rand.NewPCG(seed, 0)), files: newDirs(t)}
			for range operations {
				crashes := w.operate(t)
				for _, c := range crashes {
					c.check(t)
				}
				w.goOn(t, crashes)
			}
		})
	}
}

// sequence is one sequence of operations.
type sequence struct {
	rand  *rand.Rand
	files dirs
	model model
	seq   int
	boots int
}

// operate opens the ledger, does something, and returns the moments of doing it.
func (w *sequence) operate(t *testing.T) []crash {
	l := w.files.open(t)
	w.model = w.model.opened(false)
	e, do := w.choose(l)
	before := w.files.image(t)
	var between dirs
	l.spy().beforeWrite = func() { between = w.files.image(t) }
	require.NoError(t, do(context.Background()))
	after := w.files.image(t)
	require.True(t, rewritten(t, l))
	trimmed := w.files.image(t)
	require.NoError(t, l.Close())

	committed := w.model.committed(e)
	logged := committed.logged(e)
	crashes := []crash{
		{when: "before", files: before, model: w.model},
		{when: "in a rewrite of the log", files: rewriting(t, after), model: logged},
		{when: "in the log", files: torn(t, between, after), model: committed, torn: true},
		{when: "after", files: after, model: logged},
		{when: "after a rewrite of the log", files: trimmed, model: logged.opened(false)},
	}
	if e.inTransaction() {
		crashes = append(crashes, crash{when: "between the files", files: between, model: committed})
	}
	w.model = logged.opened(false)
	return crashes
}

// choose picks an operation that the ledger admits.
func (w *sequence) choose(l *Ledger) (modelEntry, func(context.Context) error) {
	w.seq++
	known := w.model.replay(false)
	e := modelEntry{seq: w.seq, id: string("abc"[w.rand.IntN(3)])}
	kinds := map[bool][]Kind{true: {Owed, Done}, false: {Intent, Noted, Undone}}
	r := &Record{Key: key(e.id), Step: fmt.Sprint("s", w.rand.IntN(3))}
	switch begun := slices.ContainsFunc(known, func(o modelEntry) bool { return o.id == e.id }); {
	case !begun:
		r.Kind, r.Step, e.durable = Begun, "", true
	case w.rand.IntN(4) == 0:
		e.tombstone = true
		return e, func(ctx context.Context) error { return l.Forget(ctx, r.Key) }
	default:
		e.durable = w.rand.IntN(2) == 0
		e.canWait = e.durable && w.rand.IntN(2) == 0
		r.Kind, r.Durable, r.CanWait = kinds[e.durable][w.rand.IntN(len(kinds[e.durable]))], e.durable, e.canWait
	}
	e.says = string(r.Kind)
	if r.Step != "" {
		e.says += " " + r.Step
	}
	return e, func(ctx context.Context) error { return l.Append(ctx, r) }
}

// torn cuts what came to the log in half.
func torn(t *testing.T, before, after dirs) dirs {
	d := after.image(t)
	from, err := os.Stat(before.log())
	require.NoError(t, err)
	to, err := os.Stat(after.log())
	require.NoError(t, err)
	require.NoError(t, os.Truncate(d.log(), (from.Size()+to.Size())/2))
	return d
}

// rewriting leaves a new log that isn't complete beside the old one.
func rewriting(t *testing.T, at dirs) dirs {
	d := at.image(t)
	content, err := os.ReadFile(d.log())
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(d.log()+".new", content[:len(content)/2], 0o600))
	return d
}

// check restarts after the kill, in four ways.
func (c crash) check(t *testing.T) {
	t.Helper()
	restart := func(how string, d dirs, want []modelEntry, damaged bool) {
		t.Helper()
		l := d.open(t)
		require.Equal(t, rendered(want), lines(l.Sandboxes()), "killed %s, %s", c.when, how)
		require.Equal(t, damaged, len(l.Damage()) > 0, "killed %s, %s: %+v", c.when, how, l.Damage())
		require.NoError(t, l.Close())
	}
	same := c.files.image(t)
	restart("same boot", same, c.model.replay(false), c.torn)
	restart("same boot, started once more", same, c.model.replay(false), false)

	reboot := c.files.image(t)
	require.NoError(t, os.Remove(reboot.log()))
	reboot.reboot(t, "another boot")
	restart("reboot", reboot, c.model.opened(true).replay(false), false)

	lost := c.files.image(t)
	require.NoError(t, os.Remove(lost.db()))
	alone := model{log: c.model.log}.replay(true)
	restart("ledger.db lost", lost, alone, c.torn || len(alone) > 0)
}

// goOn chooses where the next operation takes up: mostly after the last one, else at a kill or after a reboot.
func (w *sequence) goOn(t *testing.T, crashes []crash) {
	if w.rand.IntN(3) == 0 {
		c := crashes[w.rand.IntN(len(crashes))]
		w.files, w.model = c.files, c.model
	}
	if w.rand.IntN(6) == 0 {
		w.boots++
		w.files.reboot(t, fmt.Sprint("boot ", w.boots))
		require.NoError(t, os.Remove(w.files.log()))
		w.model = w.model.opened(true)
	}
}
