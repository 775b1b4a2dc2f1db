package plugin

import (
	"cmp"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

const (
	// failingFor is how long a pod counts as failing after its last failed creation. The kubelet
	// retries sooner, except after a step that hangs until its deadline, and never for a deleted
	// pod.
	failingFor = 10 * time.Minute
	// maxFailing bounds the pods that are kept. An alert needs no more.
	maxFailing = 1000
)

// failingPods are the pods whose last creation failed. Unlike a count of failures, their number
// tells a node on which pods fail from one bad pod that the kubelet retries forever. The zero value
// is empty. Its methods may be called by many goroutines.
type failingPods struct {
	mu   sync.Mutex
	pods map[string]failedCreation // by namespace/name
}

type failedCreation struct {
	at   time.Time
	step string
}

// moved records a transition: after a rollback its pod is failing, until a creation succeeds. A
// rollback on request, or after a restart, does not count.
func (f *failingPods) moved(view lifecycle.View) {
	last := view.Transitions[len(view.Transitions)-1]
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case last.To == states.Ready:
		delete(f.pods, view.Pod)
	case last.Event == states.RollBack && last.Err != nil && !errdefs.IsAborted(last.Err):
		f.forget(last.At)
		if f.pods == nil {
			f.pods = map[string]failedCreation{}
		}
		if _, known := f.pods[view.Pod]; known || len(f.pods) < maxFailing {
			f.pods[view.Pod] = failedCreation{at: last.At, step: cmp.Or(string(last.Step), "other")}
		}
	}
}

// count returns the number of failing pods by step, with an entry for each step.
func (f *failingPods) count(now time.Time) map[string]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.forget(now)
	counts := map[string]int{"other": 0}
	for _, step := range Steps() {
		counts[string(step.Name)] = 0
	}
	for _, failed := range f.pods {
		counts[failed.step]++
	}
	return counts
}

// forget drops pods that were not retried for [failingFor].
func (f *failingPods) forget(now time.Time) {
	for pod, failed := range f.pods {
		if now.Sub(failed.at) > failingFor {
			delete(f.pods, pod)
		}
	}
}
