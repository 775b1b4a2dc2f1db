package ledger

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// rewritten makes the log outgrow its limit, and says whether that rewrote it.
func rewritten(t *testing.T, l *Ledger) bool {
	var before, after unix.Stat_t
	require.NoError(t, unix.Stat(l.log.path, &before))
	l.mu.Lock()
	l.log.limit = 0
	l.trimLog()
	l.mu.Unlock()
	require.NoError(t, unix.Stat(l.log.path, &after))
	return before.Ino != after.Ino
}

// fromLogAlone returns what a restart finds without the durable log.
func fromLogAlone(t *testing.T, d dirs) []string {
	lost := d.image(t)
	require.NoError(t, os.Remove(lost.durable()))
	return lines(lost.open(t).Sandboxes())
}

func heapInUse() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func TestRecordsAreNotKeptInMemory(t *testing.T) {
	const records, size = 200, 32 << 10
	d := newDirs(t)
	l := d.open(t)
	begin(t, l, key("a"))
	before := heapInUse()
	little := func(when string, want int) {
		t.Helper()
		require.Less(t, heapInUse()-before, int64(records*size/10), "%s: the log has %d bytes", when, l.log.size)
		require.Len(t, lines(l.Sandboxes()), want)
	}
	for i := range records {
		mustAppend(t, l, &Record{Key: key("a"), Kind: Noted, Step: fmt.Sprint(i), Durable: i%10 == 0, Data: &Data{Value: make([]byte, size)}})
	}
	little("appended", records+1)
	require.True(t, rewritten(t, l))
	little("rewritten", records+1)
	mustAppend(t, l, &Record{Key: key("a"), Kind: Intent, Durable: true, CanWait: true})
	require.NoError(t, l.Close())
	l = d.open(t)
	require.Empty(t, l.waiting)
	little("opened", records+2)
	require.NoError(t, l.Close())
	d.reboot(t, "boot-2")
	require.NoError(t, os.Remove(d.log()))
	l = d.open(t)
	require.Less(t, heapInUse()-before, int64(records*size/100), "opened without a log")
	require.Len(t, lines(l.Sandboxes()), records/10+2)
}

// Records that wait for the durable log reach it even if the other log is damaged since.
func TestWhatWaitsIsInMemory(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	begin(t, l, key("a"))
	mustAppend(t, l, &Record{Key: key("a"), Kind: Intent, Step: "cni", Data: stepData, Durable: true, CanWait: true})
	want := l.Sandboxes()
	require.True(t, rewritten(t, l))
	require.NoError(t, os.Truncate(d.log(), 0))
	mustAppend(t, l, &Record{Key: key("a"), Kind: Done, Step: "cni", Durable: true})

	rebooted := d.image(t)
	rebooted.reboot(t, "boot-2")
	require.NoError(t, os.Remove(rebooted.log()))
	again := rebooted.open(t)
	require.Empty(t, again.Damage())
	require.Equal(t, []string{"a begun", "a intent cni", "a done cni"}, lines(again.Sandboxes()))
	require.Equal(t, want[0].Records, again.Sandboxes()[0].Records[:2])
}

// The durable log is rewritten from the other log, or from itself if the other log is damaged.
func TestRewriteOfTheDurableLog(t *testing.T) {
	for name, damage := range map[string]func(d dirs) error{
		"both whole":        func(dirs) error { return nil },
		"the other one cut": func(d dirs) error { return os.Truncate(d.log(), 0) },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDirs(t)
			l := d.open(t)
			for _, id := range []string{"a", "b"} {
				begin(t, l, key(id))
				mustAppend(t, l, &Record{Key: key(id), Kind: Intent, Step: "cni"})
				mustAppend(t, l, &Record{Key: key(id), Kind: CleanupPending, Step: "cni"})
			}
			require.NoError(t, l.Forget(t.Context(), key("b")))
			mustAppend(t, l, &Record{Key: key("a"), Kind: Noted, Step: "cni", Durable: true, CanWait: true})
			require.Len(t, l.waiting, 1)
			require.NoError(t, damage(d))
			require.NoError(t, l.rewriteDurable())
			require.Empty(t, l.waiting)
			after := readLog(d.durable())
			require.True(t, after.complete, "%+v", after.damage)
			require.Len(t, after.records, 3)
			require.Empty(t, after.forgot)
		})
	}
}

func TestRewriteFromTheLog(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	for _, id := range []string{"a", "b", "c"} {
		begin(t, l, key(id))
		mustAppend(t, l, &Record{Key: key(id), Kind: Intent, Step: "cni"})
		mustAppend(t, l, &Record{Key: key(id), Kind: Done, Step: "cni", Durable: true})
	}
	require.NoError(t, l.Forget(context.Background(), key("b")))
	for round := range 3 {
		before := l.Sandboxes()
		require.True(t, rewritten(t, l))
		require.Equal(t, before, l.Sandboxes())
		mustAppend(t, l, &Record{Key: key("a"), Kind: Noted, Step: fmt.Sprint(round)})
	}
	want := []string{"a begun", "a intent cni", "a done cni", "a noted 0", "a noted 1", "a noted 2", "c begun", "c intent cni", "c done cni"}
	require.Equal(t, want, lines(l.Sandboxes()))
	again := d.image(t).open(t)
	require.Empty(t, again.Damage())
	require.Equal(t, l.Sandboxes(), again.Sandboxes())
	require.Equal(t, want, fromLogAlone(t, d))
}

// A record that the durable log has and the log has not taken stays in memory until the log is rewritten.
func TestRewriteAfterFailedAppend(t *testing.T) {
	for name, failCut := range map[string]error{"cut back at once": nil, "not cut back": unix.EIO} {
		t.Run(name, func(t *testing.T) {
			d := newDirs(t)
			l := d.open(t)
			begin(t, l, key("a"))
			spy := l.spy()
			spy.fail, spy.failCut = unix.EIO, failCut
			require.Error(t, l.Append(context.Background(), &Record{Key: key("b"), Kind: Begun}))
			require.Equal(t, []string{"a begun", "b begun"}, lines(l.Sandboxes()))
			require.NotContains(t, fromLogAlone(t, d), "b begun")

			require.True(t, rewritten(t, l))
			require.Equal(t, []string{"a begun", "b begun"}, fromLogAlone(t, d))
			require.Equal(t, []string{"a begun", "b begun"}, lines(l.Sandboxes()))
			require.Nil(t, l.live[key("b")][0].frame, "the log has it")
			mustAppend(t, l, &Record{Key: key("b"), Kind: Noted})
			require.True(t, rewritten(t, l))
			require.Equal(t, []string{"a begun", "b begun", "b noted"}, fromLogAlone(t, d))
		})
	}
}

// The log was torn, and can't be rewritten at Open: what only the durable log has is not lost by a later rewrite.
func TestRewriteOfAReusedLog(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	begin(t, l, key("a"))
	mustAppend(t, l, &Record{Key: key("a"), Kind: Intent, Step: "cni"})
	mustAppend(t, l, &Record{Key: key("a"), Kind: CleanupPending, Step: "cni"})
	require.NoError(t, l.Close())
	info, err := os.Stat(d.log())
	require.NoError(t, err)
	require.NoError(t, os.Truncate(d.log(), info.Size()-3))
	require.NoError(t, os.Mkdir(d.log()+".new", 0o700)) // in the way of a new log

	l = d.open(t)
	require.Len(t, l.Damage(), 1)
	want := []string{"a begun", "a intent cni", "a owed cni", "a done cni"}
	require.Equal(t, want[:3], lines(l.Sandboxes()))
	mustAppend(t, l, &Record{Key: key("a"), Kind: Done, Step: "cni"})
	require.False(t, rewritten(t, l))
	require.Equal(t, want, lines(l.Sandboxes()))

	require.NoError(t, os.Remove(d.log()+".new"))
	require.True(t, rewritten(t, l))
	require.Equal(t, want, lines(l.Sandboxes()))
	require.Equal(t, want, fromLogAlone(t, d))
	require.Equal(t, want, lines(d.image(t).open(t).Sandboxes()))
}

// The log is damaged while the ledger is open. Each damaged record is shown as unreadable. The log
// is not rewritten, so that a restart reports the damage, until no sandbox needs the damaged bytes.
func TestLogDamagedWhileOpen(t *testing.T) {
	flip := func(t *testing.T, path string, at int) {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		require.NoError(t, err)
		defer f.Close()
		b := make([]byte, 1)
		_, err = f.ReadAt(b, int64(at))
		require.NoError(t, err)
		_, err = f.WriteAt([]byte{b[0] ^ 1}, int64(at))
		require.NoError(t, err)
	}
	for name, damage := range map[string]func(t *testing.T, path string, from, to int){
		"payload":    func(t *testing.T, path string, _, to int) { flip(t, path, to-1) },
		"magic":      func(t *testing.T, path string, from, _ int) { flip(t, path, from) },
		"length":     func(t *testing.T, path string, from, _ int) { flip(t, path, from+len(magic)+3) },
		"cut":        func(t *testing.T, path string, _, to int) { require.NoError(t, os.Truncate(path, int64(to-1))) },
		"cut before": func(t *testing.T, path string, from, _ int) { require.NoError(t, os.Truncate(path, int64(from))) },
	} {
		t.Run(name, func(t *testing.T) {
			ctx := context.Background()
			d := newDirs(t)
			l := d.open(t)
			begin(t, l, key("stays"))
			begin(t, l, key("hit"))
			before := l.log.size
			mustAppend(t, l, &Record{Key: key("hit"), Kind: Done, Step: "cni", Data: stepData})
			damage(t, d.log(), int(before), int(l.log.size))

			shown := []string{"stays begun", "hit begun", "hit unreadable"}
			require.Equal(t, shown, lines(l.Sandboxes()))
			unreadable := l.Sandboxes()[1].Records[1]
			require.Equal(t, key("hit"), unreadable.Key)
			require.NotZero(t, unreadable.Seq)
			require.Contains(t, unreadable.Error, d.log())

			require.False(t, rewritten(t, l), "it would lose the record")
			require.NoFileExists(t, d.log()+".new")
			mustAppend(t, l, &Record{Key: key("stays"), Kind: Noted})
			require.Equal(t, []string{"stays begun", "stays noted", "hit begun", "hit unreadable"}, lines(l.Sandboxes()))
			again := d.image(t).open(t)
			require.NotEmpty(t, again.Damage())
			require.Equal(t, []string{"stays begun", "stays noted", "hit begun"}, lines(again.Sandboxes()))

			require.NoError(t, l.Forget(ctx, key("hit")))
			require.True(t, rewritten(t, l))
			again = d.image(t).open(t)
			require.Empty(t, again.Damage())
			require.Equal(t, []string{"stays begun", "stays noted"}, lines(again.Sandboxes()))
		})
	}
}

// If a whole frame of another record is at a record's offset, the record is unreadable.
func TestRecordInAnothersPlace(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	begin(t, l, key("a"))
	from := l.log.size
	mustAppend(t, l, &Record{Key: key("a"), Kind: Noted, Step: "1"})
	middle := l.log.size
	mustAppend(t, l, &Record{Key: key("a"), Kind: Noted, Step: "2"})
	content, err := os.ReadFile(d.log())
	require.NoError(t, err)
	_, size, err := cutFrame(content[middle:])
	require.NoError(t, err)
	content = append(bytes.Clone(content[:from]), content[middle:int(middle)+size]...)
	require.NoError(t, os.WriteFile(d.log(), content, 0o600))
	require.Equal(t, []string{"a begun", "a unreadable", "a unreadable"}, lines(l.Sandboxes()))
	require.False(t, rewritten(t, l))
}

func TestUnreadableLog(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	begin(t, l, key("a"))
	spy := l.spy()
	spy.failRead = unix.EIO
	require.Equal(t, []string{"a unreadable"}, lines(l.Sandboxes()))
	require.True(t, l.Sandboxes()[0].Records[0].Durable)
	require.Contains(t, l.Sandboxes()[0].Records[0].Error, unix.EIO.Error())
	require.False(t, rewritten(t, l))
	mustAppend(t, l, &Record{Key: key("a"), Kind: Noted})
	spy.failRead = nil
	require.True(t, rewritten(t, l))
	require.Equal(t, []string{"a begun", "a noted"}, lines(d.image(t).open(t).Sandboxes()))
}

// A rewrite changes the offsets. Sandboxes never looks up an offset in another log.
func TestSandboxesWhileTheLogIsRewritten(t *testing.T) {
	const sandboxes, rewrites = 10, 1000
	l := newDirs(t).open(t)
	for i := range sandboxes {
		begin(t, l, key(fmt.Sprint("s", i)))
	}
	written := make(chan struct{})
	go func() {
		defer close(written)
		for i := range rewrites {
			mustAppend(t, l, &Record{Key: key(fmt.Sprint("s", i%sandboxes)), Kind: Noted})
			rewritten(t, l)
		}
	}()
	for looks := 0; ; looks++ {
		for _, sb := range l.Sandboxes() {
			for _, r := range sb.Records {
				require.NotEqual(t, Unreadable, r.Kind, r.Error)
			}
		}
		select {
		case <-written:
			require.Greater(t, looks, 10)
			return
		default:
		}
	}
}
