package journal

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

// The two-part write order: each case crashes an operation before its bbolt commit, between the commit and the log, and after both.
func TestCrashBetweenTheTwoFiles(t *testing.T) {
	ctx := context.Background()
	for name, tc := range map[string]struct {
		op                            func(*Ledger) error
		atStart, between, after       []string
		afterAndReboot                []string
		betweenDBLost, afterAndDBLost []string
	}{
		"begin": {
			op:             func(l *Ledger) error { return l.Append(ctx, &Record{Key: key("b"), Kind: Begun}) },
			atStart:        []string{"a begun", "a intent cni"},
			between:        []string{"a begun", "a intent cni", "b begun"},
			after:          []string{"a begun", "a intent cni", "b begun"},
			afterAndReboot: []string{"a begun", "b begun"},
			betweenDBLost:  []string{"a begun", "a intent cni"},
			afterAndDBLost: []string{"a begun", "a intent cni", "b begun"},
		},
		"durable record": {
			op: func(l *Ledger) error {
				return l.Append(ctx, &Record{Key: key("a"), Kind: Done, Step: "cni", Durable: true})
			},
			atStart:        []string{"a begun", "a intent cni"},
			between:        []string{"a begun", "a intent cni", "a done cni"},
			after:          []string{"a begun", "a intent cni", "a done cni"},
			afterAndReboot: []string{"a begun", "a done cni"},
			betweenDBLost:  []string{"a begun", "a intent cni"},
			afterAndDBLost: []string{"a begun", "a intent cni", "a done cni"},
		},
		"plain record": {
			op:             func(l *Ledger) error { return l.Append(ctx, &Record{Key: key("a"), Kind: Done, Step: "cni"}) },
			atStart:        []string{"a begun", "a intent cni"},
			between:        []string{"a begun", "a intent cni"},
			after:          []string{"a begun", "a intent cni", "a done cni"},
			afterAndReboot: []string{"a begun"},
			betweenDBLost:  []string{"a begun", "a intent cni"},
			afterAndDBLost: []string{"a begun", "a intent cni", "a done cni"},
		},
		"forget": {
			op:            func(l *Ledger) error { return l.Forget(ctx, key("a")) },
			atStart:       []string{"a begun", "a intent cni"},
			betweenDBLost: []string{"a begun", "a intent cni"}, // known to be gone by nobody: recovery undoes it by name once more
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
			betweenDBLost, afterAndDBLost := between.image(t), after.image(t)
			require.NoError(t, os.Remove(betweenDBLost.db()))
			require.NoError(t, os.Remove(afterAndDBLost.db()))

			require.Equal(t, tc.atStart, found(atStart, false))
			require.Equal(t, tc.between, found(between, false))
			require.Equal(t, tc.after, found(after, false))
			require.Equal(t, tc.afterAndReboot, found(reboot, false))
			require.Equal(t, tc.betweenDBLost, found(betweenDBLost, true))
			require.Equal(t, tc.afterAndDBLost, found(afterAndDBLost, len(tc.afterAndDBLost) > 0))
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
	f, m, err := findDurable(between.db(), os.O_RDWR, unix.LOCK_EX, 0)
	require.NoError(t, err)
	db, err := attachDurable(f, len(m.records))
	require.NoError(t, err)
	r := &Record{Seq: 100, Key: key("a"), Kind: Begun, Durable: true}
	frame, err := entry{Record: r}.frame()
	require.NoError(t, err)
	s := newStored(r, frame)
	require.NoError(t, db.commit(*m.header, []*operation{{key: r.Key, put: &s, frame: frame}}))
	require.NoError(t, db.close())

	l = between.open(t)
	require.Empty(t, l.Damage())
	require.Equal(t, []string{"a begun"}, lines(l.Sandboxes()))
	require.Equal(t, uint64(100), l.Sandboxes()[0].Records[0].Seq)
}

// What ledger.db has not taken must not be in the log: the log would be believed when ledger.db is lost.
func TestFailedCommitLeavesTheLogAlone(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	begin(t, l, key("a"))
	before, err := os.ReadFile(d.log())
	require.NoError(t, err)
	require.NoError(t, l.durable.db.Close())

	err = l.Append(context.Background(), &Record{Key: key("b"), Kind: Begun})
	require.Error(t, err)
	err = l.Append(context.Background(), &Record{Key: key("b"), Kind: Begun})
	require.True(t, errdefs.IsUnavailable(err), "it stays broken: %v", err)
	after, err := os.ReadFile(d.log())
	require.NoError(t, err)
	require.Equal(t, before, after)
	require.Equal(t, []string{"a begun"}, lines(l.Sandboxes()))
	mustAppend(t, l, &Record{Key: key("a"), Kind: Noted}) // stopping pods needs only the log
	_ = l.Close()
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

			// Half of it is longer than what comes after.
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
			require.Empty(t, l.Damage(), "a log that went with the boot is no damage")
			fresh := &Record{Key: key("a"), Kind: Undone, Step: "cni"}
			mustAppend(t, l, fresh)
			require.GreaterOrEqual(t, fresh.Seq, l.BootSeq())
			require.NoError(t, l.Close())

			// Killed while it recovered: each record still says from which boot it is.
			l = d.open(t)
			require.False(t, l.BootChanged())
			require.Less(t, old.Seq, l.BootSeq())
			require.GreaterOrEqual(t, fresh.Seq, l.BootSeq())
		})
	}

	t.Run("ledger.db damaged", func(t *testing.T) {
		d := d.image(t)
		require.NoError(t, os.Truncate(d.db(), 100))
		l := d.open(t)
		require.False(t, l.BootChanged(), "the log knows")
	})
	t.Run("all damaged", func(t *testing.T) {
		d := d.image(t)
		require.NoError(t, os.Truncate(d.db(), 100))
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
		_, err := open(d.root, d.state, d.bootID+"-missing")
		require.ErrorIs(t, err, os.ErrNotExist)
	})
}

// The crash came between the commit of a Forget and its tombstone: the log knows more of the sandbox than a whole ledger.db.
func TestForgottenWithoutATombstone(t *testing.T) {
	k := Key{Namespace: "k8s.io", ID: "s1"}
	log, db := newImage("log"), newImage("db")
	log.records = []keyed{{key: k, stored: stored{seq: 3, durable: true}}}
	db.complete = true
	require.Contains(t, forgotten(db, log), k)
	db.complete = false
	require.NotContains(t, forgotten(db, log), k, "ledger.db may have lost it")
	db.complete, db.records = true, log.records
	require.NotContains(t, forgotten(db, log), k, "it is there")
}
