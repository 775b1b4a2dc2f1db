package ledger

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// A model of the two logs, as the package comment states them: entries in the order of their sequence numbers, without bytes
// or locks.
type model struct {
	durable []modelEntry // the durable records of sandboxes that aren't forgotten
	log     []modelEntry // the other log's records and tombstones
}

type modelEntry struct {
	seq       int
	id        string // of the sandbox
	says      string // of a record; equal for records that say the same
	durable   bool
	canWait   bool
	tombstone bool
}

// committed returns the model once the durable log has an operation. logged returns the model once
// the other log has it, too.
func (m model) committed(e modelEntry) model { return m.commits(e)[len(m.commits(e))-1] }

// commits returns the models of an operation's transaction: before it, and after each write.
func (m model) commits(e modelEntry) []model {
	all := []model{m}
	if e.tombstone {
		next := model{durable: slices.Clone(m.durable), log: m.log}
		next.durable = slices.DeleteFunc(next.durable, func(old modelEntry) bool { return old.id == e.id })
		return append(all, next)
	}
	if !e.inTransaction() {
		return all
	}
	for _, written := range append(m.waiting(e.id), e) {
		m.durable = firstAndNewest(slices.Concat(m.durable, []modelEntry{written}))
		all = append(all, m)
	}
	return all
}

// inTransaction says that an operation goes to the durable log first.
func (e modelEntry) inTransaction() bool { return e.tombstone || e.durable && !e.canWait }

// waiting returns the records that the sandbox's next durable transaction includes.
func (m model) waiting(id string) []modelEntry {
	return slices.DeleteFunc(m.replay(false), func(e modelEntry) bool { return e.id != id || !e.durable || slices.Contains(m.durable, e) })
}

func (m model) logged(e modelEntry) model {
	return model{durable: m.durable, log: append(slices.Clone(m.log), e)}
}

// replay returns the union of both logs. The durable log decides which sandboxes exist, unless it
// is lost.
func (m model) replay(lost bool) []modelEntry {
	first := map[string]int{} // of each sandbox in the durable log
	for _, e := range slices.Backward(m.durable) {
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
		if !e.tombstone && e.seq > forgot[e.id] && (lost || exists && e.seq >= since) {
			all = append(all, e)
		}
	}
	for _, e := range m.durable {
		if !slices.Contains(all, e) {
			all = append(all, e)
		}
	}
	slices.SortFunc(all, func(a, b modelEntry) int { return cmp.Compare(a.seq, b.seq) })
	return firstAndNewest(all)
}

// opened returns the model after a restart, which rewrites both logs. A reboot has emptied the
// state directory.
func (m model) opened(reboot bool) model {
	if reboot {
		m.log = nil
	}
	return m.trimmedDurable().trimmed()
}

// trimmed is the model once the log in the state directory has been rewritten, and trimmedDurable once the durable one has.
func (m model) trimmed() model { return model{durable: m.durable, log: m.replay(false)} }

func (m model) trimmedDurable() model {
	durable := slices.DeleteFunc(m.replay(false), func(e modelEntry) bool { return !e.durable })
	return model{durable: durable, log: m.log}
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

// crash is a moment at which the daemon may be killed: the files and the model at that moment.
type crash struct {
	when  string
	files dirs
	model model
	torn  bool
}

// TestCrashAnywhere runs random operations on a ledger and on the model, and kills the daemon at
// every point of each operation. A restart finds what the model says. Sometimes the operations go
// on after one of these kills.
func TestCrashAnywhere(t *testing.T) {
	const sequences, operations = 12, 14
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
		{when: "after a rewrite of the log", files: trimmed, model: logged.trimmed()},
	}
	if e.inTransaction() {
		crashes = append(crashes, crash{when: "between the files", files: between, model: committed})
	}
	w.model = logged.trimmed()
	return crashes
}

// choose picks an operation that the ledger admits.
func (w *sequence) choose(l *Ledger) (modelEntry, func(context.Context) error) {
	w.seq++
	known := w.model.replay(false)
	e := modelEntry{seq: w.seq, id: string("abc"[w.rand.IntN(3)])}
	kinds := map[bool][]Kind{true: {CleanupPending, Done}, false: {Intent, Noted, Undone}}
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
	require.NoError(t, os.Remove(lost.durable()))
	alone := model{log: c.model.log}.replay(true)
	restart("durable log lost", lost, alone, c.torn || len(alone) > 0)
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

// powerDisk is a disk that tracks which files, bytes and names of the root directory are synced,
// and which are only in the kernel's memory.
type powerDisk struct {
	osDisk
	dirs          dirs
	names, synced map[string]*powerFile // in the root directory: as they are, and as they are on the disk
	before        func(what string)     // as things are when something is about to be changed
}

type powerFile struct {
	logFile // nil once it is closed
	disk    *powerDisk
	synced  []byte // on the disk for sure
	last    []byte // all of it, when it was closed
}

func newPowerDisk(t *testing.T, d dirs) *powerDisk {
	p := &powerDisk{dirs: d, names: map[string]*powerFile{}, before: func(string) {}}
	if content, err := os.ReadFile(d.durable()); err == nil {
		p.names[d.durable()] = &powerFile{disk: p, synced: content, last: content}
	}
	p.synced = maps.Clone(p.names)
	return p
}

func (p *powerDisk) inRoot(path string) bool { return filepath.Dir(path) == p.dirs.root }

func (p *powerDisk) create(path string) (logFile, error) {
	f, err := p.osDisk.create(path)
	if err != nil || !p.inRoot(path) {
		return f, err
	}
	p.before("create")
	p.names[path] = &powerFile{logFile: f, disk: p}
	return p.names[path], nil
}

func (p *powerDisk) rename(from, to string) error {
	if p.inRoot(from) {
		p.before("rename")
		p.names[to] = p.names[from]
		delete(p.names, from)
	}
	return p.osDisk.rename(from, to)
}

func (p *powerDisk) syncDir(path string) error {
	p.before("sync of the directory")
	p.synced = maps.Clone(p.names)
	return p.osDisk.syncDir(path)
}

func (f *powerFile) WriteAt(b []byte, at int64) (int, error) {
	f.disk.before("write")
	return f.logFile.WriteAt(b, at)
}

func (f *powerFile) Sync() error {
	f.disk.before("sync")
	f.synced = f.content()
	return f.logFile.Sync()
}

func (f *powerFile) Close() error {
	f.last = f.content()
	defer func() { f.logFile = nil }()
	return f.logFile.Close()
}

// content returns the file's current content. A file from before the start isn't written: the start
// makes a new one.
func (f *powerFile) content() []byte {
	if f.logFile == nil {
		return f.last
	}
	b, err := io.ReadAll(io.NewSectionReader(f.logFile, 0, 1<<30))
	if err != nil {
		panic(err)
	}
	return b
}

// cuts returns what a power cut may leave of a file: the synced bytes, all bytes, or something
// between.
var cuts = map[string]func(synced, now []byte) []byte{
	"unsynced lost":     func(synced, _ []byte) []byte { return synced },
	"unsynced kept":     func(_, now []byte) []byte { return now },
	"unsynced half-way": func(synced, now []byte) []byte { return now[:(len(synced)+len(now))/2] },
	"only the size synced": func(synced, now []byte) []byte {
		return append(bytes.Clone(synced), make([]byte, len(now)-len(synced))...)
	},
}

// cut returns the ledger after a power cut now and a reboot.
func (p *powerDisk) cut(t *testing.T, names map[string]*powerFile, of func(synced, now []byte) []byte) dirs {
	d := newDirs(t)
	d.reboot(t, "after the power cut")
	require.NoError(t, os.MkdirAll(d.root, 0o700))
	for path, f := range names {
		require.NoError(t, os.WriteFile(filepath.Join(d.root, filepath.Base(path)), of(f.synced, f.content()), 0o600))
	}
	return d
}

// TestPowerCutAnywhere runs random operations on a ledger and on the model. Before each change to
// the disk, it cuts the power or kills the daemon. A start finds what the model says of some moment
// since the last acknowledged operation.
func TestPowerCutAnywhere(t *testing.T) {
	const sequences, operations = 8, 12
	for seed := range uint64(sequences) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			w := &sequence{rand: rand.New(rand.NewPCG(seed, 1)), files: newDirs(t)}
			for range operations {
				w.cutPower(t)
			}
		})
	}
}

// cutPower opens the ledger, does something, and rewrites it at times, with a power cut at every point of it.
func (w *sequence) cutPower(t *testing.T) {
	require.NoError(t, os.MkdirAll(w.files.state, 0o700))
	require.NoError(t, os.MkdirAll(w.files.root, 0o700))
	p := newPowerDisk(t, w.files)
	var found []ending
	p.before = func(what string) {
		for how, of := range cuts {
			for name, names := range map[string]map[string]*powerFile{"old names": p.synced, "new names": p.names} {
				found = append(found, ending{fmt.Sprintf("power cut before %s, %s, %s", what, how, name), p.cut(t, names, of), true})
			}
		}
		found = append(found, ending{"killed before " + what, w.files.image(t), false})
	}
	check := func(moments ...model) {
		for _, e := range found {
			e.check(t, moments)
		}
		found, w.model = nil, moments[len(moments)-1]
	}
	l := w.files.openOn(t, p)
	check(w.model, w.model.opened(false))

	e, do := w.choose(l)
	require.NoError(t, do(t.Context()))
	check(append(w.model.commits(e), w.model.committed(e).logged(e))...)

	if w.rand.IntN(3) == 0 {
		require.NoError(t, l.rewriteDurable()) // nothing is queued, so the committer is idle
		check(w.model, w.model.trimmedDurable())
	}
	p.before("the end")
	check(w.model)
	require.NoError(t, l.Close())
}

// ending is a way in which a daemon ends, and the files that it leaves.
type ending struct {
	how    string
	files  dirs
	reboot bool
}

// check starts after the ending, and requires what the model says of one of the moments.
func (e ending) check(t *testing.T, moments []model) {
	t.Helper()
	var may [][]string
	for _, m := range moments {
		if e.reboot {
			m = m.opened(true)
		}
		may = append(may, rendered(m.replay(false)))
	}
	l := e.files.open(t)
	require.Contains(t, may, lines(l.Sandboxes()), e.how)
	for _, damage := range l.Damage() {
		require.True(t, damage.Torn, "%s: %+v", e.how, damage)
	}
	require.NoError(t, l.Close())
}
