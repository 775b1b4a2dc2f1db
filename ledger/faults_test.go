package ledger

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// faults maps the errors of the disk to the classes of the returned errors.
var faults = map[error]func(error) bool{
	unix.ENOSPC: errdefs.IsResourceExhausted,
	unix.EDQUOT: errdefs.IsResourceExhausted,
	unix.EIO:    errdefs.IsUnavailable,
	unix.EROFS:  errdefs.IsUnavailable,
}

// From each change to the disk on, all changes fail, or all changes of that kind, in one directory
// or in both. A sandbox that is forgotten then stays forgotten, also after a restart if the log in
// the state directory could be written. Once the disk works, all operations succeed without a
// restart, and all acknowledged records are there.
func TestEveryChangeFails(t *testing.T) {
	for cause, isClass := range faults {
		for where, hit := range map[string]func(d dirs, path string) bool{
			"root directory":  func(d dirs, path string) bool { return strings.HasPrefix(path, d.root) },
			"state directory": func(d dirs, path string) bool { return strings.HasPrefix(path, d.state) },
			"both":            func(dirs, string) bool { return true },
		} {
			for _, alike := range []bool{false, true} {
				t.Run(fmt.Sprintf("%v in %s alike %v", cause, where, alike), func(t *testing.T) {
					for at := 1; ; at++ {
						w := &faultyWorld{dirs: newDirs(t), cause: cause, isClass: isClass, at: at, alike: alike}
						w.hit = func(path string) bool { return hit(w.dirs, path) }
						w.live(t)
						if !w.failed {
							require.Greater(t, at, 10)
							return
						}
					}
				})
			}
		}
	}
}

// faultyWorld is a ledger whose disk fails from the change numbered at on, from 1.
type faultyWorld struct {
	dirs    dirs
	cause   error
	isClass func(error) bool
	hit     func(path string) bool
	at      int
	alike   bool // only changes like the first that fails do

	count  int
	what   string
	failed bool
	has    map[string]bool // records, by whether they were acknowledged
}

func (w *faultyWorld) before(c change) error {
	if !w.hit(c.path) {
		return nil
	}
	w.count++
	if w.count == w.at {
		w.failed, w.what = true, c.what
	}
	if w.count < w.at || w.alike && c.what != w.what {
		return nil
	}
	return w.cause
}

func (w *faultyWorld) append(t *testing.T, l *Ledger, r *Record) {
	t.Helper()
	err := l.Append(t.Context(), r)
	w.has[strings.TrimSpace(fmt.Sprint(r.Key.ID, " ", r.Kind, " ", r.Step))] = err == nil
	if err != nil && !errdefs.IsNotFound(err) {
		require.True(t, w.isClass(err), "%v", err)
		require.ErrorIs(t, err, w.cause)
	}
}

func (w *faultyWorld) live(t *testing.T) {
	l := w.dirs.open(t)
	for _, id := range []string{"a", "b", "c"} {
		begin(t, l, key(id))
		mustAppend(t, l, &Record{Key: key(id), Kind: Intent, Step: "cni"})
	}
	require.NoError(t, l.Close())

	// The disk may fail at the start already. Without a file to append to there is no ledger: see Open.
	on := &testDisk{before: w.before}
	l = w.dirs.openOn(t, on)
	w.has = map[string]bool{"a begun": true, "a intent cni": true}
	w.append(t, l, &Record{Key: key("a"), Kind: Noted, Step: "waits", Durable: true, CanWait: true})
	w.append(t, l, &Record{Key: key("a"), Kind: Done, Step: "cni", Durable: true})
	w.append(t, l, &Record{Key: key("d"), Kind: Begun})
	require.NoError(t, l.Forget(t.Context(), key("b")))
	w.append(t, l, &Record{Key: key("a"), Kind: CleanupPending, Step: "cni"})
	rewritten(t, l)
	w.append(t, l, &Record{Key: key("a"), Kind: Undone, Step: "cni"})
	require.NoError(t, l.Forget(t.Context(), key("c")))
	w.append(t, l, &Record{Key: key("a"), Kind: Claimed})
	gone := func(l *Ledger) {
		t.Helper()
		for _, line := range lines(l.Sandboxes()) {
			require.Contains(t, []string{"a", "d"}, strings.Fields(line)[0], line)
		}
	}
	gone(l)
	l.mu.Lock()
	known := !slices.ContainsFunc(l.waiting, func(op *operation) bool { return !op.logged })
	l.mu.Unlock()
	if known {
		gone(w.dirs.image(t).open(t))
	}

	on.set(nil)
	mustAppend(t, l, &Record{Key: key("a"), Kind: Done, Step: "healed", Durable: true})
	begin(t, l, key("e"))
	require.NoError(t, l.Forget(t.Context(), key("e")))
	require.False(t, l.lacksTombstones(), "all went with the first transaction")
	w.has["a done healed"] = true
	for name, reboot := range map[string]bool{"now": false, "after a restart": false, "after a reboot": true} {
		again := l
		if name != "now" {
			d := w.dirs.image(t)
			if reboot {
				d.reboot(t, "boot-2")
				require.NoError(t, os.Remove(d.log()))
			}
			again = d.open(t)
			require.Empty(t, again.Damage(), name)
		}
		gone(again)
		for what, acknowledged := range w.has {
			durable := !strings.Contains(what, "intent") && !strings.Contains(what, "undone") && !strings.Contains(what, "claimed")
			if acknowledged && (durable || !reboot) {
				require.Contains(t, lines(again.Sandboxes()), what, name)
			}
		}
		if again != l {
			require.NoError(t, again.Close())
		}
	}
	require.NoError(t, l.Close())
}

// The ledger retries a failed tombstone by itself. Restarts in between don't lose the tombstone.
func TestTombstoneFollows(t *testing.T) {
	full := func(d dirs) func(change) error {
		return func(c change) error {
			if strings.HasPrefix(c.path, d.root) {
				return unix.ENOSPC
			}
			return nil
		}
	}
	d := newDirs(t)
	l := d.open(t)
	begin(t, l, key("a"))
	begin(t, l, key("b"))
	require.NoError(t, l.Close())
	on := &testDisk{before: full(d)}
	l = d.openOn(t, on)
	require.NoError(t, l.Forget(t.Context(), key("a")))
	for range 3 {
		require.NoError(t, l.Close())
		on = &testDisk{before: full(d)}
		l = d.openOn(t, on)
		require.Equal(t, []string{"b begun"}, lines(l.Sandboxes()))
		require.True(t, l.Forgotten(key("a")))
	}
	rebooted := d.image(t)
	rebooted.reboot(t, "boot-2")
	require.NoError(t, os.Remove(rebooted.log()))
	require.Equal(t, []string{"a begun", "b begun"}, lines(rebooted.open(t).Sandboxes()), "its undo finds nothing to undo")

	on.set(nil)
	require.Eventually(t, func() bool { return readLog(d.durable()).forgot[key("a")] > 0 }, 10*time.Second, 10*time.Millisecond)
	require.Equal(t, []string{"b begun"}, lines(l.Sandboxes()))
}

// The log in the state directory is rewritten while the durable log is about to get a tombstone,
// and then fails. One of the logs still has the tombstone.
func TestTombstoneOnItsWay(t *testing.T) {
	d, on := newDirs(t), &testDisk{}
	l := d.openOn(t, on)
	begin(t, l, key("a"))
	begin(t, l, key("b"))
	rewrites := 0
	on.set(func(c change) error {
		if c.path != d.durable() {
			return nil
		}
		if rewritten(t, l) {
			rewrites++
		}
		return unix.EIO
	})
	require.NoError(t, l.Forget(t.Context(), key("a")))
	require.Error(t, l.Append(t.Context(), &Record{Key: key("c"), Kind: Begun}))
	require.Greater(t, rewrites, 1)
	require.Equal(t, []string{"b begun"}, lines(d.image(t).open(t).Sandboxes()))
}

// While the disk is full, refused sandboxes use no memory.
func TestRefusedSandboxesCostNothing(t *testing.T) {
	d, on := newDirs(t), &testDisk{}
	l := d.openOn(t, on)
	on.set(func(c change) error {
		if strings.HasPrefix(c.path, d.root) {
			return unix.ENOSPC
		}
		return nil
	})
	for i := range 100 {
		require.Error(t, l.Append(t.Context(), &Record{Key: key(fmt.Sprint("s", i)), Kind: Begun}))
		require.NoError(t, l.Forget(t.Context(), key(fmt.Sprint("s", i))))
	}
	require.Empty(t, l.waiting)
	require.Empty(t, l.live)
}

// After a failed sync, the kernel counts the unwritten pages as clean, and a later sync succeeds
// without them. So the ledger writes everything again, to another file.
func TestFailedSyncIsNotTrusted(t *testing.T) {
	for _, what := range []string{"sync", "sync directory"} {
		t.Run(what, func(t *testing.T) {
			d, on := newDirs(t), &testDisk{}
			l := d.openOn(t, on)
			begin(t, l, key("a"))
			failed := false
			on.set(func(c change) error {
				if c.what == what && !failed {
					failed = true
					return unix.EIO
				}
				return nil
			})
			if what == "sync" {
				require.Error(t, l.Append(t.Context(), &Record{Key: key("b"), Kind: Begun}))
			} else {
				require.Error(t, l.rewriteDurable())
			}
			before := on.changes(d.durable())
			begin(t, l, key("c"))
			require.Equal(t, []string{"write", "sync", "sync directory", "write", "sync"}, on.changes(d.durable())[len(before):])
			require.Equal(t, []string{"a begun", "c begun"}, lines(d.image(t).open(t).Sandboxes()))
		})
	}
}

// The ledger opens on a root directory that can't be written, and works once it can.
func TestOpenOnAReadOnlyRootDir(t *testing.T) {
	for name, there := range map[string]bool{"with a ledger": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			d := newDirs(t)
			var want []string
			if there {
				l := d.open(t)
				begin(t, l, key("a"))
				require.NoError(t, l.Close())
				want = []string{"a begun"}
			}
			on := &testDisk{before: func(c change) error {
				if strings.HasPrefix(c.path, d.root) {
					return unix.EROFS
				}
				return nil
			}}
			l := d.openOn(t, on)
			err := l.Append(t.Context(), &Record{Key: key("b"), Kind: Begun})
			require.True(t, errdefs.IsUnavailable(err), "%v", err)
			require.ErrorContains(t, err, "remount the filesystem read-write")
			require.Equal(t, want, lines(l.Sandboxes()))
			on.set(nil)
			begin(t, l, key("c"))
			require.Equal(t, append(want, "c begun"), lines(l.Sandboxes()))
			require.Equal(t, append(want, "c begun"), lines(d.image(t).open(t).Sandboxes()))
		})
	}
}
