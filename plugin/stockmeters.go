package plugin

import (
	"strings"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

// stockMeters are metrics of containerd's CRI service that podfsm counts its pods in, because that service doesn't make and remove
// their networks.
type stockMeters struct {
	createNetwork prometheus.Observer // seconds to make a sandbox's network namespace and to attach it
	deleteNetwork prometheus.Observer // seconds to undo that
}

// findStockMeters finds them once: containerd registers them when it is loaded, and never again.
var findStockMeters = sync.OnceValue(func() stockMeters {
	m := stockMeters{}
	found := histograms()
	for name, into := range map[string]*prometheus.Observer{
		"containerd_cri_sandbox_create_network_seconds": &m.createNetwork,
		"containerd_cri_sandbox_delete_network_seconds": &m.deleteNetwork,
	} {
		*into = found[name]
		if *into == nil {
			log.L.Warnf("podfsm: containerd has no metric %q, which podfsm's pods would be counted in", name)
			*into = prometheus.ObserverFunc(func(float64) {})
		}
	}
	return m
})

// histograms are those without labels of Prometheus' default registry, by their names. The registry hands out the histograms
// themselves, so that what is observed is in the next scrape.
func histograms() map[string]prometheus.Observer {
	registry, ok := prometheus.DefaultRegisterer.(prometheus.Collector)
	if !ok {
		return nil
	}
	metrics := make(chan prometheus.Metric)
	go func() {
		defer close(metrics)
		registry.Collect(metrics)
	}()
	found := map[string]prometheus.Observer{}
	for metric := range metrics {
		if histogram, ok := metric.(prometheus.Histogram); ok {
			_, name, _ := strings.Cut(metric.Desc().String(), `fqName: "`)
			name, _, _ = strings.Cut(name, `"`)
			found[name] = histogram
		}
	}
	return found
}

// moved counts the networks of pods that came by CRI.
func (m stockMeters) moved(view lifecycle.View) {
	if _, attached := view.Step(AttachNetwork).Result.(*Network); !attached || view.Key.Namespace != cri.Namespace {
		return
	}
	switch view.Transitions[len(view.Transitions)-1].Event {
	case AttachNetwork:
		m.createNetwork.Observe(took(view, lifecycle.ActDo, CaptureNetNS, AttachNetwork).Seconds())
	case states.FinishStop:
		m.deleteNetwork.Observe(took(view, lifecycle.ActUndo, CaptureNetNS, AttachNetwork).Seconds())
	}
}

// took is how long the last try at each of some steps took, in all.
func took(view lifecycle.View, kind lifecycle.ActKind, steps ...states.Event) (sum time.Duration) {
	for _, step := range steps {
		last := time.Duration(0)
		for _, act := range view.Acts {
			if act.Step == step && act.Kind == kind && !act.Ended.IsZero() {
				last = act.Ended.Sub(act.Started)
			}
		}
		sum += last
	}
	return sum
}
