package plugin

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/snapshot/remapping"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/userns"
)

// gathered are the values of a metric by the values of its labels, in the order of their names; of a histogram the number of its values.
func gathered(t *testing.T, c prometheus.Collector, name string) map[string]float64 {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	require.NoError(t, registry.Register(c))
	families, err := registry.Gather()
	require.NoError(t, err)
	values := map[string]float64{}
	for _, family := range families {
		if family.GetName() != "podfsm_"+name {
			continue
		}
		for _, m := range family.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetValue())
			}
			value := m.GetGauge().GetValue() + m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
			if value != 0 {
				values[strings.Join(labels, " ")] = value
			}
		}
	}
	return values
}

func TestMetersOfPods(t *testing.T) {
	w := newWorld(t)
	w.run(t, "a")
	w.run(t, "b", named("other"), func(c *runtime.PodSandboxConfig) {
		c.Metadata.Uid = "u-2"
		options(c).UsernsOptions.Uids[0].HostId, options(c).UsernsOptions.Gids[0].HostId = 65536*9, 65536*9
	})
	w.host.fail(CaptureNetNS, errNoLuck)
	require.Error(t, w.Stop(inCRI(t), "a"))

	require.Equal(t, map[string]float64{"Ready": 1, "CleanupOwed": 1}, gathered(t, w.meters, "sandboxes"))
	require.Equal(t, map[string]float64{"capture_netns": 1}, gathered(t, w.meters, "pending_cleanups"))
	require.Equal(t, map[string]float64{"idmap": 2}, gathered(t, w.meters, "remaps_total"))
	require.Equal(t, map[string]float64{"unavailable undo capture_netns": 1}, gathered(t, w.meters, "step_errors_total"))
	done := gathered(t, w.meters, "step_duration_seconds")
	for _, step := range creationPath() {
		require.EqualValues(t, 2, done["do ok "+string(step)], "%v", done)
	}
	require.EqualValues(t, 1, done["stop ok start_pause"])
	require.EqualValues(t, 1, done["undo error capture_netns"])
	require.Empty(t, gathered(t, w.meters, "id_ranges"), "there is no pool")
	require.Empty(t, gathered(t, w.meters, "degraded"))
	require.Empty(t, gathered(t, w.meters, "draining"))
	w.host.heal(CaptureNetNS)
}

func TestMetersOfADegradedController(t *testing.T) {
	c := &Controller{}
	c.meters = newMeters(c)
	c.refuse(errNoLuck)
	require.Equal(t, map[string]float64{"": 1}, gathered(t, c.meters, "degraded"))
	require.Empty(t, gathered(t, c.meters, "sandboxes"))
}

func TestMetersOfThePool(t *testing.T) {
	pool, err := userns.OpenPool("test", userns.Ranges{
		UIDs: []userns.Extent{{First: 1 << 20, Size: 3 * userns.RangeSize}}, GIDs: []userns.Extent{{First: 1 << 20, Size: 3 * userns.RangeSize}},
	}, filepath.Join(t.TempDir(), "history"))
	require.NoError(t, err)
	c := &Controller{node: &node{ids: userns.New(nil, pool)}}
	c.meters = newMeters(c)
	require.Equal(t, map[string]float64{"quarantined": 3}, gathered(t, c.meters, "id_ranges"))
}

// images is a snapshotter that has remapped some.
type images map[remapping.Strategy]remapping.Totals

func (i images) Totals() map[remapping.Strategy]remapping.Totals { return i }

func TestMetersOfRemaps(t *testing.T) {
	c := &Controller{remapper: images{remapping.Metacopy: {Layers: 2, Work: remapping.Work{Inodes: 30, Bytes: 4000, Took: 1500 * time.Millisecond}}}}
	c.meters = newMeters(c)
	for metric, want := range map[string]float64{"remap_layers_total": 2, "remap_inodes_total": 30, "remap_bytes_total": 4000, "remap_seconds_total": 1.5} {
		require.Equal(t, map[string]float64{"metacopy": want}, gathered(t, c.meters, metric))
	}
}

// Plugins and networks come from files that anything on the node may write.
func TestLabelsOfPluginsAreBounded(t *testing.T) {
	m := newMeters(&Controller{})
	for i := range 10 * maxPlugins {
		m.ran(cni.Command{Name: "ADD", Plugin: "bridge", Network: fmt.Sprint("net", i)})
	}
	m.ran(cni.Command{Name: "DEL", Plugin: "not\xffUTF-8", Network: "net0", Err: errNoLuck})
	values := gathered(t, m, "cni_command_duration_seconds")
	require.Len(t, values, maxPlugins+2)
	require.EqualValues(t, 9*maxPlugins, values["ADD other ok other"])
	require.EqualValues(t, 1, values["DEL other error other"])
}

// fullBook is a ledger that can't write.
type fullBook struct{ book }

func (*fullBook) Append(context.Context, *ledger.Record) error { return errNoLuck }

func TestMetersOfTheLedger(t *testing.T) {
	m := newMeters(&Controller{})
	good, bad := timedLedger{&book{forgotten: map[ledger.Key]bool{}}, m}, timedLedger{&fullBook{}, m}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	require.NoError(t, good.Append(t.Context(), &ledger.Record{}))
	require.NoError(t, good.Append(t.Context(), &ledger.Record{Durable: true}))
	require.NoError(t, good.Append(t.Context(), &ledger.Record{Durable: true, CanWait: true}))
	require.NoError(t, good.Forget(t.Context(), ledger.Key{}))
	require.Error(t, bad.Append(t.Context(), &ledger.Record{}))
	require.Error(t, bad.Append(gone, &ledger.Record{}))
	require.Equal(t, map[string]float64{"durable ok": 2, "log ok": 2, "log error": 1, "log canceled": 1}, gathered(t, m, "ledger_write_duration_seconds"))
}

// What has no class must not become a label: it could be any type of any package.
func TestErrorTypesAreBounded(t *testing.T) {
	w := newWorld(t)
	for i, err := range []error{errors.New("plain"), fmt.Errorf("typed: %w", &testError{}), errdefs.ErrNotFound} {
		w.host.do[AttachNetwork] = func(context.Context, string) error { return err }
		id := fmt.Sprint("p", i)
		require.NoError(t, w.create(t, id, named(id)))
		_, err := w.Start(inCRI(t), id)
		require.Error(t, err)
	}
	require.Equal(t, map[string]float64{"other do attach_network": 2, "not_found do attach_network": 1}, gathered(t, w.meters, "step_errors_total"))
	require.Equal(t, map[string]float64{"attach_network": 3}, gathered(t, w.meters, "failing_pods"))
}

type testError struct{}

func (*testError) Error() string { return "odd" }

func TestMeterOfADrain(t *testing.T) {
	c := &Controller{}
	c.meters = newMeters(c)
	require.NoError(t, c.drain.open(t.TempDir()))
	require.Empty(t, gathered(t, c.meters, "draining"))
	require.NoError(t, c.drain.begin(t.Context()))
	require.Equal(t, map[string]float64{"": 1}, gathered(t, c.meters, "draining"))
}

func TestMeterOfLeaks(t *testing.T) {
	m := newMeters(&Controller{})
	require.False(t, exposed(t, m, "leaks"), "no search was run")
	m.leaked(0)
	require.True(t, exposed(t, m, "leaks"))
	m.leaked(2)
	require.Equal(t, map[string]float64{"": 2}, gathered(t, m, "leaks"))
}

// exposed says whether a scrape has the metric.
func exposed(t *testing.T, c prometheus.Collector, name string) bool {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	require.NoError(t, registry.Register(c))
	families, err := registry.Gather()
	require.NoError(t, err)
	return slices.ContainsFunc(families, func(f *dto.MetricFamily) bool { return f.GetName() == "podfsm_"+name })
}

func TestMeterOfTheBuild(t *testing.T) {
	built := gathered(t, newMeters(&Controller{}), "build_info")
	require.Len(t, built, 1)
	for labels := range built {
		require.Regexp(t, `^\S+ go1\.\S+ \S+ \S+$`, labels)
	}
}

// A count of failures can't tell one bad pod from a bad node.
func TestFailingPods(t *testing.T) {
	begun := time.Now()
	var f failingPods
	move := func(pod string, after time.Duration, last lifecycle.Transition) {
		last.At = begun.Add(after)
		f.moved(lifecycle.View{Pod: pod, Transitions: []lifecycle.Transition{last}})
	}
	failed := lifecycle.Transition{Event: states.RollBack, To: states.RollingBack, Step: AttachNetwork, Err: errNoLuck}
	count := func(after time.Duration) map[string]int {
		counts := f.count(begun.Add(after))
		maps.DeleteFunc(counts, func(_ string, pods int) bool { return pods == 0 })
		return counts
	}
	require.Len(t, f.count(begun), len(Steps())+1)
	for range 5 {
		move("default/bad", 0, failed)
	}
	require.Equal(t, map[string]int{"attach_network": 1}, count(0), "the kubelet retries one pod")
	move("default/other", time.Minute, failed)
	move("default/lost", time.Minute, lifecycle.Transition{Event: states.RollBack, To: states.RollingBack, Err: errNoLuck})
	require.Equal(t, map[string]int{"attach_network": 2, "other": 1}, count(time.Minute))

	move("default/other", 2*time.Minute, lifecycle.Transition{Event: DeclareReady, To: states.Ready})
	require.Equal(t, map[string]int{"attach_network": 1, "other": 1}, count(2*time.Minute), "its retry went well")
	move("default/ended", 3*time.Minute, lifecycle.Transition{Event: states.RollBack, To: states.RollingBack, Err: errdefs.ErrAborted})
	move("default/restart", 3*time.Minute, lifecycle.Transition{Event: states.RollBack, To: states.RollingBack})
	require.Equal(t, map[string]int{"attach_network": 1, "other": 1}, count(3*time.Minute), "the creation was ended on request")
	require.Equal(t, map[string]int{"other": 1}, count(failingFor+time.Second), "the other was not retried")

	for i := range 2 * maxFailing {
		move(fmt.Sprint("default/", i), time.Hour, failed)
	}
	require.Equal(t, map[string]int{"attach_network": maxFailing}, count(time.Hour))
}

// Every metric has the form that Prometheus asks for.
func TestMetricNames(t *testing.T) {
	descs := make(chan *prometheus.Desc, 100)
	newMeters(&Controller{}).Describe(descs)
	close(descs)
	for d := range descs {
		text := d.String()
		require.Regexp(t, `fqName: "podfsm_[a-z_]+"`, text)
		require.Regexp(t, `help: "[A-Z].*\."`, text)
	}
}
