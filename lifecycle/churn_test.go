package lifecycle_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/log"
	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/history"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/states"
)

// TestChurn runs pods on a node for an hour by a fake clock, with PODFSM_FULL=1 for a day. Pods
// come and go, fail in every step, lose pause, have a pending cleanup for more than a round, and
// live through restarts and kills of the daemon. The daemon's use of resources must not grow. The
// steps are fake; the engine, the ledger and the history are real.
func TestChurn(t *testing.T) {
	c := churn{round: 10 * time.Minute, rounds: 6}
	if os.Getenv("PODFSM_FULL") != "" {
		c = churn{round: time.Hour, rounds: 24}
	}
	seen := c.run(t)
	for i, u := range seen {
		t.Logf("after round %d: %+v", i+1, u)
	}
	require.Empty(t, growth(seen))
}

// TestChurnSeesLeaks leaks 8 KiB per pod, and a goroutine, a descriptor and a file per round.
// The measure must see all of them. make long runs this test beside a day of churn.
func TestChurnSeesLeaks(t *testing.T) {
	var heap [][]byte
	var files []*os.File
	var release chan struct{}
	seen := churn{
		round: 10 * time.Minute, rounds: 6,
		everyPod: func() { heap = append(heap, make([]byte, 8<<10)) },
		everyRound: func(dir string) {
			if release == nil {
				release = make(chan struct{})
			}
			go func() { <-release }()
			file, err := os.CreateTemp(dir, "leaked")
			require.NoError(t, err)
			files = append(files, file)
			_, err = file.Write(make([]byte, 256<<10))
			require.NoError(t, err)
		},
		end: func() { close(release) },
	}.run(t)
	for _, file := range files {
		require.NoError(t, file.Close())
	}
	grown := strings.Join(growth(seen), "; ")
	for _, what := range []string{"heap", "goroutines", "descriptors", "files", "bytes of files"} {
		require.Contains(t, grown, what+" grew")
	}
	require.NotEmpty(t, heap)
}

// churn describes a run of TestChurn. The functions leak on purpose; nil for none.
type churn struct {
	round  time.Duration
	rounds int

	everyPod   func()
	everyRound func(dir string)
	end        func()
}

// arrival is the time between two pods.
const arrival = 4 * time.Second

// usage is a daemon's use of resources, without the goroutines that drive the pods.
type usage struct {
	heap, objects           int64
	goroutines, descriptors int64
	files, bytes            int64 // of the ledger, and whatever else there is but the history
	history                 int64 // in bytes
	sandboxes               int64
}

// run returns the usage at the end of each round.
func (c churn) run(t *testing.T) (seen []usage) {
	level := log.GetLevel()
	require.NoError(t, log.SetLevel("panic")) // a churn logs thousands of failures
	defer func() { require.NoError(t, log.SetLevel(level.String())) }()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		past, err := history.Open(filepath.Join(dir, history.FileName))
		require.NoError(t, err)
		n := &churnNode{t: t, dir: dir, past: past, pods: map[ledger.Key]*churnPod{}, entered: map[states.State]int{}}
		n.start()
		defer func() { n.end(false) }()
		for round := range c.rounds {
			c.oneRound(n, round)
			seen = append(seen, n.usage())
		}
		if c.end != nil {
			c.end()
		}
		n.drivers.Wait()
		require.Eventually(t, func() bool { return len(n.daemon.Load().Keys()) == 0 }, 3*c.round, time.Minute, "a pending cleanup does not end")
		require.Zero(t, n.sweep(), "pods with resources on the node")
		for _, state := range records.Table().States() {
			if state != states.New && state != states.Quarantined {
				require.NotZero(t, n.entered[state], "no pod was %s: the churn is too tame", state)
			}
		}
	})
	return seen
}

// oneRound starts the pods of a round. All rounds are the same, so that the usage at their ends is
// comparable.
func (c churn) oneRound(n *churnNode, round int) {
	pods := int(c.round / arrival)
	for i := range pods {
		n.run(c.pod(round, i))
		if c.everyPod != nil {
			c.everyPod()
		}
		time.Sleep(arrival)
		if i%(pods/4) == pods/8 { // four times a round, half of them by SIGKILL, in the middle of a creation
			n.run(c.pod(round, pods+i))
			time.Sleep(40 * time.Millisecond)
			n.end(i > pods/2)
			n.start()
		}
	}
	if c.everyRound != nil {
		c.everyRound(n.dir)
	}
}

// pod is the i-th pod of a round.
func (c churn) pod(round, i int) *churnPod {
	p := &churnPod{
		key:      ledger.Key{Namespace: "k8s.io", ID: fmt.Sprintf("pod-%d-%d", round, i)},
		lifetime: c.round/50 + c.round*time.Duration(i%23)/50,
		exists:   map[states.Event]bool{},
	}
	steps := records.Table().Path()
	step := steps[i/20%len(steps)]
	heals := time.Now().Add(p.lifetime + c.round/10)
	if i%3 == 0 {
		heals = time.Now().Add(c.round * 6 / 5)
	}
	switch i % 20 {
	case 0:
		p.fails = step
	case 1:
		p.fails, p.undoFails, p.heals = step, steps[0], heals
	case 2:
		p.fails, p.panics = step, true
	case 3, 4:
		p.undoFails, p.heals = step, heals
	case 5:
		p.dies = true
	case 6:
		p.diesEarly = true
	case 7:
		p.patience = 100 * time.Millisecond
	case 8:
		p.ill = true
	case 9:
		p.fails = startShim
	}
	return p
}

// usage returns the usage once the daemon is idle.
func (n *churnNode) usage() (u usage) {
	synctest.Wait()
	n.sweep()
	u.goroutines = int64(runtime.NumGoroutine()) - n.driving.Load()
	u.sandboxes = int64(len(n.daemon.Load().Keys()))
	runtime.GC()
	runtime.GC() // a sync.Pool keeps its content until the second
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	u.heap, u.objects = int64(memory.HeapAlloc), int64(memory.HeapObjects)
	descriptors, err := os.ReadDir("/proc/self/fd")
	require.NoError(n.t, err)
	u.descriptors = int64(len(descriptors))
	require.NoError(n.t, filepath.WalkDir(n.dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		if entry.Name() == history.FileName {
			u.history = info.Size()
			return nil
		}
		u.files++
		u.bytes += info.Size()
		return nil
	}))
	return u
}

// settled is the first round after which the numbers of pending cleanups and of ended pods stay the
// same.
const settled = 2

// maxHistory is the size at which package history rewrites its file: twice what it keeps.
const maxHistory = 4 << 20

// growth returns what has grown since the settled round. The tolerances are ten times the
// difference of two runs. At the end of most rounds, but not of all, the last closed daemon is still
// in memory. So the larger heap of two settled rounds counts.
func growth(seen []usage) (grown []string) {
	first, last := seen[settled-1], seen[len(seen)-1]
	first.heap, first.objects = max(first.heap, seen[settled].heap), max(first.objects, seen[settled].objects)
	for _, of := range []struct {
		what             string
		first, last, max int64
	}{
		{"heap", first.heap, last.heap, 384 << 10},
		{"objects on the heap", first.objects, last.objects, 2000},
		{"goroutines", first.goroutines, last.goroutines, 2},
		{"descriptors", first.descriptors, last.descriptors, 2},
		{"files", first.files, last.files, 0},
		{"bytes of files", first.bytes, last.bytes, first.bytes/2 + 128<<10},
		{"history", 0, last.history, maxHistory},
	} {
		if of.last-of.first > of.max {
			grown = append(grown, fmt.Sprintf("%s grew from %d to %d, by more than %d", of.what, of.first, of.last, of.max))
		}
	}
	return grown
}
