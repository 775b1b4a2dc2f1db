package ledger

import (
	"context"
	"errors"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// spyFile stands in for the log's file.
type spyFile struct {
	logFile
	beforeWrite func() // as the disk is when the log is about to be written
	fail        error  // writes end with it, after half of the bytes
	failCut     error  // Truncate ends with it
	failRead    error  // ReadAt ends with it
}

func (f *spyFile) ReadAt(b []byte, at int64) (int, error) {
	if f.failRead != nil {
		return 0, f.failRead
	}
	return f.logFile.ReadAt(b, at)
}

func (f *spyFile) WriteAt(b []byte, at int64) (int, error) {
	if f.beforeWrite != nil {
		f.beforeWrite()
	}
	if f.fail != nil {
		n, err := f.logFile.WriteAt(b[:len(b)/2], at)
		return n, errors.Join(f.fail, err)
	}
	return f.logFile.WriteAt(b, at)
}

func (f *spyFile) Truncate(size int64) error {
	if f.failCut != nil {
		return f.failCut
	}
	return f.logFile.Truncate(size)
}

func (l *Ledger) spy() *spyFile {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := &spyFile{logFile: l.log.f}
	l.log.f = s
	return s
}

// The two-part write order: each case crashes an operation before either log has it, between the two, and after both.
func TestCrashBetweenTheTwoFiles(t *testing.T) {
	ctx := context.Background()
	for name, tc := range map[string]struct {
		op                                      func(*Ledger) error
		atStart, between, after                 []string
		afterAndReboot                          []string
		betweenDurableLost, afterAndDurableLost []string
	}{
		"begin": {
			op:                  func(l *Ledger) error { return l.Append(ctx, &Record{Key: key("b"), Kind: Begun}) },
			atStart:             []string{"a begun", "a intent cni"},
			between:             []string{"a begun", "a intent cni", "b begun"},
			after:               []string{"a begun", "a intent cni", "b begun"},
			afterAndReboot:      []string{"a begun", "b begun"},
			betweenDurableLost:  []string{"a begun", "a intent cni"},
			afterAndDurableLost: []string{"a begun", "a intent cni", "b begun"},
		},
		"durable record": {
			op: func(l *Ledger) error {
				return l.Append(ctx, &Record{Key: key("a"), Kind: Done, Step: "cni", Durable: true})
			},
			atStart:             []string{"a begun", "a intent cni"},
			between:             []string{"a begun", "a intent cni", "a done cni"},
			after:               []string{"a begun", "a intent cni", "a done cni"},
			afterAndReboot:      []string{"a begun", "a done cni"},
			betweenDurableLost:  []string{"a begun", "a intent cni"},
			afterAndDurableLost: []string{"a begun", "a intent cni", "a done cni"},
		},
		"plain record": {
			op:                  func(l *Ledger) error { return l.Append(ctx, &Record{Key: key("a"), Kind: Done, Step: "cni"}) },
			atStart:             []string{"a begun", "a intent cni"},
			between:             []string{"a begun", "a intent cni"},
			after:               []string{"a begun", "a intent cni", "a done cni"},
			afterAndReboot:      []string{"a begun"},
			betweenDurableLost:  []string{"a begun", "a intent cni"},
			afterAndDurableLost: []string{"a begun", "a intent cni", "a done cni"},
		},
		"forget": {
			op:                 func(l *Ledger) error { return l.Forget(ctx, key("a")) },
			atStart:            []string{"a begun", "a intent cni"},
			betweenDurableLost: []string{"a begun", "a intent cni"}, // nothing says that it is gone: recovery undoes it by name once more
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDirs(t)
			l := d.open(t)
			begin(t, l, key("a"))
			mustAppend(t, l, &Record{Key: key("a"), Kind: Intent, Step: "cni"})
			atStart := d.image(t)
			var between dirs
			l.spy().beforeWrite = func() { between = d.image(t) }
			require.NoError(t, tc.op(l))
			after := d.image(t)

			found := func(crashed dirs, damaged bool) []string {
				l := crashed.open(t)
				require.Equal(t, damaged, len(l.Damage()) > 0, "%+v", l.Damage())
				first := lines(l.Sandboxes())
				require.NoError(t, l.Close())
				again := crashed.open(t)
				require.Equal(t, first, lines(again.Sandboxes()), "a second recovery finds the same")
				require.Empty(t, again.Damage())
				require.NoError(t, again.Close())
				return first
			}
			reboot := after.image(t)
			require.NoError(t, os.Remove(reboot.log()))
			reboot.reboot(t, "boot-2")
			betweenDurableLost, afterAndDurableLost := between.image(t), after.image(t)
			require.NoError(t, os.Remove(betweenDurableLost.durable()))
			require.NoError(t, os.Remove(afterAndDurableLost.durable()))

			require.Equal(t, tc.atStart, found(atStart, false))
			require.Equal(t, tc.between, found(between, false))
			require.Equal(t, tc.after, found(after, false))
			require.Equal(t, tc.afterAndReboot, found(reboot, false))
			require.Equal(t, tc.betweenDurableLost, found(betweenDurableLost, true))
			require.Equal(t, tc.afterAndDurableLost, found(afterAndDurableLost, len(tc.afterAndDurableLost) > 0))
		})
	}
}

// The tombstone is lost in a crash and the id begins a new life: the old one's log records are not part of it.
func TestReusedIDAfterLostTombstone(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	begin(t, l, key("a"))
	mustAppend(t, l, &Record{Key: key("a"), Kind: Intent, Step: "of the first life"})
	var between dirs
	l.spy().beforeWrite = func() { between = d.image(t) }
	require.NoError(t, l.Forget(context.Background(), key("a")))

	// The node can't rewrite its log at the restart, so the old records stay there.
	frame, err := entry{Record: &Record{Seq: 100, Key: key("a"), Kind: Begun, Durable: true}}.frame()
	require.NoError(t, err)
	content, err := os.ReadFile(between.durable())
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(between.durable(), append(content, frame...), 0o600))

	l = between.open(t)
	require.Empty(t, l.Damage())
	require.Equal(t, []string{"a begun"}, lines(l.Sandboxes()))
	require.Equal(t, uint64(100), l.Sandboxes()[0].Records[0].Seq)
}

// If the commit to the durable log fails, the other log must not have the record: replay trusts
// that log if the durable one is lost.
func TestFailedCommitLeavesTheLogAlone(t *testing.T) {
	d, on := newDirs(t), &testDisk{}
	l := d.openOn(t, on)
	begin(t, l, key("a"))
	before, err := os.ReadFile(d.log())
	require.NoError(t, err)
	on.set(func(c change) error {
		if c.what == "sync" {
			return unix.EIO
		}
		return nil
	})
	for range 2 {
		err = l.Append(context.Background(), &Record{Key: key("b"), Kind: Begun})
		require.True(t, errdefs.IsUnavailable(err), "%v", err)
		require.ErrorContains(t, err, "check the disk")
	}
	after, err := os.ReadFile(d.log())
	require.NoError(t, err)
	require.Equal(t, before, after)
	require.Equal(t, []string{"a begun"}, lines(l.Sandboxes()))
	mustAppend(t, l, &Record{Key: key("a"), Kind: Noted}) // needs only the log in the state directory
}

func TestFailedLogWrite(t *testing.T) {
	for name, failCut := range map[string]error{"cut back at once": nil, "cut back later": unix.EIO} {
		t.Run(name, func(t *testing.T) {
			ctx := context.Background()
			d := newDirs(t)
			l := d.open(t)
			begin(t, l, key("a"))
			spy := l.spy()
			spy.fail, spy.failCut = unix.ENOSPC, failCut

			// Half of the frame is longer than the next one.
			err := l.Append(ctx, &Record{Key: key("a"), Kind: Intent, Step: "lost", Data: &Data{Value: make([]byte, 4096)}})
			require.True(t, errdefs.IsResourceExhausted(err), "%v", err)
			err = l.Append(ctx, &Record{Key: key("b"), Kind: Begun})
			require.Error(t, err)
			if failCut == nil {
				require.True(t, errdefs.IsResourceExhausted(err), "%v", err)
			}

			spy.fail, spy.failCut = nil, nil
			mustAppend(t, l, &Record{Key: key("a"), Kind: Intent, Step: "kept"})
			want := []string{"a begun", "a intent kept", "b begun"} // b was committed before the log failed
			require.Equal(t, want, lines(l.Sandboxes()))
			again := d.image(t).open(t)
			require.Empty(t, again.Damage())
			require.Equal(t, want, lines(again.Sandboxes()))
		})
	}
}

func TestBoot(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	require.False(t, l.BootChanged(), "first use")
	old := &Record{Key: key("a"), Kind: Begun}
	mustAppend(t, l, old)
	require.GreaterOrEqual(t, old.Seq, l.BootSeq())
	require.NoError(t, l.Close())

	l = d.open(t)
	require.False(t, l.BootChanged())
	require.GreaterOrEqual(t, old.Seq, l.BootSeq())
	require.NoError(t, l.Close())

	for name, loseLog := range map[string]bool{"state dir on tmpfs": true, "state dir on disk": false} {
		t.Run(name, func(t *testing.T) {
			d := d.image(t)
			if loseLog {
				require.NoError(t, os.RemoveAll(d.state))
			}
			d.reboot(t, "boot-2")
			l := d.open(t)
			require.True(t, l.BootChanged())
			require.Less(t, old.Seq, l.BootSeq())
			require.Empty(t, l.Damage(), "a reboot empties the tmpfs, which is not damage")
			fresh := &Record{Key: key("a"), Kind: Undone, Step: "cni"}
			mustAppend(t, l, fresh)
			require.GreaterOrEqual(t, fresh.Seq, l.BootSeq())
			require.NoError(t, l.Close())

			// A kill during recovery: each record still shows its boot.
			l = d.open(t)
			require.False(t, l.BootChanged())
			require.Less(t, old.Seq, l.BootSeq())
			require.GreaterOrEqual(t, fresh.Seq, l.BootSeq())
		})
	}

	t.Run("durable log damaged", func(t *testing.T) {
		d := d.image(t)
		require.NoError(t, os.Truncate(d.durable(), 50))
		l := d.open(t)
		require.False(t, l.BootChanged(), "the log knows")
	})
	t.Run("all damaged", func(t *testing.T) {
		d := d.image(t)
		require.NoError(t, os.Truncate(d.durable(), 50))
		require.NoError(t, os.Remove(d.log()))
		l := d.open(t)
		require.True(t, l.BootChanged(), "can't be told, so the careful answer")
		require.Less(t, old.Seq, l.BootSeq())
	})
	t.Run("log lost", func(t *testing.T) {
		d := d.image(t)
		require.NoError(t, os.Remove(d.log()))
		l := d.open(t)
		require.False(t, l.BootChanged())
		require.Len(t, l.Damage(), 1)
		require.Equal(t, d.log(), l.Damage()[0].File)
		require.Equal(t, []string{"a begun"}, lines(l.Sandboxes()))
	})
	t.Run("no boot id", func(t *testing.T) {
		_, err := open(osDisk{}, d.root, d.state, d.bootID+"-missing")
		require.ErrorIs(t, err, os.ErrNotExist)
	})
}

// A sandbox was forgotten. The other log had no room for the tombstone, and the durable log's
// rewrite has dropped it. The sandbox stays forgotten, because the durable log is newer.
func TestForgottenWithoutATombstone(t *testing.T) {
	k := key("s1")
	log := newImage("log")
	log.records = []keyed{{key: k, stored: stored{seq: 3, durable: true}}}
	whole := func() *image {
		m := newImage("durable")
		m.found, m.complete, m.base = true, true, base{lastSeq: 3}
		return m
	}
	forgot := func(durable *image) bool {
		r := replay(durable, log, "boot-1")
		require.NotEqual(t, len(r.live), len(r.forgot))
		return r.forgot[k] == 3
	}
	require.True(t, forgot(whole()))

	for name, change := range map[string]func(*image){
		"it was begun since":           func(m *image) { m.base.lastSeq = 2 },
		"the durable log has lost it":  func(m *image) { m.base.missing = 1 },
		"the durable log has it":       func(m *image) { m.records = log.records },
		"the durable log isn't there":  func(m *image) { *m = *newImage("durable") },
		"its tombstone is of the past": func(m *image) { m.base.lastSeq = 2; m.forgot[k] = 2 },
	} {
		m := whole()
		change(m)
		require.False(t, forgot(m), name)
	}
	m := whole()
	m.base.lastSeq, m.forgot[k] = 2, 3
	require.True(t, forgot(m), "the durable log's tombstone says so")
}
