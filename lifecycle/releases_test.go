package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
)

// build is a release with its steps.
type build struct {
	release  string
	declared []Declaration
}

// builds differ in a step that is missing, has another place or another name.
func builds() map[string]build {
	label := func(name states.Event, state states.State) Declaration {
		return declare(name, state, Declaration{Holds: []states.Event{allocateIDs}})
	}
	with := func(at int, d Declaration) []Declaration { return slices.Insert(testSteps(), at, d) }
	gate := declare("open_gate", "", Declaration{Holds: []states.Event{captureNetNS}, AtStop: true})
	return map[string]build{
		"without it":           {"v1", testSteps()},
		"with it early":        {"v2", with(1, label("label_pod", "Labelled"))},
		"with it late":         {"v3", with(5, label("label_pod", "Labelled"))},
		"with it renamed":      {"v4", with(5, label("tag_pod", "Tagged"))},
		"with one on demand":   {"v5", append(testSteps(), gate)},
		"without the last one": {"v6", withoutLast()},
	}
}

// withoutLast returns steps without the last one: another is the last step of the path.
func withoutLast() []Declaration {
	declared := slices.Delete(testSteps(), 5, 6)
	declared[4].State = states.Ready
	return declared
}

func (b build) names() (names []states.Event) {
	for _, d := range b.declared {
		names = append(names, d.Name)
	}
	return names
}

func (b build) atStop(name states.Event) bool {
	return slices.ContainsFunc(b.declared, func(d Declaration) bool { return d.Name == name && d.AtStop })
}

// on starts the build on the node and the ledger of another build.
func (b build) on(t *testing.T, before *world) *world {
	before.Close(context.Background())
	w := newRelease(t, b.release, b.declared, before.book, before.node)
	w.book = before.book
	w.engineWaits()
	w.Restore(t.Context(), w.book.saved(), func(_ ledger.Key, spec any) Request {
		return Request{Pod: "ns/pod", Spec: spec}
	}, outsideOf(kept))
	return w
}

// begin makes a world of the build with an accepted sandbox.
func (b build) begin(t *testing.T) *world {
	book := &book{}
	w := newRelease(t, b.release, b.declared, book, newNode())
	w.book = book
	w.engineWaits()
	w.create(t)
	return w
}

// condition is a condition in which a build leaves a sandbox.
type condition struct {
	leave    func(t *testing.T, b build) *world
	ready    bool
	creation bool // what ends it is one rollback, not a stop and a removal
}

func conditions(b build) map[string]condition {
	all := map[string]condition{
		"ready": {ready: true, leave: func(t *testing.T, b build) *world { return b.ready(t) }},
		"stopping": {leave: func(t *testing.T, b build) *world {
			w := b.ready(t)
			require.NoError(t, w.Stop(t.Context(), testKey))
			w.cutAfter(func(r ledger.Record) bool { return r.Event == string(states.Stop) })
			w.exists, w.exited = b.ready(t).exists, nil
			return w
		}},
		"stopped": {leave: func(t *testing.T, b build) *world {
			w := b.ready(t)
			require.NoError(t, w.Stop(t.Context(), testKey))
			return w
		}},
		"pending stop": {leave: func(t *testing.T, b build) *world {
			w := b.ready(t)
			w.undo[captureNetNS] = func() error { return errNoLuck }
			require.Error(t, w.Stop(t.Context(), testKey))
			return w
		}},
		"pending removal": {leave: func(t *testing.T, b build) *world {
			w := b.ready(t)
			w.undo[startPause] = func() error { return errNoLuck }
			require.Error(t, w.Remove(t.Context(), testKey))
			return w
		}},
		"pending rollback": {creation: true, leave: func(t *testing.T, b build) *world {
			w := b.begin(t)
			w.do[attachNetwork] = func(context.Context) error { return errNoLuck }
			w.undo[captureNetNS] = func() error { return errNoLuck }
			require.Error(t, w.Start(t.Context(), testKey))
			return w
		}},
	}
	for _, d := range b.declared {
		if d.OnDemand {
			continue
		}
		all["making "+string(d.Name)] = condition{creation: true, leave: func(t *testing.T, b build) *world { return b.killedIn(t, d.Name) }}
	}
	return all
}

// ready leaves a ready sandbox with all steps, also those on demand.
func (b build) ready(t *testing.T) *world {
	w := b.begin(t)
	require.NoError(t, w.Start(t.Context(), testKey))
	for _, d := range b.declared {
		if d.OnDemand {
			require.NoError(t, w.Demand(t.Context(), testKey, d.Name))
		}
	}
	return w
}

// killedIn leaves a sandbox as a kill during a step does.
func (b build) killedIn(t *testing.T, step states.Event) *world {
	w := b.begin(t)
	var left []states.Event
	w.do[step] = func(context.Context) error { left = w.left(); return errNoLuck }
	require.Error(t, w.Start(t.Context(), testKey))
	w.book.records = slices.Clone(w.book.all)
	w.cutAfter(func(r ledger.Record) bool { return r.Kind == ledger.Intent && r.Step == string(step) })
	w.node.exists = left
	return w
}

// cutAfter deletes the records after one.
func (w *world) cutAfter(last func(ledger.Record) bool) {
	i := slices.IndexFunc(w.book.records, last)
	w.book.records = w.book.records[:i+1]
}

// Pods of one build run under another build, and then under the first again. A ready pod stays
// ready. Every other pod ends, in the recorded order. A step that the other build can't undo is
// pending until the first build runs again.
func TestReleasesOfSteps(t *testing.T) {
	for from, older := range builds() {
		for to, newer := range builds() {
			for name, c := range conditions(older) {
				t.Run(fmt.Sprintf("%s, from %s to %s", name, from, to), func(t *testing.T) {
					w := c.leave(t, older)
					w.mend()
					made, begun := w.left(), w.recorded()
					stops := func(name states.Event) bool { return !c.creation && older.atStop(name) }
					w.acts = nil
					next := newer.on(t, w)
					unknown := without(made, newer.names())

					require.NoError(t, next.Resume(t.Context(), testKey))
					if c.ready {
						requireUntouched(t, next, older, newer)
						stopped := next.Stop(t.Context(), testKey)
						if !slices.Contains(unknown, "open_gate") {
							require.NoError(t, stopped)
						}
					}
					require.NoError(t, next.WaitQueued(t.Context(), testKey))
					if err := next.Remove(t.Context(), testKey); len(unknown) > 0 {
						requirePending(t, next, err, unknown, older, newer)
						requireUndone(t, next.acted(), begun, made, next.left(), stops)
						made, next.acts = next.left(), nil
						next = older.on(t, next)
						require.NoError(t, next.Resume(t.Context(), testKey))
						require.Eventually(t, next.gone, 10*time.Second, time.Millisecond)
					} else {
						require.NoError(t, err)
					}
					require.True(t, next.gone())
					require.Empty(t, next.left())
					requireUndone(t, next.acted(), begun, made, nil, stops)
				})
			}
		}
	}
}

// recorded returns the steps on record, in the order in which they began.
func (w *world) recorded() (begun []states.Event) {
	for _, r := range w.book.records {
		if r.Kind == ledger.Intent {
			begun = append(begun, states.Event(r.Step))
		}
	}
	return begun
}

func without(all, some []states.Event) []states.Event {
	return slices.DeleteFunc(slices.Clone(all), func(e states.Event) bool { return slices.Contains(some, e) })
}

// requireUntouched requires that a pod is ready and untouched under another build, and shows the
// steps of both builds.
func requireUntouched(t *testing.T, w *world, older, newer build) {
	t.Helper()
	view, err := w.Get(testKey)
	require.NoError(t, err)
	require.Equal(t, states.Ready, view.State)
	require.NoError(t, view.Err)
	require.Empty(t, w.acted())
	for _, name := range older.names() {
		step := view.Step(name)
		require.Equal(t, StepDone, step.Status, name)
		require.Equal(t, older.release, step.Release)
		require.Equal(t, !slices.Contains(newer.names(), name), step.Unknown, name)
	}
	for _, name := range without(newer.names(), older.names()) {
		if name != "open_gate" { // on demand, and not demanded
			require.Equal(t, StepPending, view.Step(name).Status, name)
		}
	}
	var shown []states.Event
	for _, step := range view.Steps {
		if step.Status == StepDone {
			shown = append(shown, step.Name)
		}
	}
	require.Equal(t, w.recorded(), shown, "in the order on record")
}

// requirePending requires that a cleanup is pending because of unknown steps alone, and that the
// error names the release that can undo them.
func requirePending(t *testing.T, w *world, err error, unknown []states.Event, older, newer build) {
	t.Helper()
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	view, getErr := w.Get(testKey)
	require.NoError(t, getErr)
	require.Equal(t, states.CleanupOwed, view.State)
	for _, name := range unknown {
		text := fmt.Sprintf("undo of step %s of pod \"ns/pod\" failed: podfsm %s recorded the step, and podfsm %s doesn't know that step; install podfsm %s again",
			name, older.release, newer.release, older.release)
		require.ErrorContains(t, err, text)
		require.ErrorContains(t, view.Step(name).Err, text)
	}
	for _, step := range view.Steps {
		held := step.Name == allocateIDs || step.Name == captureNetNS // by the unknown ones
		require.False(t, step.Status == StepCleanupPending && !step.Unknown && !held, "%s is pending", step.Name)
	}
	require.Subset(t, w.left(), unknown)
	for _, d := range older.declared {
		if slices.Contains(unknown, d.Name) {
			require.Subset(t, w.left(), d.Holds, "what %s holds is not freed", d.Name)
		}
	}
}

// requireUndone requires that everything, except what is left, was undone in the reverse of the
// recorded order: first the steps that a stop undoes, then the rest.
func requireUndone(t *testing.T, acts []string, begun, made, left []states.Event, stops func(states.Event) bool) {
	t.Helper()
	for _, atStop := range []bool{true, false} {
		var want, got []states.Event
		for _, name := range slices.Backward(begun) {
			if slices.Contains(made, name) && !slices.Contains(left, name) && stops(name) == atStop {
				want = append(want, name)
			}
		}
		for _, act := range acts {
			name := states.Event(strings.TrimPrefix(act, "undo "))
			if slices.Contains(want, name) && !slices.Contains(got, name) {
				got = append(got, name)
			}
		}
		require.Equal(t, want, got)
	}
}

// Steps are undone in the recorded order, whatever the order of this build.
func TestUndoInTheRecordedOrder(t *testing.T) {
	early, late := builds()["with it early"], builds()["with it late"]
	w := early.killedIn(t, declareReady)
	w.mend()
	w.acts = nil
	next := late.on(t, w)
	require.NoError(t, next.Resume(t.Context(), testKey))
	require.Eventually(t, next.gone, 10*time.Second, time.Millisecond)
	require.Equal(t, []string{
		"undo declare_ready", "undo attach_network", "undo capture_netns", "undo start_pause", "undo remap_snapshot", "undo label_pod", "undo allocate_ids",
	}, next.acted())
}

// If an earlier daemon's records are lost, each step counts as done, and the recorded steps keep
// their order.
func TestOrderOfStepsThatAreNotOnRecord(t *testing.T) {
	for _, tc := range []struct{ begun, want []states.Event }{
		{nil, stepNames()},
		{stepNames()[:3], stepNames()},
		{[]states.Event{allocateIDs, attachNetwork}, stepNames()},
		{[]states.Event{attachNetwork, allocateIDs}, []states.Event{attachNetwork, declareReady, startShim, allocateIDs, remapSnapshot, startPause, captureNetNS}},
		{[]states.Event{allocateIDs, "label_pod", startPause}, []states.Event{allocateIDs, remapSnapshot, "label_pod", startPause, captureNetNS, attachNetwork, declareReady, startShim}},
	} {
		s := newSandbox(&Engine{table: testTable}, testKey, Request{})
		s.begun = tc.begun
		require.ElementsMatch(t, append(without(tc.begun, stepNames()), stepNames()...), s.order())
		require.Equal(t, tc.want, s.order())
	}
}

// Records of a later release for a ready pod are kept and shown. The pod stays ready, and can be
// stopped and removed.
func TestRecordsOfALaterRelease(t *testing.T) {
	unknownData := &ledger.Data{TypeURL: "nobody's", Value: []byte("{}")}
	for name, tc := range map[string]struct {
		spoil   func([]ledger.Record) []ledger.Record
		unread  int
		pending []states.Event
	}{
		"a kind": {func(r []ledger.Record) []ledger.Record { return append(r, ledger.Record{Seq: 99, Kind: "sung"}) }, 1, nil},
		"a kind for a step": {func(r []ledger.Record) []ledger.Record {
			return append(r, ledger.Record{Kind: "sung", Step: string(startPause)})
		}, 1, nil},
		"a claim": {func(r []ledger.Record) []ledger.Record {
			return append(r, ledger.Record{Kind: ledger.Claimed, Claim: "wanted"})
		}, 0, nil},
		"a goal": {func(r []ledger.Record) []ledger.Record {
			return append(r, ledger.Record{Kind: ledger.Moved, From: "Warm", Event: "heat", State: "Ready", Goal: "Hot"})
		}, 0, nil},
		"a plan": {func(r []ledger.Record) []ledger.Record {
			r[1].Data = unknownData
			return r
		}, 1, []states.Event{allocateIDs}},
		"a note": {func(r []ledger.Record) []ledger.Record {
			return append(r, ledger.Record{Kind: ledger.Noted, Step: string(attachNetwork), Data: unknownData})
		}, 1, []states.Event{attachNetwork}},
		"a result": {func(r []ledger.Record) []ledger.Record {
			r[2].Data = unknownData
			return r
		}, 1, []states.Event{allocateIDs}},
	} {
		t.Run(name, func(t *testing.T) {
			b := builds()["without it"]
			w := b.begin(t)
			require.NoError(t, w.Start(t.Context(), testKey))
			whole := slices.Clone(w.book.records)
			w.book.records = tc.spoil(slices.Clone(w.book.records))
			spoilt := len(w.book.records)
			for i := range w.book.records {
				w.book.records[i].Release = "v9"
			}
			next := b.on(t, w)
			require.NoError(t, next.Resume(t.Context(), testKey))
			view, err := next.Get(testKey)
			require.NoError(t, err)
			require.Equal(t, states.Ready, view.State)
			require.Len(t, view.Unread, tc.unread)
			for _, text := range view.Unread {
				require.Contains(t, text, "v9")
			}
			require.NoError(t, next.Check(t.Context(), testKey))
			require.Equal(t, states.Ready, next.state(t))

			err = next.Remove(t.Context(), testKey)
			if tc.pending == nil {
				require.NoError(t, err)
				require.Empty(t, next.left())
				return
			}
			require.ErrorContains(t, err, `podfsm v9 recorded the step, and podfsm v1 can't read its data of type "nobody's"; install podfsm v9 again`)
			require.Subset(t, next.left(), tc.pending)
			next.Close(t.Context())                                       // no retry writes a record now
			w.book.records = append(whole, next.book.records[spoilt:]...) // what that release can read
			next = b.on(t, next)
			require.NoError(t, next.Resume(t.Context(), testKey))
			require.NoError(t, next.Remove(t.Context(), testKey))
			require.Empty(t, next.left())
		})
	}
}

// A sandbox whose state or goal only another release knows waits for a request. It can be stopped
// and removed.
func TestStatesOfALaterRelease(t *testing.T) {
	for name, tc := range map[string]struct {
		last  ledger.Record
		state states.State
		goal  states.State
	}{
		"a state":                     {ledger.Record{Kind: ledger.Moved, From: "Ready", Event: "freeze", State: "Frozen"}, "Frozen", ""},
		"a state by a kind of record": {ledger.Record{Kind: "frozen", From: "Ready", Event: "freeze", State: "Frozen"}, "Frozen", ""},
		"a goal":                      {ledger.Record{Kind: ledger.CleanupPending, From: "Freezing", Event: "leave_cleanup_pending", State: "CleanupOwed", Goal: "Frozen", Error: "too warm"}, states.CleanupOwed, "Frozen"},
	} {
		for verb, end := range map[string]func(*world) error{
			"stop and remove": func(w *world) error {
				return errors.Join(w.Halt(context.Background(), testKey), w.Stop(context.Background(), testKey), w.Remove(context.Background(), testKey))
			},
			"remove": func(w *world) error { return w.Remove(context.Background(), testKey) },
			"restart, and containerd doesn't list it": func(w *world) error {
				s, err := w.lookup(testKey)
				s.findings.outside = unlisted
				return errors.Join(err, w.Resume(context.Background(), testKey), w.WaitQueued(context.Background(), testKey))
			},
		} {
			t.Run(name+"/"+verb, func(t *testing.T) {
				b := builds()["without it"]
				w := b.ready(t)
				w.book.records = append(w.book.records, tc.last)
				w.acts = nil
				next := b.on(t, w)
				require.NoError(t, next.Resume(t.Context(), testKey))
				require.NoError(t, next.Resume(t.Context(), testKey))
				require.NoError(t, next.WaitQueued(t.Context(), testKey))
				view, err := next.Get(testKey)
				require.NoError(t, err)
				require.Equal(t, tc.state, view.State)
				require.Equal(t, tc.goal, view.Goal)
				require.Empty(t, next.acted())
				require.True(t, errdefs.IsFailedPrecondition(next.Demand(t.Context(), testKey, startShim)))
				require.True(t, errdefs.IsFailedPrecondition(next.Start(t.Context(), testKey)))

				require.NoError(t, end(next))
				require.Eventually(t, next.gone, 10*time.Second, time.Millisecond)
				require.Empty(t, next.left())
			})
		}
	}
}

// If the process is of another release's step, the pod stays ready, and its stop is pending, not
// lost.
func TestProcessOfAnotherRelease(t *testing.T) {
	b := builds()["without it"]
	w := b.ready(t)
	renamed := func(from, to states.Event) {
		for i := range w.book.records {
			if r := &w.book.records[i]; r.Step == string(from) {
				r.Step, r.Release = string(to), "v9"
			}
		}
	}
	renamed(startPause, "clone_pause")
	w.acts = nil
	next := b.on(t, w)
	require.NoError(t, next.Resume(t.Context(), testKey))
	require.Equal(t, states.Ready, next.state(t))
	require.Empty(t, next.acted())
	require.ErrorContains(t, next.Stop(t.Context(), testKey), "podfsm v9 recorded the step, and podfsm v1 doesn't know that step")
	view, err := next.Get(testKey)
	require.NoError(t, err)
	require.Equal(t, states.CleanupOwed, view.State)
	require.Equal(t, states.Stopped, view.Goal)
	require.Contains(t, next.left(), startPause)
	require.Contains(t, next.left(), allocateIDs)
	require.NotContains(t, next.left(), attachNetwork)

	renamed("clone_pause", startPause)
	next = b.on(t, next)
	require.NoError(t, next.Resume(t.Context(), testKey))
	require.NoError(t, next.WaitQueued(t.Context(), testKey))
	require.Equal(t, states.Stopped, next.state(t))
	require.Contains(t, next.acted(), "stop start_pause")
	require.NoError(t, next.Remove(t.Context(), testKey))
	require.Empty(t, next.left())
}

// A step is added by its entry in the list alone: the path leads through its state, and a failure
// undoes it in order.
func TestStepThatIsAdded(t *testing.T) {
	w := builds()["with it late"].begin(t)
	require.NoError(t, w.Start(t.Context(), testKey))
	require.Equal(t, []states.State{idsAllocated, snapshotRemapped, pauseStarted, netNSCaptured, networkReady, "Labelled", states.Ready}, w.transitions(t))
	require.NoError(t, w.Remove(t.Context(), testKey))
	require.Empty(t, w.left())
	require.Contains(t, w.acted(), "undo label_pod")

	w = builds()["with it late"].begin(t)
	w.do["label_pod"] = func(context.Context) error { return errNoLuck }
	require.ErrorContains(t, w.Start(t.Context(), testKey), "step label_pod of pod")
	require.Empty(t, w.left())
}

func TestJoined(t *testing.T) {
	w := builds()["with it late"].begin(t)
	require.NoError(t, w.Start(t.Context(), testKey))
	require.NoError(t, w.Demand(t.Context(), testKey, startShim))
	all := w.book.saved()[0]
	whole, broken := joined(all)
	require.True(t, whole, "with any steps")
	require.False(t, broken)
	for i, r := range all.Records {
		rest := ledger.Sandbox{Records: slices.Delete(slices.Clone(all.Records), i, i+1)}
		leads := r.Kind == ledger.Done && r.Step != string(startShim)
		whole, broken := joined(rest)
		require.Equal(t, !leads, whole, "%s %s", r.Kind, r.Step)
		require.Equal(t, leads && r.State != string(states.Ready), broken, "%s %s", r.Kind, r.Step)
	}
	whole, broken = joined(ledger.Sandbox{})
	require.False(t, whole || broken)
}

// A skipped step of another release needs no undo, also if the removal takes two tries.
func TestSkippedStepOfALaterRelease(t *testing.T) {
	old := newWorld(t)
	require.NoError(t, old.run(t))
	skipped, err := ledger.Marshal(&Skipped{Reason: "no label"})
	require.NoError(t, err)
	old.book.records = slices.Insert(old.book.records, 3, // after the first step
		ledger.Record{Key: testKey, Kind: ledger.Intent, Step: "label_pod", Release: "v9"},
		ledger.Record{Key: testKey, Kind: ledger.Done, Step: "label_pod", Release: "v9", Data: skipped})
	w := old.restart(t, kept)
	w.engineWaits()
	require.NoError(t, w.Resume(t.Context(), testKey))
	fails := true
	w.undo[attachNetwork] = func() error {
		if fails {
			fails = false
			return errors.New("no luck")
		}
		return nil
	}
	require.ErrorContains(t, w.Remove(t.Context(), testKey), "no luck")
	require.NoError(t, w.Remove(t.Context(), testKey))
	require.Empty(t, w.left())
}

// If lost records were rebuilt, another release's step may be recorded before the steps that it
// holds. It is still undone first.
func TestHolderIsUndoneFirst(t *testing.T) {
	s := newSandbox(&Engine{table: testTable}, testKey, Request{})
	s.begun = []states.Event{"label_pod", allocateIDs, startPause}
	s.steps["label_pod"] = &stepState{holds: []states.Event{allocateIDs, startPause}}
	order := s.order()
	require.Greater(t, slices.Index(order, "label_pod"), slices.Index(order, startPause))
	require.ElementsMatch(t, append(stepNames(), "label_pod"), order)
}
