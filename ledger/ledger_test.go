package ledger

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv(killedWriterEnv) != "" {
		runKilledWriter()
		return
	}
	// In memory an fsync costs nothing. The tests fsync thousands of times, and have no power cut but the ones they play.
	if err := os.Setenv("TMPDIR", "/dev/shm"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// dirs is where a test's ledger lives.
type dirs struct{ root, state, bootID string }

func newDirs(t testing.TB) dirs {
	base := t.TempDir()
	d := dirs{root: filepath.Join(base, "root"), state: filepath.Join(base, "state"), bootID: filepath.Join(base, "boot_id")}
	d.reboot(t, "boot-1")
	return d
}

// reboot gives the node a new boot id; the files stay.
func (d dirs) reboot(t testing.TB, id string) {
	require.NoError(t, os.WriteFile(d.bootID, []byte(id+"\n"), 0o600))
}

func (d dirs) durable() string { return durablePath(d.root) }
func (d dirs) log() string     { return logPath(d.state) }

func (d dirs) open(t testing.TB) *Ledger {
	t.Helper()
	return d.openOn(t, osDisk{})
}

func (d dirs) openOn(t testing.TB, on disk) *Ledger {
	t.Helper()
	l, err := open(on, d.root, d.state, d.bootID)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, l.Close()) })
	return l
}

// image copies the ledger as a crash at this moment would leave it.
func (d dirs) image(t testing.TB) dirs {
	to := newDirs(t)
	require.NoError(t, os.CopyFS(to.root, os.DirFS(d.root)))
	require.NoError(t, os.CopyFS(to.state, os.DirFS(d.state)))
	return to
}

func key(id string) Key { return Key{Namespace: "k8s.io", ID: id} }

func begin(t testing.TB, l *Ledger, k Key) {
	t.Helper()
	mustAppend(t, l, &Record{Key: k, Kind: Begun, Data: &Data{TypeURL: "spec", Value: []byte(k.ID)}})
}

func mustAppend(t testing.TB, l *Ledger, r *Record) {
	t.Helper()
	require.NoError(t, l.Append(context.Background(), r))
}

// lines returns one string per record, for comparisons.
func lines(sandboxes []Sandbox) []string {
	var out []string
	for _, sb := range sandboxes {
		for _, r := range sb.Records {
			out = append(out, strings.TrimSpace(fmt.Sprintf("%s %s %s", r.Key.ID, r.Kind, r.Step)))
		}
	}
	return out
}

func TestRoundTrip(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	want := []Record{
		{Key: key("a"), Kind: Begun, Release: "v0.3.0", TraceParent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
			Data: &Data{TypeURL: "type.nobody/knows", Value: []byte{0, 0xff, 'P', 'J', 0xfe, 1}}},
		{Key: key("a"), Kind: Intent, Step: "ids", Data: &Data{TypeURL: "x", Value: []byte{}}},
		{Key: key("a"), Kind: Noted, Step: "ids"},
		{Key: key("a"), Kind: Done, Step: "ids", Durable: true},
		{Key: key("a"), Kind: Moved, Event: "allocate", State: "IDsAllocated"},
		{Key: key("a"), Kind: CleanupPending, Step: "cni", Goal: "remove", Error: "DEL failed: <no IPAM> & \"more\"\n"},
		{Key: key("a"), Kind: "a-kind-of-a-newer-version"},
	}
	for i := range want {
		mustAppend(t, l, &want[i])
		require.NotZero(t, want[i].At)
		want[i].At = want[i].At.Round(0) // a stored time has no monotonic clock
	}
	require.True(t, want[0].Durable, "Begun is durable by itself")
	require.True(t, want[5].Durable, "CleanupPending is durable by itself")

	expected := []Sandbox{{Key: key("a"), Records: want}}
	require.Equal(t, expected, l.Sandboxes())
	require.NoError(t, l.Close())
	l = d.open(t)
	require.Equal(t, expected, l.Sandboxes())
	require.Empty(t, l.Damage())
	require.False(t, l.BootChanged())
}

func TestSandboxesReturnsCopies(t *testing.T) {
	l := newDirs(t).open(t)
	begin(t, l, key("a"))
	l.Sandboxes()[0].Records[0].Data.Value[0] = 'X'
	require.Equal(t, "a", string(l.Sandboxes()[0].Records[0].Data.Value))
}

func TestSeqGrowsOverRestarts(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	begin(t, l, key("stays"))
	require.NoError(t, l.Close())
	var last uint64
	for round := range 4 {
		l := d.open(t)
		for i := range 3 {
			k := key(fmt.Sprintf("s%d-%d", round, i))
			begun, moved := &Record{Key: k, Kind: Begun}, &Record{Key: k, Kind: Moved}
			mustAppend(t, l, begun)
			mustAppend(t, l, moved)
			require.Greater(t, begun.Seq, last)
			require.Greater(t, moved.Seq, begun.Seq)
			require.NoError(t, l.Forget(context.Background(), k))
			onlyInLog := &Record{Key: key("stays"), Kind: Noted}
			mustAppend(t, l, onlyInLog)
			last = onlyInLog.Seq
		}
		require.NoError(t, l.Close())
		switch round {
		case 1: // a reboot: no file has the newest numbers
			require.NoError(t, os.RemoveAll(d.state))
			d.reboot(t, "boot-2")
		case 2: // the durable file is lost
			require.NoError(t, os.RemoveAll(d.root))
		}
	}
	l = d.open(t)
	r := &Record{Key: key("last"), Kind: Begun}
	mustAppend(t, l, r)
	require.Greater(t, r.Seq, last)
}

func TestAppendRefuses(t *testing.T) {
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	for name, tc := range map[string]struct {
		ctx  context.Context
		r    Record
		want func(error) bool
	}{
		"no kind":           {r: Record{Key: key("a")}, want: errdefs.IsInvalidArgument},
		"no namespace":      {r: Record{Key: Key{ID: "a"}, Kind: Begun}, want: errdefs.IsInvalidArgument},
		"id with a slash":   {r: Record{Key: key("a/b"), Kind: Begun}, want: errdefs.IsInvalidArgument},
		"too large":         {r: Record{Key: key("a"), Kind: Begun, Data: &Data{Value: make([]byte, maxPayload)}}, want: errdefs.IsInvalidArgument},
		"year 10000":        {r: Record{Key: key("a"), Kind: Begun, At: time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)}, want: errdefs.IsInvalidArgument},
		"not begun":         {r: Record{Key: key("b"), Kind: Intent}, want: errdefs.IsNotFound},
		"not begun durable": {r: Record{Key: key("b"), Kind: CleanupPending}, want: errdefs.IsNotFound},
		"cancelled":         {ctx: cancelled, r: Record{Key: key("a"), Kind: Begun}, want: errdefs.IsCanceled},
	} {
		t.Run(name, func(t *testing.T) {
			l := newDirs(t).open(t)
			ctx := tc.ctx
			if ctx == nil {
				ctx = context.Background()
			}
			err := l.Append(ctx, &tc.r)
			require.Error(t, err)
			require.True(t, tc.want(err), "%v", err)
			require.Empty(t, l.Sandboxes())
		})
	}
}

// A kill in the middle of a rewrite leaves files that the next start removes.
func TestOpenRemovesWhatAKillLeft(t *testing.T) {
	d := newDirs(t)
	require.NoError(t, d.open(t).Close())
	for _, file := range []string{d.durable(), d.log()} {
		require.NoError(t, os.WriteFile(file+".new", []byte("half"), 0o600))
	}
	require.NoError(t, d.open(t).Close())
	require.NoFileExists(t, d.durable()+".new")
	require.NoFileExists(t, d.log()+".new")
}

// Recorded times are in UTC, and the caller's time keeps its monotonic clock reading.
func TestTimesAreUTC(t *testing.T) {
	l := newDirs(t).open(t)
	at := time.Now().In(time.FixedZone("east", 3600))
	r := &Record{Key: key("a"), Kind: Begun, At: at}
	mustAppend(t, l, r)
	require.Equal(t, at, r.At)
	require.Equal(t, at.UTC().Round(0), l.Sandboxes()[0].Records[0].At)
	require.NoError(t, l.Close())
}

func TestForget(t *testing.T) {
	ctx := context.Background()
	d := newDirs(t)
	l := d.open(t)
	for _, id := range []string{"a", "a1", "a-1"} {
		begin(t, l, key(id))
		mustAppend(t, l, &Record{Key: key(id), Kind: Intent, Step: "cni"})
		mustAppend(t, l, &Record{Key: key(id), Kind: CleanupPending, Step: "cni"})
	}
	require.NoError(t, l.Forget(ctx, key("a")))
	require.NoError(t, l.Forget(ctx, key("a")), "forgetting is idempotent")
	require.NoError(t, l.Forget(ctx, key("never-there")))
	require.True(t, errdefs.IsNotFound(l.Append(ctx, &Record{Key: key("a"), Kind: Noted})), "a late step must not bring it back")

	want := []string{"a1 begun", "a1 intent cni", "a1 owed cni", "a-1 begun", "a-1 intent cni", "a-1 owed cni"}
	require.Equal(t, want, lines(l.Sandboxes()))
	require.NoError(t, l.Close())

	l = d.open(t)
	require.Equal(t, want, lines(l.Sandboxes()))
	begin(t, l, key("a"))
	require.NoError(t, l.Close())
	require.Equal(t, append(want, "a begun"), lines(d.open(t).Sandboxes()), "the id begins a new life")
}

// A cleanup that is retried for months must not fill the disk.
func TestRepeatedRecordsStayFew(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	begin(t, l, key("a"))
	for i := range 50 {
		mustAppend(t, l, &Record{Key: key("a"), Kind: UndoIntent, Step: "cni"})
		mustAppend(t, l, &Record{Key: key("a"), Kind: CleanupPending, Step: "cni", Error: fmt.Sprint("try ", i)})
		mustAppend(t, l, &Record{Key: key("a"), Kind: CleanupPending, Step: "snapshot", Error: fmt.Sprint("try ", i)})
	}
	check := func(sandboxes []Sandbox) {
		require.Equal(t, []string{
			"a begun",
			"a undo-intent cni", "a owed cni", "a owed snapshot",
			"a undo-intent cni", "a owed cni", "a owed snapshot",
		}, lines(sandboxes))
		require.Equal(t, "try 0", sandboxes[0].Records[2].Error)
		require.Equal(t, "try 49", sandboxes[0].Records[5].Error)
	}
	check(l.Sandboxes())
	require.NoError(t, l.Close())

	require.NoError(t, os.Remove(d.log()))
	d.reboot(t, "boot-2")
	l = d.open(t)
	require.Len(t, lines(l.Sandboxes()), 5)
	require.Len(t, readLog(d.durable()).records, 5, "the durable log drops them too")
}

// A record that can wait has no transaction of its own. A kill doesn't lose the record. A reboot
// does, unless another transaction of the sandbox has included it.
func TestRecordsThatCanWait(t *testing.T) {
	d, on := newDirs(t), &testDisk{}
	l := d.openOn(t, on)
	afterReboot := func() []string {
		rebooted := d.image(t)
		rebooted.reboot(t, "boot-2")
		require.NoError(t, os.Remove(rebooted.log()))
		return lines(rebooted.open(t).Sandboxes())
	}
	note := func(step string) {
		mustAppend(t, l, &Record{Key: key("a"), Kind: Noted, Step: step, Durable: true, CanWait: true})
	}
	require.True(t, errdefs.IsNotFound(l.Append(t.Context(), &Record{Key: key("a"), Kind: Begun, CanWait: true})), "the durable log says what exists")

	begin(t, l, key("a"))
	syncs := on.syncs()
	note("one")
	note("two")
	require.Equal(t, syncs, on.syncs())
	require.Equal(t, []string{"a begun"}, afterReboot())
	begin(t, l, key("b"))
	require.Equal(t, []string{"a begun", "b begun"}, afterReboot(), "it waits for its own sandbox")
	mustAppend(t, l, &Record{Key: key("a"), Kind: Done, Durable: true})
	require.Equal(t, syncs+2, on.syncs())
	all := []string{"a begun", "a noted one", "a noted two", "a done"}
	require.Equal(t, append(all, "b begun"), afterReboot())

	note("three")
	killed := d.image(t).open(t)
	require.Equal(t, append(all, "a noted three", "b begun"), lines(killed.Sandboxes()))
	require.NoError(t, l.Forget(t.Context(), key("a")))
	require.Empty(t, l.waiting)
	require.Equal(t, []string{"b begun"}, afterReboot())
}

// While the disk is full, no more records wait than the ledger has.
func TestWaitingRecordsStayFew(t *testing.T) {
	l := newDirs(t).open(t)
	begin(t, l, key("a"))
	note := func() {
		mustAppend(t, l, &Record{Key: key("a"), Kind: Noted, Step: "cni", Durable: true, CanWait: true})
	}
	for range 3 {
		for range 10 {
			note()
		}
		require.LessOrEqual(t, len(l.waiting), 2)
		mustAppend(t, l, &Record{Key: key("a"), Kind: CleanupPending})
		require.Empty(t, l.waiting)
	}
	require.Equal(t, []string{"a begun", "a noted cni", "a owed", "a noted cni", "a owed"}, lines(l.Sandboxes()))
}

// A transaction is one write and one sync of one file, whatever is in it.
func TestATransactionIsOneSync(t *testing.T) {
	on := &testDisk{}
	l := newDirs(t).openOn(t, on)
	begin(t, l, key("a"))
	begin(t, l, key("c"))
	for name, write := range map[string]func() error{
		"begin":          func() error { return l.Append(t.Context(), &Record{Key: key("b"), Kind: Begun}) },
		"durable record": func() error { return l.Append(t.Context(), &Record{Key: key("a"), Kind: CleanupPending}) },
		"with what has waited": func() error {
			mustAppend(t, l, &Record{Key: key("a"), Kind: Noted, Durable: true, CanWait: true})
			return l.Append(t.Context(), &Record{Key: key("a"), Kind: Done, Durable: true})
		},
		"forget": func() error { return l.Forget(t.Context(), key("c")) },
	} {
		before := on.changes(l.durable.path)
		require.NoError(t, write())
		require.Equal(t, []string{"write", "sync"}, on.changes(l.durable.path)[len(before):], name)
	}
	require.NotContains(t, on.changes(l.log.path), "sync")
}

func TestClosed(t *testing.T) {
	l := newDirs(t).open(t)
	begin(t, l, key("a"))
	require.NoError(t, l.Close())
	require.NoError(t, l.Close())
	require.True(t, errdefs.IsFailedPrecondition(l.Append(context.Background(), &Record{Key: key("a"), Kind: Noted})))
	require.True(t, errdefs.IsFailedPrecondition(l.Append(context.Background(), &Record{Key: key("b"), Kind: Begun})))
	require.True(t, errdefs.IsFailedPrecondition(l.Forget(context.Background(), key("a"))))
}

func TestConcurrentSandboxes(t *testing.T) {
	const sandboxes, records = 64, 10
	d := newDirs(t)
	l := d.open(t)
	var wg sync.WaitGroup
	for i := range sandboxes {
		wg.Go(func() {
			k := key(fmt.Sprint("s", i))
			begin(t, l, k)
			for j := range records {
				mustAppend(t, l, &Record{Key: k, Kind: Done, Step: fmt.Sprint(j), Durable: j%3 == 0})
			}
			if i%2 == 0 {
				require.NoError(t, l.Forget(context.Background(), k))
			}
		})
	}
	wg.Wait()
	check := func(all []Sandbox) {
		require.Len(t, all, sandboxes/2)
		for _, sb := range all {
			require.Len(t, sb.Records, records+1)
			for j, r := range sb.Records[1:] {
				require.Equal(t, fmt.Sprint(j), r.Step)
				require.Greater(t, r.Seq, sb.Records[j].Seq)
			}
		}
	}
	check(l.Sandboxes())
	require.NoError(t, l.Close())
	check(d.open(t).Sandboxes())
}

// While one transaction is synced the operations that arrive must all go into the next.
func TestConcurrentWritersShareTransactions(t *testing.T) {
	const writers = 32
	on := &testDisk{}
	l := newDirs(t).openOn(t, on)
	reached, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	on.set(func(c change) error {
		if c.what == "sync" {
			once.Do(func() {
				close(reached)
				<-release
			})
		}
		return nil
	})
	before := on.syncs()
	var wg sync.WaitGroup
	wg.Go(func() { begin(t, l, key("first")) })
	<-reached
	for i := range writers {
		wg.Go(func() { begin(t, l, key(fmt.Sprintf("s%d", i))) })
	}
	require.Eventually(t, func() bool {
		l.queue.mu.Lock()
		defer l.queue.mu.Unlock()
		return len(l.queue.waiting) == writers
	}, 10*time.Second, time.Millisecond)
	close(release)
	wg.Wait()
	require.Equal(t, 2, on.syncs()-before)
}

func TestForgottenSandboxesCostNothing(t *testing.T) {
	const writers, cycles = 100, 100
	d := newDirs(t)
	l := d.open(t)
	cycle := func() {
		var wg sync.WaitGroup
		for i := range writers {
			wg.Go(func() {
				for j := range cycles {
					k := key(fmt.Sprintf("s%d-%d", i, j))
					mustAppend(t, l, &Record{Key: k, Kind: Begun, Data: &Data{TypeURL: "spec", Value: make([]byte, 4096)}})
					mustAppend(t, l, &Record{Key: k, Kind: Done, Step: "ids"})
					require.NoError(t, l.Forget(context.Background(), k))
				}
			})
		}
		wg.Wait()
	}
	size := func(path string) int64 {
		info, err := os.Stat(path)
		require.NoError(t, err)
		return info.Size()
	}
	begin(t, l, key("stays"))
	before := heapInUse()
	cycle()
	require.Less(t, heapInUse()-before, int64(1<<20))
	require.Less(t, size(d.log()), int64(logSlack+1<<20))
	require.Less(t, size(d.durable()), int64(logSlack+1<<20))
	require.Equal(t, []string{"stays begun"}, lines(l.Sandboxes()))
}
