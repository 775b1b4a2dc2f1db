package faults

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv("FAULTS_TEST_DIE") != "" {
		_ = Hit(context.Background(), "step")
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func TestProgram(t *testing.T) {
	for _, tc := range []struct {
		text string
		want []string // kinds of the first hits
	}{
		{"", []string{"off", "off"}},
		{"off", []string{"off"}},
		{"error(a (nested) text)", []string{"error", "error"}},
		{"2*error(x)", []string{"error", "error", "off"}},
		{"1*error(x)->1*delay(5)->block", []string{"error", "delay", "block", "block"}},
		{"1*off->die", []string{"off", "die"}},
		{"1*error(a->b)->off", []string{"error", "off"}},
	} {
		t.Run(tc.text, func(t *testing.T) {
			p, err := parse(tc.text)
			require.NoError(t, err)
			for i, want := range tc.want {
				require.Equal(t, want, p.at(i+1).kind, "hit %d", i+1)
			}
		})
	}

	p, err := parse("1*error(a (b): c)->delay(1500)")
	require.NoError(t, err)
	require.Equal(t, "a (b): c", p.at(1).text)
	require.Equal(t, 1500*time.Millisecond, p.at(2).delay)
}

func TestProgramRefused(t *testing.T) {
	for _, text := range []string{"fail", "0*block", "error", "delay(x)", "block->", "error(x) ->off", "-1*off", "block;off", "delay(99999999999999999999)"} {
		t.Run(text, func(t *testing.T) {
			require.ErrorIs(t, Dir(t.TempDir()).Set("step", text), errdefs.ErrInvalidArgument)
		})
	}
}

func TestHitWithoutControlDirectory(t *testing.T) {
	t.Setenv(Env, "")
	require.NoError(t, Hit(t.Context(), "step"))
}

func TestHitCountsAndFails(t *testing.T) {
	d := Dir(t.TempDir())
	t.Setenv(Env, string(d))
	require.NoError(t, Hit(t.Context(), "step"), "no program yet")

	require.NoError(t, d.Set("step", "1*off->1*error(disk is full)"))
	require.NoError(t, Hit(t.Context(), "step"))
	require.EqualError(t, Hit(t.Context(), "step"), "disk is full")
	require.NoError(t, Hit(t.Context(), "step"))
	require.NoError(t, Hit(t.Context(), "other"))

	hits, err := d.Hits("step")
	require.NoError(t, err)
	require.Equal(t, 3, hits)
	points, err := d.Points()
	require.NoError(t, err)
	require.Equal(t, []string{"step"}, points)

	require.NoError(t, d.Set("step", "1*error(again)"))
	require.EqualError(t, Hit(t.Context(), "step"), "again", "Set starts anew")
	require.NoError(t, d.Clear("step"))
	require.NoError(t, Hit(t.Context(), "step"))
}

func TestBlockUntilReleased(t *testing.T) {
	for _, tc := range []struct {
		name    string
		release func(Dir) error
	}{
		{"released", func(d Dir) error { return d.Release("step") }},
		{"cleared", func(d Dir) error { return d.Clear("step") }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := Dir(t.TempDir())
			require.NoError(t, d.Set("step", "block"))
			passed := make(chan error, 1)
			go func() { passed <- d.Hit(t.Context(), "step") }()

			require.NoError(t, d.WaitReached(t.Context(), "step", 1))
			select {
			case err := <-passed:
				t.Fatalf("went on before its release: %v", err)
			case <-time.After(10 * pollInterval):
			}
			require.NoError(t, tc.release(d))
			require.NoError(t, <-passed)
		})
	}
}

func TestWaitsEndWithTheirContext(t *testing.T) {
	d := Dir(t.TempDir())
	ctx, cancel := context.WithTimeout(t.Context(), 5*pollInterval)
	defer cancel()
	require.NoError(t, d.Set("blocked", "block"))
	require.NoError(t, d.Set("slow", "delay(60000)"))

	require.ErrorIs(t, d.Hit(ctx, "blocked"), context.DeadlineExceeded)
	require.ErrorIs(t, d.Hit(ctx, "slow"), context.DeadlineExceeded)
	err := d.WaitReached(ctx, "blocked", 2)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, `"blocked" was reached 1 times, not 2`)
}

func TestConcurrentHitsAreCountedOnce(t *testing.T) {
	d := Dir(t.TempDir())
	require.NoError(t, d.Set("step", "5*error(x)"))
	var (
		wg     sync.WaitGroup
		mu     sync.Mutex
		failed int
	)
	for range 20 {
		wg.Go(func() {
			if d.Hit(t.Context(), "step") != nil {
				mu.Lock()
				failed++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	require.Equal(t, 5, failed)
}

func TestDie(t *testing.T) {
	d := Dir(t.TempDir())
	require.NoError(t, d.Set("step", "die"))
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), "FAULTS_TEST_DIE=1", Env+"="+string(d))

	err := cmd.Run()
	require.Error(t, err)
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	require.True(t, status.Signaled() && status.Signal() == syscall.SIGKILL, strings.TrimSpace(cmd.ProcessState.String()))
	hits, err := d.Hits("step")
	require.NoError(t, err)
	require.Equal(t, 1, hits, "the hit is on record before the process dies")
}
