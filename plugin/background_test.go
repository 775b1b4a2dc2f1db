package plugin

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/plugin"
	"github.com/stretchr/testify/require"
)

// Work for no caller waits until containerd has taken up its own pods, but never for long.
func TestBackgroundWaitsForContainerd(t *testing.T) {
	// serve has the CRI service of containerd loaded, which serves after so long.
	serve := func(after time.Duration) func(*testing.T, *Controller) {
		return func(t *testing.T, c *Controller) {
			told := false
			ic := plugin.NewContext(t.Context(), plugin.NewPluginSet(), nil)
			ic.RegisterReadiness = func() func() { return func() { told = true } }
			ready := c.watching(ic).RegisterReadiness()
			time.AfterFunc(after, func() {
				ready()
				require.True(t, told, "containerd hears of it, too")
			})
			c.background.loaded()
		}
	}
	for _, tt := range []struct {
		name string
		load func(*testing.T, *Controller)
		want time.Duration
	}{
		{"the CRI service serves at once", serve(0), 0},
		{"the CRI service serves late", serve(10 * time.Second), 10 * time.Second},
		{"the CRI service hangs", serve(time.Hour), quietTime},
		{"no CRI service is loaded", func(_ *testing.T, c *Controller) { c.background.loaded() }, 0},
		{"containerd loads no more plugins", func(*testing.T, *Controller) {}, quietTime},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.run(t, "pod", named("pod"))
				begun := time.Now()
				var released, checked time.Duration = -1, -1
				w.background.release = func() { released = time.Since(begun) }
				w.host.check = func(context.Context, string) error { checked = time.Since(begun); return nil }
				w.startBackground()
				tt.load(t, w.Controller)
				time.Sleep(2 * time.Hour) // also the last timer of the case
				require.Equal(t, tt.want, released)
				require.Equal(t, tt.want, checked)
				require.NoError(t, w.Close())
			})
		})
	}
}

// A stop of containerd ends the wait, and nothing begins.
func TestBackgroundEndsWithContainerd(t *testing.T) {
	w := newWorld(t)
	w.run(t, "pod", named("pod"))
	w.background.release = func() { t.Error("released") }
	w.host.check = func(context.Context, string) error { t.Error("checked"); return nil }
	w.startBackground()
	require.NoError(t, w.Close())
}

// A controller without an engine still examines the node, and a panic ends no containerd.
func TestBackgroundOfADegradedController(t *testing.T) {
	c := &Controller{}
	c.startBackground()
	c.background.end()
	c.background.work.Wait()
	require.NoError(t, c.Close())
	require.NotPanics(t, func() { protected("this", func() { panic("no") }) })
}
