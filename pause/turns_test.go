package pause

import (
	"context"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTurns()
		most := runtime.GOMAXPROCS(0)
		var gives []func()
		for range most {
			gives = append(gives, ts.take(t.Context()))
		}
		var went atomic.Int32
		for range 2 {
			go func() {
				defer ts.take(t.Context())()
				went.Add(1)
				time.Sleep(time.Millisecond)
			}()
		}
		synctest.Wait()
		require.Zero(t, went.Load(), "all turns are taken")
		gives[0]()
		gives[0]() // gives one turn back, however often it is called
		synctest.Wait()
		require.EqualValues(t, 1, went.Load())
		time.Sleep(2 * time.Millisecond)
		require.EqualValues(t, 2, went.Load(), "the turn was passed on")
		for _, give := range gives {
			give()
		}
	})
}

// Runtimes that hang keep nobody for longer than a turn.
func TestTurnsOfThoseThatHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTurns()
		most := runtime.GOMAXPROCS(0)
		for range most {
			ts.take(t.Context())
		}
		begun := time.Now()
		give := ts.take(t.Context())
		require.Equal(t, turnTime, time.Since(begun))
		give()

		begun = time.Now() // all turns are free again
		for range most {
			defer ts.take(t.Context())()
		}
		require.Zero(t, time.Since(begun))
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		ts.take(ended)()
		require.Zero(t, time.Since(begun), "a creation that has ended doesn't wait")
	})
}
