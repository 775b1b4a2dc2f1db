package plugin

import (
	"maps"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/lifecycle"
)

// recoveryOutcomes records the outcomes of the last recovery, and passes events of the engine on to Meter.
// Its methods may be called by many goroutines.
type recoveryOutcomes struct {
	lifecycle.Meter

	mu       sync.Mutex
	started  time.Time
	took     time.Duration
	outcomes map[string]uint32
}

// time measures recover, the part of recovery that containerd's start waits for.
func (r *recoveryOutcomes) time(recover func() error) error {
	started := time.Now()
	err := recover()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.started, r.took = started, time.Since(started)
	return err
}

// Recovered implements lifecycle.Meter.
func (r *recoveryOutcomes) Recovered(outcome lifecycle.Recovery, took time.Duration) {
	r.Meter.Recovered(outcome, took)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.outcomes == nil {
		r.outcomes = map[string]uint32{}
	}
	r.outcomes[string(outcome)]++
}

// status returns the recovery in API form, nil before the measured part has ended.
func (r *recoveryOutcomes) status() *podfsmv1.Recovery {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.started.IsZero() {
		return nil
	}
	return &podfsmv1.Recovery{
		StartedAt: timestamppb.New(r.started), Duration: durationpb.New(r.took.Round(time.Microsecond)), Outcomes: maps.Clone(r.outcomes),
	}
}
