package lifecycle

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/states"
)

// claimed returns the claims on record.
func (b *book) claimed() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var all []string
	for _, r := range b.all {
		if r.Kind == ledger.Claimed {
			all = append(all, r.Claim)
		}
	}
	return all
}

func TestClaims(t *testing.T) {
	type act struct {
		claim Claim // to make, or to discard up to
		of    string
		ok    bool
	}
	claim, discard := "claim", "discard"
	for name, tc := range map[string]struct {
		acts   []act
		want   Claim
		record []string
	}{
		"shown, then taken":    {[]act{{Shown, claim, true}, {Taken, claim, true}}, Taken, []string{"shown", "taken"}},
		"taken, then shown":    {[]act{{Taken, claim, true}, {Shown, claim, true}}, Taken, []string{"taken"}},
		"shown again":          {[]act{{Shown, claim, true}, {Shown, claim, true}}, Shown, []string{"shown"}},
		"no claim":             {[]act{{Unclaimed, claim, true}}, Unclaimed, nil},
		"discarded":            {[]act{{Unclaimed, discard, true}, {Shown, claim, false}, {Taken, claim, false}, {Unclaimed, claim, false}}, Discarded, []string{"discarded"}},
		"discarded twice":      {[]act{{Unclaimed, discard, true}, {Unclaimed, discard, true}}, Discarded, []string{"discarded"}},
		"shown, not discarded": {[]act{{Shown, claim, true}, {Unclaimed, discard, false}}, Shown, []string{"shown"}},
		"shown and discarded":  {[]act{{Shown, claim, true}, {Shown, discard, true}}, Discarded, []string{"shown", "discarded"}},
		"taken, not discarded": {[]act{{Taken, claim, true}, {Shown, discard, false}}, Taken, []string{"taken"}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			require.NoError(t, w.run(t))
			for _, a := range tc.acts {
				got := false
				if a.of == claim {
					got = w.Claim(t.Context(), testKey, a.claim)
				} else {
					got = w.Discard(testKey, a.claim)
				}
				require.Equal(t, a.ok, got, "%s %s", a.of, a.claim)
			}
			w.Close(context.Background()) // which waits for the records
			require.Equal(t, tc.record, w.book.claimed())
			w = w.restart(t, kept)
			view, err := w.Get(testKey)
			require.NoError(t, err)
			require.Equal(t, tc.want, view.Claim, "the claim outlives a restart")
		})
	}

	t.Run("unknown", func(t *testing.T) {
		w := newWorld(t)
		require.True(t, w.Claim(t.Context(), testKey, Taken))
		require.False(t, w.Discard(testKey, Shown))
	})

	t.Run("taken is on record at once", func(t *testing.T) {
		w := newWorld(t)
		require.NoError(t, w.run(t))
		require.True(t, w.Claim(t.Context(), testKey, Taken))
		require.Equal(t, []string{"taken"}, w.book.claimed())
	})

	t.Run("counts as taken if records are lost", func(t *testing.T) {
		w := newWorld(t)
		require.NoError(t, w.run(t))
		view, err := w.restart(t, rebooted).Get(testKey)
		require.NoError(t, err)
		require.Equal(t, Taken, view.Claim)
	})

	t.Run("counts as taken with a claim of another release", func(t *testing.T) {
		w := newWorld(t)
		require.NoError(t, w.run(t))
		w.book.records = append(w.book.records, ledger.Record{Kind: ledger.Claimed, Claim: "wanted"})
		view, err := w.restart(t, kept).Get(testKey)
		require.NoError(t, err)
		require.Equal(t, states.Ready, view.State)
		require.Equal(t, Taken, view.Claim)
	})
}

// A sandbox is either shown or discarded, never both.
func TestClaimAndDiscardAtOnce(t *testing.T) {
	w := newWorld(t)
	for range 50 {
		require.NoError(t, w.run(t))
		var shown atomic.Bool
		var discarded bool
		var both sync.WaitGroup
		for range 4 {
			both.Go(func() {
				if w.Claim(t.Context(), testKey, Shown) {
					shown.Store(true)
				}
			})
		}
		both.Go(func() { discarded = w.Discard(testKey, Unclaimed) })
		both.Wait()
		require.NotEqual(t, shown.Load(), discarded)
		require.NoError(t, w.Remove(t.Context(), testKey))
	}
}

func TestSettleWaitsForTheRollbackAfterARestart(t *testing.T) {
	w := interrupted(t, attachNetwork).restart(t, kept)
	reached, release := make(chan struct{}), make(chan struct{})
	w.undo[attachNetwork] = func() error {
		close(reached)
		<-release
		return nil
	}
	require.NoError(t, w.Resume(t.Context(), testKey))
	<-reached
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	require.ErrorIs(t, w.WaitQueued(ctx, testKey), context.DeadlineExceeded)

	settled := make(chan error, 1)
	go func() { settled <- w.WaitQueued(t.Context(), testKey) }()
	close(release)
	require.NoError(t, <-settled)
	require.True(t, w.gone())
	require.NoError(t, w.WaitQueued(t.Context(), testKey), "there is nothing to wait for")
}

func TestNamed(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.Create(t.Context(), testKey, Request{Name: "pod_0", Pod: "ns/pod", Spec: &testSpec{"pod"}}))
	view, ok := w.Named("pod_0")
	require.True(t, ok)
	require.Equal(t, testKey, view.Key)
	_, ok = w.Named("pod_1")
	require.False(t, ok)
	require.NoError(t, w.Remove(t.Context(), testKey))
	_, ok = w.Named("pod_0")
	require.False(t, ok)
}
