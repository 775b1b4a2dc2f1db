package ledger

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// smallLedger makes a closed ledger with a number of sandboxes, of which it forgets every third. It
// returns the rest.
func smallLedger(t testing.TB, d dirs, sandboxes int) []Sandbox {
	l := d.open(t)
	for i := range sandboxes {
		k := key(fmt.Sprint("s", i))
		mustAppend(t, l, &Record{Key: k, Kind: Begun, Data: &Data{TypeURL: "spec", Value: make([]byte, 90)}})
		mustAppend(t, l, &Record{Key: k, Kind: Done, Step: "cni"})
		if i%3 == 0 {
			require.NoError(t, l.Forget(context.Background(), k))
		}
	}
	held := l.Sandboxes()
	require.NoError(t, l.Close())
	return held
}

// Nothing is lost with the durable log while the other one is there, wherever it is cut or altered.
func TestDamagedDurableLogIsMadeAgain(t *testing.T) {
	d := newDirs(t)
	want := smallLedger(t, d, 20)
	good, err := os.ReadFile(d.durable())
	require.NoError(t, err)
	log, err := os.ReadFile(d.log())
	require.NoError(t, err)

	check := func(damaged []byte, what string) {
		require.NoError(t, os.WriteFile(d.durable(), damaged, 0o600))
		require.NoError(t, os.WriteFile(d.log(), log, 0o600))
		l := d.open(t)
		require.Equal(t, want, l.Sandboxes(), what)
		if slices.ContainsFunc(l.Damage(), func(d Damage) bool { return !d.Torn }) {
			aside, err := os.ReadFile(kept(t, l, d.durable()))
			require.NoError(t, err)
			require.Equal(t, damaged, aside, what)
		}
		begin(t, l, key("next"))
		require.NoError(t, l.Forget(context.Background(), key("next")))
		require.NoError(t, l.Close())

		l = d.open(t)
		require.Equal(t, want, l.Sandboxes(), what)
		require.Empty(t, l.Damage(), what)
		require.NoError(t, l.Close())
	}
	for size := 0; size < len(good); size += 61 {
		check(good[:size], fmt.Sprintf("cut at %d", size))
	}
	for at := 0; at < len(good); at += 19 {
		flipped := bytes.Clone(good)
		flipped[at] ^= 1 << (at % 8)
		check(flipped, fmt.Sprintf("flipped at %d", at))
	}
	check([]byte("this is not a log"), "text")
	check(make([]byte, 64<<10), "zeros")
}

// The durable log is truncated at any offset. A sandbox that it lacks was not forgotten, unless a
// tombstone says so.
func TestCutDurableLogForgetsNothing(t *testing.T) {
	for _, compacted := range []bool{false, true} {
		d := newDirs(t)
		l := d.open(t)
		for _, id := range []string{"a", "b", "c", "d"} {
			begin(t, l, key(id))
		}
		require.NoError(t, l.Forget(t.Context(), key("b")))
		if compacted {
			require.NoError(t, l.rewriteDurable())
		}
		want := l.Sandboxes()
		require.NoError(t, l.Close())
		content, err := os.ReadFile(d.durable())
		require.NoError(t, err)
		for size := range len(content) {
			cut := d.image(t)
			require.NoError(t, os.Truncate(cut.durable(), int64(size)))
			again := cut.open(t)
			require.Equal(t, want, again.Sandboxes(), "cut at %d of %d", size, len(content))
			require.False(t, again.Forgotten(key("c")))
			require.NoError(t, again.Close())
		}
	}
}

// A power cut leaves an append half-way: the file may have its size already, and zeros where the bytes should be.
func TestTornDurableLog(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	begin(t, l, key("a"))
	size := l.durable.size
	begin(t, l, key("b"))
	require.NoError(t, l.Close())
	content, err := os.ReadFile(d.durable())
	require.NoError(t, err)
	zeros := func(from int) []byte { return append(bytes.Clone(content[:from]), make([]byte, len(content)-from)...) }
	for name, torn := range map[string][]byte{
		"cut": content[:len(content)-3], "cut in its head": content[:size+5],
		"zeros at its end": zeros(len(content) - 20), "zeros in its head": zeros(int(size) + 6), "zeros": zeros(int(size)), "more zeros": append(zeros(int(size)), make([]byte, 5000)...),
	} {
		t.Run(name, func(t *testing.T) {
			d := newDirs(t)
			d.reboot(t, "boot-2")
			require.NoError(t, os.Mkdir(d.root, 0o700))
			require.NoError(t, os.WriteFile(d.durable(), torn, 0o600))
			l := d.open(t)
			require.Len(t, l.Damage(), 1)
			require.True(t, l.Damage()[0].Torn)
			require.Equal(t, []string{"a begun"}, lines(l.Sandboxes()))
			aside, err := l.Aside()
			require.NoError(t, err)
			require.Empty(t, aside, "a torn end is not kept aside")
			begin(t, l, key("c"))
			require.NoError(t, l.Close())
			again := d.open(t)
			require.Empty(t, again.Damage())
			require.Equal(t, []string{"a begun", "c begun"}, lines(again.Sandboxes()))
		})
	}
}

// The node can't rewrite a torn log at the start: it is cut before anything is appended.
func TestTornDurableLogIsReused(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	begin(t, l, key("a"))
	begin(t, l, key("b"))
	require.NoError(t, l.Close())
	require.NoError(t, os.Truncate(d.durable(), l.durable.size-3))
	require.NoError(t, os.Remove(d.log()))
	d.reboot(t, "boot-2")
	l = d.openOn(t, &testDisk{before: func(c change) error {
		if c.what == "create" && filepath.Dir(c.path) == d.root {
			return unix.ENOSPC
		}
		return nil
	}})
	require.True(t, l.BootChanged())
	begin(t, l, key("c"))
	require.NoError(t, l.Close())
	require.NoError(t, os.Remove(d.log()))
	l = d.open(t)
	require.False(t, l.BootChanged(), "the durable log has the header of this boot")
	for _, damage := range l.Damage() {
		require.NotEqual(t, d.durable(), damage.File, "%+v", damage)
	}
	require.Equal(t, []string{"a begun", "c begun"}, lines(l.Sandboxes()))
}

func TestNewerDurableFormat(t *testing.T) {
	d := newDirs(t)
	want := smallLedger(t, d, 20)
	frame, err := entry{Header: &header{Format: format + 1}}.frame()
	require.NoError(t, err)
	content, err := os.ReadFile(d.durable())
	require.NoError(t, err)
	newer := append(content, frame...)
	require.NoError(t, os.WriteFile(d.durable(), newer, 0o600))

	l := d.open(t)
	require.Len(t, l.Damage(), 1)
	require.Contains(t, l.Damage()[0].Reason, "newer podfsm")
	aside, err := os.ReadFile(l.Damage()[0].Kept)
	require.NoError(t, err)
	require.Equal(t, newer, aside)
	require.Equal(t, want, l.Sandboxes(), "from the other log")
}

func TestBothLost(t *testing.T) {
	d := newDirs(t)
	smallLedger(t, d, 20)
	require.NoError(t, os.WriteFile(d.durable(), []byte("x"), 0o600))
	require.NoError(t, os.WriteFile(d.log(), []byte("x"), 0o600))
	l := d.open(t)
	require.Empty(t, l.Sandboxes())
	require.NotEmpty(t, kept(t, l, d.durable()))
	require.NotEmpty(t, kept(t, l, d.log()))
	begin(t, l, key("next"))
	require.NoError(t, l.Close())
	require.Equal(t, []string{"next begun"}, lines(d.open(t).Sandboxes()))
}

// The durable log is truncated while the daemon runs. The log in the state directory has all
// records, and the next start reports the damage.
func TestDurableLogCutWhileOpen(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	begin(t, l, key("a"))
	begin(t, l, key("b"))
	require.NoError(t, os.Truncate(d.durable(), 0))
	begin(t, l, key("c"))
	require.NoError(t, l.Close())
	l = d.open(t)
	require.NotEmpty(t, l.Damage())
	require.Equal(t, []string{"a begun", "b begun", "c begun"}, lines(l.Sandboxes()))
}

func TestLockedByAnother(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	_, err := lockDir(d.root, 3*lockPoll)
	require.True(t, errdefs.IsUnavailable(err), "%v", err)
	require.ErrorContains(t, err, d.root)

	// Open waits for the lock of the other ledger.
	var wg sync.WaitGroup
	wg.Go(func() {
		lock, err := lockDir(d.root, time.Minute)
		require.NoError(t, err)
		require.NoError(t, lock.Close())
	})
	require.NoError(t, l.Close())
	wg.Wait()
}

func TestFailedOpenLeavesNothingLocked(t *testing.T) {
	d := newDirs(t)
	want := smallLedger(t, d, 20)
	require.NoError(t, os.Rename(d.state, d.state+".moved"))
	require.NoError(t, os.WriteFile(d.state, nil, 0o600))
	_, err := open(osDisk{}, d.root, d.state, d.bootID)
	require.Error(t, err)
	require.NoError(t, os.Remove(d.state))
	require.NoError(t, os.Rename(d.state+".moved", d.state))
	require.Equal(t, want, d.open(t).Sandboxes())
}

// A directory in the place of a log is reported as damage until it is removed.
func TestDirectoryInPlaceOfALog(t *testing.T) {
	for _, path := range []func(dirs) string{dirs.durable, dirs.log} {
		d := newDirs(t)
		want := smallLedger(t, d, 20)
		require.NoError(t, os.Remove(path(d)))
		require.NoError(t, os.MkdirAll(path(d), 0o700))
		l := d.open(t)
		require.NotEmpty(t, l.Damage())
		require.Len(t, l.Sandboxes(), len(want))
		require.Error(t, l.Append(t.Context(), &Record{Key: key("next"), Kind: Begun}))
		require.NoError(t, l.Forget(t.Context(), key("next")), "the log that could be written to may have it")
		require.NoError(t, l.Forget(t.Context(), want[0].Key))
		require.NoError(t, os.Remove(path(d)))
		begin(t, l, key("new"))
		require.NoError(t, l.Close())
		again := d.open(t)
		require.Empty(t, again.Damage())
		require.Len(t, again.Sandboxes(), len(want))
	}
}
