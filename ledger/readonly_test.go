package ledger

import (
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func (d dirs) read() (*Snapshot, error) { return openReadOnly(d.root, d.state, d.bootID) }

// contents maps every file of the ledger to what is in it.
func (d dirs) contents(t *testing.T) map[string]string {
	all := map[string]string{}
	for _, dir := range []string{d.root, d.state} {
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		for _, e := range entries {
			b, err := os.ReadFile(dir + "/" + e.Name())
			require.NoError(t, err)
			all[dir+"/"+e.Name()] = string(b)
		}
	}
	return all
}

func TestReadOnly(t *testing.T) {
	d := newDirs(t)
	_, err := d.read()
	require.True(t, errdefs.IsNotFound(err), "%v", err)
	require.NoDirExists(t, d.root)

	want := smallLedger(t, d, 20)
	before := d.contents(t)
	s, err := d.read()
	require.NoError(t, err)
	require.Equal(t, want, s.Sandboxes)
	require.Empty(t, s.Damage)
	require.False(t, s.BootChanged)

	d.reboot(t, "boot-2")
	s, err = d.read()
	require.NoError(t, err)
	require.True(t, s.BootChanged)
	require.Greater(t, s.BootSeq, want[0].Records[0].Seq)
	require.Equal(t, before, d.contents(t), "nothing was changed")
}

func TestReadOnlyWhileTheDaemonRuns(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	begin(t, l, key("a"))
	// It writes a record at this moment.
	f, err := os.OpenFile(d.log(), os.O_WRONLY|os.O_APPEND, 0)
	require.NoError(t, err)
	_, err = f.WriteString(magic[:3])
	require.NoError(t, err)
	require.NoError(t, f.Close())

	s, err := d.read()
	require.NoError(t, err)
	require.True(t, s.InUse)
	require.Equal(t, []string{"a begun"}, lines(s.Sandboxes))
	require.Empty(t, s.Damage)
	begin(t, l, key("b")) // it did not disturb the daemon

	require.NoError(t, l.Close())
	s, err = d.read()
	require.NoError(t, err)
	require.False(t, s.InUse)
	require.Equal(t, []string{"a begun", "b begun"}, lines(s.Sandboxes))
}

// A write of the daemon during the read is not reported as damage.
func TestReadOnlyWhileTheDaemonWrites(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	var reads atomic.Int32
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; i < 200 || reads.Load() < 20; i++ {
			k := key(fmt.Sprint("s", i%3))
			begin(t, l, k)
			mustAppend(t, l, &Record{Key: k, Kind: Intent, Step: "cni"})
			require.NoError(t, l.Forget(t.Context(), k))
			if i%7 == 0 {
				require.NoError(t, l.rewriteDurable()) // nothing is queued, so the committer is idle
				rewritten(t, l)
			}
		}
	}()
	for ended := false; !ended; reads.Add(1) {
		s, err := d.read()
		require.NoError(t, err)
		require.Empty(t, s.Damage)
		select {
		case <-done:
			ended = true
		default:
		}
	}
}

func TestReadOnlyOfDamage(t *testing.T) {
	d := newDirs(t)
	want := smallLedger(t, d, 20)
	damage(t, d.durable())
	f, err := os.OpenFile(d.log(), os.O_WRONLY|os.O_APPEND, 0)
	require.NoError(t, err)
	_, err = f.WriteString(magic[:3])
	require.NoError(t, err)
	require.NoError(t, f.Close())
	before := d.contents(t)

	s, err := d.read()
	require.NoError(t, err)
	require.Equal(t, want, s.Sandboxes)
	require.GreaterOrEqual(t, len(s.Damage), 2)
	require.True(t, s.Damage[len(s.Damage)-1].Torn)
	for _, damage := range s.Damage {
		require.Empty(t, damage.Kept)
	}
	require.Equal(t, before, d.contents(t), "nothing was changed")
}

func TestReadOnlyWithOneFile(t *testing.T) {
	for _, lost := range []func(dirs) string{dirs.durable, dirs.log} {
		d := newDirs(t)
		smallLedger(t, d, 20)
		require.NoError(t, os.Remove(lost(d)))
		s, err := d.read()
		require.NoError(t, err)
		require.Len(t, s.Sandboxes, 13)
		require.Len(t, s.Damage, 1)
		require.Equal(t, lost(d), s.Damage[0].File)
	}
}

func TestReadOnlyTellsWhatIsKeptAsideAndWhenItWasWritten(t *testing.T) {
	d := newDirs(t)
	smallLedger(t, d, 20)
	damage(t, d.durable())
	written := time.Now().Add(-time.Hour).Truncate(time.Second)
	for _, file := range []string{d.durable(), d.log()} {
		require.NoError(t, os.Chtimes(file, written, written))
	}
	s, err := d.read()
	require.NoError(t, err)
	require.Empty(t, s.Aside)
	require.True(t, s.Written.Equal(written), "%s", s.Written)

	l := d.open(t)
	aside, err := l.Aside()
	require.NoError(t, err)
	require.Equal(t, []string{d.durable() + ".damaged-1"}, aside)
	require.NoError(t, l.Close())
	s, err = d.read()
	require.NoError(t, err)
	require.Equal(t, aside, s.Aside)
	require.True(t, s.Written.After(written))
}

// damage flips a bit in the middle of a file.
func damage(t *testing.T, path string) {
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	content[len(content)/2] ^= 1
	require.NoError(t, os.WriteFile(path, content, 0o600))
}
