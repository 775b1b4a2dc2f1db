package userns

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// world is a host that a test has made up. What isn't in standings lives.
type world struct {
	standings map[string]Standing
	processes []Use
	snapshots []Use
	err       error
	searches  int
}

func (w *world) Standing(_ context.Context, h Holder) (Standing, error) {
	return w.standings[h.ID], w.err
}

func (w *world) Processes(context.Context) ([]Use, error) { return w.processes, w.err }

func (w *world) Uses(context.Context) ([]Use, error) {
	w.searches++
	return slices.Concat(w.processes, w.snapshots), w.err
}

// ids are a private range: the same uids and gids.
func ids(first, length uint32) Mappings {
	m := Mapping{HostID: first, Length: length}
	return Mappings{UIDs: m, GIDs: m}
}

func use(m Mappings, by string) Use {
	return Use{UIDs: []Mapping{m.UIDs}, GIDs: []Mapping{m.GIDs}, By: by}
}

// asking is a sandbox of pod whose request has the mappings.
func asking(id, pod string, m Mappings) Holder {
	return Holder{ID: id, Owner: pod, Pod: "default/" + pod, Origin: OriginRequest, Mappings: m}
}

func auto(id, pod string) Holder {
	return Holder{ID: id, Owner: pod, Pod: "default/" + pod, Origin: OriginAuto}
}

func poolAt(t *testing.T, path string, ranges int) *Pool {
	t.Helper()
	extents := []Extent{{First: 1 << 20, Size: uint64(ranges) * RangeSize}}
	pool, err := OpenPool("test", Ranges{UIDs: extents, GIDs: extents}, path)
	require.NoError(t, err)
	return pool
}

func poolOf(t *testing.T, ranges int) *Pool {
	return poolAt(t, filepath.Join(t.TempDir(), "history"), ranges)
}

func TestHoldKeepsPodsApart(t *testing.T) {
	const at, size = 1 << 20, 1 << 16
	apart := func(uids, gids uint32) Mappings {
		return Mappings{UIDs: Mapping{HostID: uids, Length: size}, GIDs: Mapping{HostID: gids, Length: size}}
	}
	for name, tc := range map[string]struct {
		m    Mappings
		kind string // "" for no overlap
	}{
		"the same":            {ids(at, size), "uid"},
		"its first id":        {ids(at-size+1, size), "uid"},
		"its last id":         {ids(at+size-1, size), "uid"},
		"one in the middle":   {ids(at+77, 1), "uid"},
		"all ids":             {ids(MinHostID, maxHostID-MinHostID+1), "uid"},
		"only the gids":       {apart(at+size, at), "gid"},
		"only the uids":       {apart(at, at+size), "uid"},
		"right before":        {ids(at-size, size), ""},
		"right behind":        {ids(at+size, size), ""},
		"the last ids of all": {ids(maxHostID, 1), ""},
	} {
		t.Run(name, func(t *testing.T) {
			a := New(&world{}, nil)
			require.NoError(t, a.Hold(t.Context(), asking("s1", "first", ids(at, size))))
			for _, call := range []func(context.Context, Holder) error{a.Check, a.Hold} {
				err := call(t.Context(), asking("s2", "second", tc.m))
				if tc.kind == "" {
					require.NoError(t, err)
					continue
				}
				require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
				require.ErrorContains(t, err, fmt.Sprintf(`host %ss %d to %d of pod "default/second" overlap 1048576 to 1114111, which pod "default/first" (sandbox "s1") holds`,
					tc.kind, tc.m.of(tc.kind).HostID, tc.m.of(tc.kind).last()))
			}
			require.NoError(t, a.Release("s2"))
			require.NoError(t, a.Hold(t.Context(), asking("s1.1", "first", tc.m)), "attempts of one pod share")
			require.NoError(t, a.Release("s1"))
			require.NoError(t, a.Release("s1.1"))
			require.NoError(t, a.Hold(t.Context(), asking("s2", "second", tc.m)))
		})
	}
}

func TestHoldIsIdempotentAndCheckHoldsNothing(t *testing.T) {
	a := New(&world{}, nil)
	h := asking("s1", "first", ids(1<<20, 65536))
	require.NoError(t, a.Check(t.Context(), h))
	require.NoError(t, a.Hold(t.Context(), asking("s2", "second", h.Mappings)))
	require.NoError(t, a.Release("s2"))
	require.NoError(t, a.Hold(t.Context(), h))
	require.NoError(t, a.Hold(t.Context(), h))
	require.NoError(t, a.Release("s1"))
	require.NoError(t, a.Release("s1"))
	require.Empty(t, a.holdings.byID)
	require.Empty(t, a.holdings.uids)
	require.Empty(t, a.holdings.gids)
}

func TestWhoYields(t *testing.T) {
	const id = "s1"
	m := ids(1<<20, 65536)
	for name, tc := range map[string]struct {
		origin Origin
		world  world
		yields bool
	}{
		"lives":                        {OriginRequest, world{}, false},
		"ended":                        {OriginRequest, world{standings: map[string]Standing{id: Ended}}, true},
		"ended, stock":                 {OriginStock, world{standings: map[string]Standing{id: Ended}}, true},
		"ended, a range of the pool":   {OriginAuto, world{standings: map[string]Standing{id: Ended}}, false},
		"ended, but a process has ids": {OriginRequest, world{standings: map[string]Standing{id: Ended}, processes: []Use{use(ids(1<<20+5, 1), "p")}}, false},
		"ended, a process has others":  {OriginRequest, world{standings: map[string]Standing{id: Ended}, processes: []Use{use(ids(1<<20-1, 1), "p")}}, true},
		"gone":                         {OriginRequest, world{standings: map[string]Standing{id: Gone}}, true},
		"gone, stock":                  {OriginStock, world{standings: map[string]Standing{id: Gone}}, true},
		"the host can't be looked at":  {OriginRequest, world{standings: map[string]Standing{id: Gone}, err: errors.New("no luck")}, false},
	} {
		t.Run(name, func(t *testing.T) {
			a := New(&tc.world, nil)
			h := asking(id, "first", m)
			h.Origin = tc.origin
			a.Restore(h)
			err := a.Hold(t.Context(), asking("s2", "second", m))
			if !tc.yields {
				require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
				if tc.world.err != nil {
					require.ErrorContains(t, err, "no luck")
				}
				return
			}
			require.NoError(t, err)
			err = a.Hold(t.Context(), asking("s3", "third", m))
			require.ErrorContains(t, err, `pod "default/second"`, "who has them now")
		})
	}
}

func TestNodeWideMappingIsShared(t *testing.T) {
	a := New(&world{}, nil)
	m := ids(1<<24, 1<<17)
	for i := range 3 {
		h := Holder{ID: fmt.Sprintf("s%d", i), Owner: "node", Pod: "default/shared", Origin: OriginNode, Mappings: m}
		require.NoError(t, a.Hold(t.Context(), h))
	}
	for i := range 3 {
		require.Error(t, a.Hold(t.Context(), asking("x", "other", ids(1<<24+100, 10))), "%d are left", 3-i)
		require.NoError(t, a.Release(fmt.Sprintf("s%d", i)))
	}
	require.NoError(t, a.Hold(t.Context(), asking("x", "other", ids(1<<24+100, 10))))
}

func TestAllocate(t *testing.T) {
	w := &world{}
	a := New(w, poolOf(t, 2))
	require.NoError(t, a.Check(t.Context(), auto("", "first")))
	first, err := a.Allocate(t.Context(), auto("s1", "first"))
	require.NoError(t, err)
	require.Equal(t, ids(1<<20, 65536), first)
	again, err := a.Allocate(t.Context(), auto("s1", "first"))
	require.NoError(t, err)
	require.Equal(t, first, again, "it has one already")
	second, err := a.Allocate(t.Context(), auto("s2", "second"))
	require.NoError(t, err)
	require.Equal(t, ids(1<<20+1<<16, 65536), second)

	_, err = a.Allocate(t.Context(), auto("s3", "third"))
	require.True(t, errdefs.IsResourceExhausted(err))
	require.ErrorContains(t, err, "of 2 ranges, 2 are held, 0 are in quarantine and 0 belong to pods outside the pool")
	require.True(t, errdefs.IsResourceExhausted(a.Check(t.Context(), auto("", "third"))))
	require.NoError(t, a.Check(t.Context(), auto("", "second")), "a retry")

	w.processes, w.snapshots = []Use{use(ids(1<<20+65535, 1), "process 7 (sleep)")}, []Use{use(second, `snapshot "c"`)}
	require.NoError(t, a.Release("s1"))
	require.NoError(t, a.Release("s2"))
	_, err = a.Allocate(t.Context(), auto("s3", "third"))
	require.ErrorContains(t, err, "0 are held, 2 are in quarantine")
	o, err := a.Overview(t.Context())
	require.NoError(t, err)
	require.Equal(t, []Quarantined{{first, "process 7 (sleep)"}, {second, `snapshot "c"`}}, o.Pool.Quarantined)

	w.processes, w.err = nil, errors.New("no luck")
	_, err = a.Allocate(t.Context(), auto("s3", "third"))
	require.True(t, errdefs.IsResourceExhausted(err))
	require.ErrorContains(t, err, "no luck")
	w.err = nil
	third, err := a.Allocate(t.Context(), auto("s3", "third"))
	require.NoError(t, err)
	require.Equal(t, first, third)
}

func TestAllocateTakesTheLeastRecentlyUsed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "history")
	w := &world{}
	a := New(w, poolAt(t, path, 4))
	run := func(id string) uint32 {
		m, err := a.Allocate(t.Context(), auto(id, id))
		require.NoError(t, err)
		return (m.UIDs.HostID - 1<<20) >> 16
	}
	for want, id := range []string{"a", "b", "c"} {
		require.EqualValues(t, want, run(id))
	}
	require.NoError(t, a.Release("b"))
	require.NoError(t, a.Release("a"))
	require.EqualValues(t, 3, run("d"), "never used")
	require.EqualValues(t, 1, run("e"))
	require.EqualValues(t, 0, run("f"))
	for _, id := range []string{"f", "c", "d", "e"} {
		require.NoError(t, a.Release(id))
	}
	a = New(w, poolAt(t, path, 4)) // a restart
	for _, want := range []uint32{0, 2, 3, 1} {
		require.Equal(t, want, run(fmt.Sprint("after", want)))
	}
}

func TestAllocateInParallel(t *testing.T) {
	const ranges, pods = 50, 200
	a := New(&world{}, poolOf(t, ranges))
	given := make(chan Mappings, pods)
	var all sync.WaitGroup
	for i := range pods {
		all.Go(func() {
			id := fmt.Sprint("s", i)
			m, err := a.Allocate(t.Context(), auto(id, id))
			if err == nil {
				given <- m
			} else if !errdefs.IsResourceExhausted(err) {
				t.Error(err)
			}
		})
	}
	all.Wait()
	close(given)
	distinct := map[Mappings]bool{}
	for m := range given {
		require.False(t, distinct[m], "%v", m)
		distinct[m] = true
	}
	require.Len(t, distinct, ranges)
}

func TestSearchOfALargePool(t *testing.T) {
	w := &world{}
	for i := range uint32(2000) { // processes of a busy node, each with a range of the pool
		w.processes = append(w.processes, use(ids(1<<20+i*3<<16, 65536), fmt.Sprint("process ", i)))
	}
	const ranges = 60000
	a := New(w, poolOf(t, ranges))
	start := time.Now()
	o, err := a.Overview(t.Context())
	require.NoError(t, err)
	require.Equal(t, ranges-2000, o.Pool.Free)
	require.Len(t, o.Pool.Quarantined, 2000)
	require.Equal(t, "process 1999", o.Pool.Quarantined[1999].UsedBy)
	t.Logf("%v", time.Since(start))
}

func TestAllocateKeepsOffOthers(t *testing.T) {
	a := New(&world{}, poolOf(t, 3))
	require.NoError(t, a.Hold(t.Context(), asking("s1", "asked", ids(1<<20+65535, 2)))) // the first two
	m, err := a.Allocate(t.Context(), auto("s2", "second"))
	require.NoError(t, err)
	require.Equal(t, ids(1<<20+2<<16, 65536), m)
	_, err = a.Allocate(t.Context(), auto("s3", "third"))
	require.ErrorContains(t, err, "1 are held, 0 are in quarantine and 2 belong to pods outside the pool")
	require.Error(t, a.Hold(t.Context(), asking("s4", "thief", ids(1<<20+2<<16, 1))))
}

// What a pod outside the pool leaves behind uses ids of the pool as well.
func TestRangesOfOthersAreQuarantined(t *testing.T) {
	w := &world{}
	a := New(w, poolOf(t, 3))
	_, err := a.Overview(t.Context()) // which frees all
	require.NoError(t, err)
	require.NoError(t, a.Hold(t.Context(), asking("s1", "asked", ids(1<<20+65535, 2)))) // the first two
	w.processes = []Use{use(ids(1<<20+65536, 1), "process 7 (left)")}
	require.NoError(t, a.Release("s1"))
	for range 2 {
		o, err := a.Overview(t.Context())
		require.NoError(t, err)
		require.Equal(t, []Quarantined{{ids(1<<20+65536, 65536), "process 7 (left)"}}, o.Pool.Quarantined)
		require.Equal(t, 2, o.Pool.Free)
	}
}

// No request has such mappings, but a damaged record may.
func TestMappingsWithoutIDs(t *testing.T) {
	a := New(&world{}, poolOf(t, 1))
	for _, first := range []uint32{0, 1 << 20, 1<<32 - 1} {
		a.Restore(asking("empty", "empty", ids(first, 0)))
		_, err := a.Allocate(t.Context(), auto("s1", "pod"))
		require.NoError(t, err)
		require.NoError(t, a.Release("s1"))
		require.NoError(t, a.Release("empty"))
	}
	a.Restore(asking("too far", "too far", ids(1<<32-1, 1<<32-1)))
	require.NoError(t, a.Release("too far"))
}

func TestRestoredRangeOfAnotherPool(t *testing.T) {
	a := New(&world{}, poolOf(t, 1))
	h := auto("old", "old")
	h.Mappings = ids(1<<20+10, 65536) // the pool was moved since
	a.Restore(h)
	_, err := a.Allocate(t.Context(), auto("new", "new"))
	require.True(t, errdefs.IsResourceExhausted(err))
	require.NoError(t, a.Release("old"))
	_, err = a.Allocate(t.Context(), auto("new", "new"))
	require.NoError(t, err)
}

func TestRefusalsAreKept(t *testing.T) {
	a := New(&world{}, nil)
	require.NoError(t, a.Hold(t.Context(), asking("s1", "first", ids(1<<20, 65536))))
	for range 3 {
		require.Error(t, a.Hold(t.Context(), asking("s2", "second", ids(1<<20, 65536))))
	}
	for i := range 2 * keepRefusals {
		require.Error(t, a.Hold(t.Context(), asking("s3", fmt.Sprint("pod", i), ids(1<<20, 65536))))
	}
	require.Error(t, a.Hold(t.Context(), asking("s2", "pod100", ids(1<<20, 65536))))
	o, err := a.Overview(t.Context())
	require.NoError(t, err)
	require.Len(t, o.Refusals, keepRefusals)
	last := o.Refusals[keepRefusals-1]
	require.Equal(t, "default/pod100", last.Pod)
	require.Equal(t, 2, last.Count)
	require.WithinDuration(t, time.Now(), last.At, time.Minute)
	require.Contains(t, last.Reason, "default/first")
}

func TestOpenPoolRefuses(t *testing.T) {
	one := []Extent{{1 << 20, 65536}}
	for name, tc := range map[string]struct {
		uids, gids []Extent
		text       string
	}{
		"the node's root": {[]Extent{{0, 65536}}, one, "65536 uids from 0 are not all within 1000"},
		"the node's last": {one, []Extent{{999, 65536}}, "65536 gids from 999 are not all within 1000"},
		"an empty extent": {one, []Extent{{1 << 20, 0}}, "0 gids from 1048576"},
		"beyond the last": {[]Extent{{4294901760, 65536}}, one, "65536 uids from 4294901760"},
		"far beyond":      {[]Extent{{1 << 20, 1 << 63}}, one, "uids from 1048576"},
		"starts far out":  {[]Extent{{1 << 63, 65536}}, one, "65536 uids"},
		"overlap":         {[]Extent{{2 << 20, 131072}, {1 << 20, 1<<20 + 1}}, one, "ranges of uids from 1048576 and from 2097152 overlap"},
		"none":            {nil, nil, "no range of 65536 contiguous uids and gids"},
		"too few":         {[]Extent{{1 << 20, 65535}, {2 << 20, 65535}}, one, "no range of 65536 contiguous uids and gids"},
		"gids only":       {nil, one, "no range of 65536 contiguous uids and gids"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := OpenPool("test", Ranges{tc.uids, tc.gids}, filepath.Join(t.TempDir(), "history"))
			require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
			require.ErrorContains(t, err, tc.text)
		})
	}
	pool, err := OpenPool("test", Ranges{UIDs: []Extent{{100000, 200000}, {1 << 20, 65536}}, GIDs: []Extent{{300000, 65536}, {400000, 65536}, {500000, 99}}}, filepath.Join(t.TempDir(), "history"))
	require.NoError(t, err)
	require.Equal(t, []Mappings{
		{UIDs: Mapping{HostID: 100000, Length: 65536}, GIDs: Mapping{HostID: 300000, Length: 65536}},
		{UIDs: Mapping{HostID: 165536, Length: 65536}, GIDs: Mapping{HostID: 400000, Length: 65536}},
	}, pool.quarantined())
}

func TestHistoryIsOnlyAdvice(t *testing.T) {
	path := filepath.Join(t.TempDir(), "history")
	for name, text := range map[string]string{
		"empty":     "",
		"torn":      "1048576 1048576\n1114112 11",
		"garbage":   "\x00\xff\n-1 -1\n99999999999 1\n1048577 1048577\n\n",
		"unnatural": "1048576 1048576 junk\n1114112 1114112\n",
	} {
		t.Run(name, func(t *testing.T) {
			require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
			a := New(&world{}, poolAt(t, path, 2))
			seen := map[Mappings]bool{}
			for i := range 2 {
				m, err := a.Allocate(t.Context(), auto(fmt.Sprint(i), fmt.Sprint(i)))
				require.NoError(t, err)
				seen[m] = true
			}
			require.Len(t, seen, 2)
		})
	}
	t.Run("a folder", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "history")
		require.NoError(t, os.Mkdir(path, 0o700))
		a := New(&world{}, poolAt(t, path, 1))
		for range 2 {
			_, err := a.Allocate(t.Context(), auto("s1", "pod"))
			require.NoError(t, err)
			require.ErrorContains(t, a.Release("s1"), "failed to record")
		}
		require.NoFileExists(t, path+".new")
	})
	t.Run("it stays small", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "history")
		a := New(&world{}, poolAt(t, path, 3))
		for range 2500 {
			_, err := a.Allocate(t.Context(), auto("s1", "pod"))
			require.NoError(t, err)
			require.NoError(t, a.Release("s1"))
		}
		info, err := os.Stat(path)
		require.NoError(t, err)
		require.LessOrEqual(t, info.Size(), int64(1030*16))
	})
}

// TestNoIDIsGivenTwice makes random requests, ends, crashes and losses, on a host whose processes are the only truth.
func TestNoIDIsGivenTwice(t *testing.T) {
	for seed := range uint64(100) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) { runModel(t, seed) })
	}
}

// sandboxModel is a sandbox of the test's host.
type sandboxModel struct {
	holder   Holder
	running  bool // it has processes
	snapshot bool
	recorded bool // the ledger knows its mapping
}

func runModel(t *testing.T, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 7))
	path := filepath.Join(t.TempDir(), "history")
	w := &world{}
	const ranges = 6
	a := New(w, poolAt(t, path, ranges))
	sandboxes := map[string]*sandboxModel{}
	refused := 0

	look := func() { // the host as the allocator would see it
		w.standings, w.processes, w.snapshots = map[string]Standing{}, nil, nil
		for id, s := range sandboxes {
			if s.running {
				w.processes = append(w.processes, use(s.holder.Mappings, "process of "+id))
			} else {
				w.standings[id] = Ended
			}
			if s.snapshot {
				w.snapshots = append(w.snapshots, use(s.holder.Mappings, "snapshot of "+id))
			}
		}
	}
	some := func() (string, *sandboxModel) {
		all := make([]string, 0, len(sandboxes))
		for id := range sandboxes {
			all = append(all, id)
		}
		if len(all) == 0 {
			return "", nil
		}
		slices.Sort(all)
		id := all[random.IntN(len(all))]
		return id, sandboxes[id]
	}
	for step := range 300 {
		look()
		id := fmt.Sprint("s", step)
		switch random.IntN(10) {
		case 0, 1, 2: // a pod of mode auto
			h := auto(id, id)
			m, err := a.Allocate(t.Context(), h)
			if err != nil {
				require.True(t, errdefs.IsResourceExhausted(err))
				refused++
				continue
			}
			for other, o := range sandboxes {
				require.False(t, (o.running || o.snapshot) && o.holder.Mappings.Overlap(m), "%s got %v, which %s uses", id, m, other)
			}
			h.Mappings = m
			sandboxes[id] = &sandboxModel{h, true, true, true}
		case 3, 4: // a pod that the kubelet gives a range to, perhaps one that overlaps; or an attempt of one that there is
			h := asking(id, fmt.Sprint("pod", random.IntN(5)), ids(1<<20-65536+uint32(random.IntN((ranges+2)*65536)), 1+uint32(random.IntN(70000))))
			if err := a.Hold(t.Context(), h); err != nil {
				require.True(t, errdefs.IsInvalidArgument(err))
				refused++
				continue
			}
			sandboxes[id] = &sandboxModel{h, true, false, true}
		case 5: // a stop
			if _, s := some(); s != nil {
				s.running = false
			}
		case 6, 7: // a removal, in the order of the undos
			id, s := some()
			if s != nil && s.running && s.holder.Origin == OriginRequest && random.IntN(4) == 0 { // something is left of it, unnoticed
				s.recorded = false
				require.NoError(t, a.Release(id))
			}
			if s != nil && !s.running {
				s.snapshot = false
				require.NoError(t, a.Release(id))
				delete(sandboxes, id)
			}
		case 8: // a crash; now and then the ledger loses a sandbox of the pool
			if random.IntN(2) == 0 {
				require.NoError(t, os.RemoveAll(path))
			}
			a = New(w, poolAt(t, path, ranges))
			for id, s := range sandboxes {
				if s.recorded = s.recorded && (s.holder.Origin != OriginAuto || random.IntN(4) > 0); s.recorded {
					a.Restore(s.holder)
				} else if !s.running && !s.snapshot {
					delete(sandboxes, id)
				}
			}
		case 9: // overview
			_, err := a.Overview(t.Context())
			require.NoError(t, err)
		}
		requireApart(t, sandboxes)
	}
	require.Positive(t, refused, "the pool was never under pressure")
}

// requireApart fails when two pods that may have processes share an id, or a pod shares one with a range of the pool that is in use.
func requireApart(t *testing.T, sandboxes map[string]*sandboxModel) {
	t.Helper()
	for id, s := range sandboxes {
		for other, o := range sandboxes {
			if id >= other || s.holder.Owner == o.holder.Owner || !(s.running && o.running) {
				continue
			}
			m, n := s.holder.Mappings, o.holder.Mappings
			if m.Overlap(n) {
				// A pod without records can't block others, because its ids are unknown; it is only kept off the pool's ranges.
				if (s.recorded || o.holder.Origin != OriginRequest) && (o.recorded || s.holder.Origin != OriginRequest) {
					t.Fatalf("%s and %s share ids: %v %v", id, other, m, n)
				}
			}
		}
	}
}

func BenchmarkGuard(b *testing.B) {
	for _, holders := range []int{10, 100, 1000, 10000} {
		b.Run(fmt.Sprint("holders=", holders), func(b *testing.B) {
			a := New(&world{}, nil)
			for i := range holders {
				require.NoError(b, a.Hold(b.Context(), asking(fmt.Sprint("s", i), fmt.Sprint("pod", i), ids(uint32(i+1)<<16, 1<<16))))
			}
			h := asking("new", "new", ids(uint32(holders+1)<<16, 1<<16))
			b.ReportAllocs()
			for b.Loop() {
				if err := a.Hold(b.Context(), h); err != nil {
					b.Fatal(err)
				}
				if err := a.Release(h.ID); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
