package journal

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// smallLedger makes a closed ledger by beginning that many sandboxes and forgetting every third, and returns what it holds.
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

// tmpfsDirs is for tests that open a ledger thousands of times: an fsync there costs nothing.
func tmpfsDirs(t *testing.T) dirs {
	d := newDirs(t)
	tinyTmpfs(t, d.root, "8m")
	return d
}

func TestDamagedDBIsMadeAgainFromTheLog(t *testing.T) {
	d := tmpfsDirs(t)
	want := smallLedger(t, d, 20)
	good, err := os.ReadFile(d.db())
	require.NoError(t, err)
	log, err := os.ReadFile(d.log())
	require.NoError(t, err)

	check := func(damaged []byte, what string) {
		require.NoError(t, os.WriteFile(d.db(), damaged, 0o600))
		require.NoError(t, os.WriteFile(d.log(), log, 0o600))
		l := d.open(t)
		require.Equal(t, want, l.Sandboxes(), what)
		if len(l.Damage()) > 0 {
			aside, err := os.ReadFile(kept(t, l, d.db()))
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
	for size := 0; size < len(good); size += 1021 {
		check(good[:size], fmt.Sprintf("cut at %d", size))
	}
	for at := 0; at < len(good); at += 191 {
		flipped := bytes.Clone(good)
		flipped[at] ^= 1 << (at % 8)
		check(flipped, fmt.Sprintf("flipped at %d", at))
	}
	check([]byte("this is not a database"), "text")
	check(make([]byte, 64<<10), "zeros")
}

// With the log gone (a reboot) what can be read of a damaged ledger.db is all there is: it must be right, and the rest reported.
func TestFlippedDBAlone(t *testing.T) {
	d := newDirs(t)
	smallLedger(t, d, 9)
	good, err := os.ReadFile(d.db())
	require.NoError(t, err)
	read := func(content []byte) *image {
		m := newImage(d.db())
		readDurable(m, bytes.NewReader(content), int64(len(content)))
		return m
	}
	whole := read(good)
	require.True(t, whole.complete)
	want := map[uint64][]byte{}
	for _, s := range whole.records {
		want[s.seq] = s.frame
	}

	salvaged, withKey := 0, 0
	for at := 0; at < len(good); at += flipStep {
		good[at] ^= 1 << (at % 8)
		m := read(good)
		good[at] ^= 1 << (at % 8)
		if m.complete && len(m.records) != len(want) {
			t.Fatalf("flip at %d was not noticed", at)
		}
		for _, s := range m.records {
			if w, ok := want[s.seq]; ok && !bytes.Equal(w, s.frame) || m.complete && !ok {
				t.Fatalf("flip at %d changed record %d", at, s.seq)
			}
		}
		if len(m.records) == len(want)-1 {
			salvaged++
		}
		for _, damage := range m.damage {
			if damage.Key != (Key{}) {
				withKey++
			}
		}
	}
	require.NotZero(t, salvaged)
	require.NotZero(t, withKey)
}

func TestNewerDBFormat(t *testing.T) {
	d := newDirs(t)
	want := smallLedger(t, d, 20)
	db, err := bbolt.Open(d.db(), 0o600, nil)
	require.NoError(t, err)
	frame, err := entry{Header: &header{Format: format + 1}}.frame()
	require.NoError(t, err)
	require.NoError(t, db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketName).Put(headerKey, frame) }))
	require.NoError(t, db.Close())

	l := d.open(t)
	require.Len(t, l.Damage(), 1)
	require.Contains(t, l.Damage()[0].Reason, "newer podfsm")
	require.FileExists(t, l.Damage()[0].Kept)
	require.Equal(t, want, l.Sandboxes(), "from the log")
}

func TestBothLost(t *testing.T) {
	d := newDirs(t)
	smallLedger(t, d, 20)
	require.NoError(t, os.WriteFile(d.db(), []byte("x"), 0o600))
	require.NoError(t, os.WriteFile(d.log(), []byte("x"), 0o600))
	l := d.open(t)
	require.Empty(t, l.Sandboxes())
	require.NotEmpty(t, kept(t, l, d.db()))
	require.NotEmpty(t, kept(t, l, d.log()))
	begin(t, l, key("next"))
	require.NoError(t, l.Close())
	require.Equal(t, []string{"next begun"}, lines(d.open(t).Sandboxes()))
}

// Somebody cuts ledger.db under the running daemon: bbolt's memory map faults. The daemon must live on.
func TestDBCutWhileOpen(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	for i := range 100 { // more than the pages that bbolt has in memory
		begin(t, l, key(fmt.Sprint("s", i)))
	}
	require.NoError(t, os.Truncate(d.db(), 0))
	var err error
	for i := 0; err == nil && i < 10; i++ {
		err = l.Append(context.Background(), &Record{Key: key(fmt.Sprint("next", i)), Kind: Begun})
	}
	require.Error(t, err)
	err = l.Append(context.Background(), &Record{Key: key("next"), Kind: Begun})
	require.True(t, errdefs.IsUnavailable(err), "%v", err)
	require.ErrorContains(t, err, "restart")
	mustAppend(t, l, &Record{Key: key("s0"), Kind: Noted})
	require.NoError(t, l.Close())

	l = d.open(t)
	require.NotEmpty(t, l.Damage())
	require.GreaterOrEqual(t, len(l.Sandboxes()), 100)
	begin(t, l, key("works-again"))
}

func TestLockedByAnother(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	_, _, err := findDurable(d.db(), os.O_RDWR, unix.LOCK_EX, 3*lockPoll)
	require.True(t, errdefs.IsUnavailable(err), "%v", err)
	require.ErrorContains(t, err, d.db())

	// It waits for the other one to go.
	var wg sync.WaitGroup
	wg.Go(func() {
		f, m, err := findDurable(d.db(), os.O_RDWR, unix.LOCK_EX, time.Minute)
		require.NoError(t, err)
		require.True(t, m.complete)
		require.NoError(t, f.Close())
	})
	require.NoError(t, l.Close())
	wg.Wait()
}

func TestReplacedFileIsNotTaken(t *testing.T) {
	d := newDirs(t)
	smallLedger(t, d, 20)
	f, err := os.Open(d.db())
	require.NoError(t, err)
	defer f.Close()
	require.True(t, isAt(f, d.db()))
	require.NoError(t, os.Rename(d.db(), d.db()+".old"))
	require.False(t, isAt(f, d.db()))
	require.NoError(t, os.WriteFile(d.db(), nil, 0o600))
	require.False(t, isAt(f, d.db()))
}

func TestFailedOpenLeavesNothingLocked(t *testing.T) {
	d := newDirs(t)
	want := smallLedger(t, d, 20)
	require.NoError(t, os.Rename(d.state, d.state+".moved"))
	require.NoError(t, os.WriteFile(d.state, nil, 0o600))
	_, err := open(d.root, d.state, d.bootID)
	require.Error(t, err)
	require.NoError(t, os.Remove(d.state))

	require.NoError(t, os.MkdirAll(d.log(), 0o700)) // a directory where the log should be
	_, err = open(d.root, d.state, d.bootID)
	require.Error(t, err)
	require.NoError(t, os.RemoveAll(d.state))
	require.NoError(t, os.Rename(d.state+".moved", d.state))
	require.Equal(t, want, d.open(t).Sandboxes())
}
