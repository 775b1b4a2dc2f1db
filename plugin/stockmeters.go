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

// stockMeters are metrics of containerd's CRI service. The service doesn't set up the networks of
// podfsm's pods, so podfsm counts them there.
type stockMeters struct {
	createNetwork prometheus.Observer // seconds to create a sandbox's network namespace and to attach it to its networks
	deleteNetwork prometheus.Observer // seconds to undo that
}

// findStockMeters looks the metrics up once. containerd registers them when it loads and never
// changes them.
var findStockMeters = sync.OnceValue(func() stockMeters {
	m := stockMeters{}
	found := histograms()
	for name, into := range map[string]*prometheus.Observer{
		"containerd_cri_sandbox_create_network_seconds": &m.createNetwork,
		"containerd_cri_sandbox_delete_network_seconds": &m.deleteNetwork,
	} {
		*into = found[name]
		if *into == nil {
			log.L.WithField("metric", name).Warn("metric of containerd not found, pods are not counted there")
			*into = prometheus.ObserverFunc(func(float64) {})
		}
	}
	return m
})

// histograms returns the histograms without labels in Prometheus' default registry, by name. They
// are the registered ones, so the next scrape shows what is observed on them.
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

// moved counts the network setup and teardown of pods from CRI.
func (m stockMeters) moved(view lifecycle.View) {
	if _, attached := view.Step(AttachNetwork).Result.(*Network); !attached || view.Key.Namespace != cri.Namespace {
		return
	}
	switch view.Transitions[len(view.Transitions)-1].Event {
	case AttachNetwork:
		m.createNetwork.Observe(took(view, lifecycle.OperationDo, CaptureNetNS, AttachNetwork).Seconds())
	case states.FinishStop:
		m.deleteNetwork.Observe(took(view, lifecycle.OperationUndo, CaptureNetNS, AttachNetwork).Seconds())
	}
}

// took returns the total duration of the last tries of the steps.
func took(view lifecycle.View, operation lifecycle.Operation, steps ...states.Event) (sum time.Duration) {
	for _, step := range steps {
		last := time.Duration(0)
		for _, try := range view.Tries {
			if try.Step == step && try.Operation == operation && !try.Ended.IsZero() {
				last = try.Ended.Sub(try.Started)
			}
		}
		sum += last
	}
	return sum
}
