package lifecycle

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
)

// buggy panics in every method.
type buggy struct{}

func (buggy) Tried(Try, Outcome) { panic("a bug of the meter") }

func (buggy) Recovered(Recovery, time.Duration) { panic("a bug of the meter") }

func (buggy) Levels() []logrus.Level { return logrus.AllLevels }

func (buggy) Fire(*logrus.Entry) error { panic("a bug of the log") }

// buggyLog is a context whose log panics at every line.
func buggyLog(ctx context.Context) context.Context {
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	logger.SetLevel(logrus.TraceLevel)
	logger.AddHook(buggy{})
	return log.WithLogger(ctx, logrus.NewEntry(logger))
}

// hooks are all functions to which an engine reports. Nothing of a sandbox depends on them.
var hooks = map[string]func(w *world, ctx context.Context) context.Context{
	"the meter": func(w *world, ctx context.Context) context.Context {
		w.Engine.meter = buggy{}
		return ctx
	},
	"the observer": func(w *world, ctx context.Context) context.Context {
		w.observe = func(View) { panic("a bug of the observer") }
		return ctx
	},
	"the log": func(_ *world, ctx context.Context) context.Context { return buggyLog(ctx) },
}

func TestHookThatPanics(t *testing.T) {
	for name, spoil := range hooks {
		t.Run(name+", of a sandbox that is well", func(t *testing.T) {
			w := newWorld(t)
			ctx := spoil(w, t.Context())
			require.NoError(t, w.Create(ctx, testKey, Request{Pod: "ns/pod", Spec: &testSpec{"pod"}}))
			require.NoError(t, w.Start(ctx, testKey))
			require.Equal(t, states.Ready, w.state(t))
			require.NoError(t, w.Check(ctx, testKey))
			require.NoError(t, w.Demand(ctx, testKey, startShim))
			require.NoError(t, w.Stop(ctx, testKey))
			require.NoError(t, w.Remove(ctx, testKey))
			require.Empty(t, w.left())
		})
		t.Run(name+", of a creation that fails", func(t *testing.T) {
			w := newWorld(t)
			ctx := spoil(w, t.Context())
			w.do[declareReady] = func(context.Context) error { return errors.New("not ready") }
			fails := true
			w.undo[attachNetwork] = func() error {
				if fails {
					fails = false
					return errors.New("no luck")
				}
				return nil
			}
			require.NoError(t, w.Create(ctx, testKey, Request{Pod: "ns/pod", Spec: &testSpec{"pod"}}))
			require.ErrorContains(t, w.Start(ctx, testKey), "not ready")
			require.Eventually(t, w.gone, 10*time.Second, time.Millisecond, "the pending cleanup is retried")
			require.Empty(t, w.left())
		})
		t.Run(name+", of a creation that is ended", func(t *testing.T) {
			w := newWorld(t)
			ctx := spoil(w, t.Context())
			running := make(chan struct{})
			w.do[startPause] = func(ctx context.Context) error {
				close(running)
				<-ctx.Done()
				return nil
			}
			require.NoError(t, w.Create(ctx, testKey, Request{Pod: "ns/pod", Spec: &testSpec{"pod"}}))
			started := make(chan error, 1)
			go func() { started <- w.Start(ctx, testKey) }()
			<-running
			require.NoError(t, w.Remove(ctx, testKey))
			require.ErrorIs(t, <-started, errEnded)
			require.Empty(t, w.left())
		})
		t.Run(name+", after a restart", func(t *testing.T) {
			ready := readyWorld(t).restart(t, kept)
			require.NoError(t, ready.Resume(spoil(ready, t.Context()), testKey))
			require.Equal(t, states.Ready, ready.state(t))

			half := interrupted(t, attachNetwork).restart(t, kept)
			require.NoError(t, half.Resume(spoil(half, t.Context()), testKey))
			require.Eventually(t, half.gone, 10*time.Second, time.Millisecond)
			require.Empty(t, half.left())
		})
	}
}

// lines returns the log.
type lines []string

func (lines) Levels() []logrus.Level { return logrus.AllLevels }

func (l *lines) Fire(entry *logrus.Entry) error {
	*l = append(*l, entry.Message)
	return nil
}

func TestPanicsAreLoggedWithWhereTheyCameFrom(t *testing.T) {
	var logged lines
	hooks := logrus.LevelHooks{}
	hooks.Add(&logged)
	before := log.L.Logger.ReplaceHooks(hooks)
	t.Cleanup(func() { log.L.Logger.ReplaceHooks(before) })
	err := Protect(func() error { panic("a bug") })
	require.EqualError(t, err, "panic: a bug: internal")
	require.Len(t, logged, 1)
	require.Contains(t, logged[0], t.Name())
}

// A sandbox whose records make the engine panic is quarantined. Other sandboxes are not affected.
func TestRestoreThatPanics(t *testing.T) {
	old := newWorld(t)
	require.NoError(t, old.run(t))
	old.Close(context.Background())
	other := ledger.Key{Namespace: "k8s.io", ID: "s2"}
	saved := append(old.book.saved(), ledger.Sandbox{Key: other, Records: old.book.saved()[0].Records})
	w := newWorld(t)
	w.node.exists = old.left()
	describe := func(key ledger.Key, spec any) Request {
		if spec != nil && key == testKey {
			panic("a bug")
		}
		return Request{Pod: "ns/pod", Spec: &testSpec{}}
	}
	views, err := Replay(testTable, saved, describe)
	require.NoError(t, err)
	require.Equal(t, states.Quarantined, views[0].State)
	require.Equal(t, states.Ready, views[1].State)
	w.Restore(t.Context(), saved, describe, outsideOf(kept))
	require.Equal(t, states.Quarantined, w.state(t))
	view, err := w.Get(other)
	require.NoError(t, err)
	require.Equal(t, states.Ready, view.State)
	require.NoError(t, w.Remove(t.Context(), testKey))
	require.Empty(t, w.left())
}
