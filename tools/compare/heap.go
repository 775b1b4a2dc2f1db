package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/podfsm/podfsm/integration/harness"
)

const (
	// firstStarts is the number of failed starts before the first reading of the heap: some of what
	// they leave is bounded.
	firstStarts = 140
	moreStarts  = 160
	// heapNoise is how much two readings of the heap may differ without a reason, in bytes.
	heapNoise = 64 << 10
)

// heapOfFailedStarts returns the growth of the heap per failed start.
func heapOfFailedStarts(ctx context.Context, handler string) (_ string, err error) {
	n, err := harness.NewNode(ctx, harness.Config{TOML: "debug.level = 'warn'"})
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, n.Close(context.WithoutCancel(ctx))) }()
	// Without a subscriber containerd's service keeps the events of all pods for five minutes.
	events, err := n.Events(ctx)
	if err != nil {
		return "", err
	}
	defer events.Close()
	if err := n.Fault("bridge.ADD", "error(no luck)"); err != nil {
		return "", err
	}
	if err := failStarts(ctx, n, handler, firstStarts); err != nil {
		return "", err
	}
	early, err := n.Memory(ctx)
	if err != nil {
		return "", err
	}
	if err := failStarts(ctx, n, handler, moreStarts); err != nil {
		return "", err
	}
	late, err := n.Memory(ctx)
	if err != nil {
		return "", err
	}
	grown := late.Heap - early.Heap
	if grown < heapNoise {
		return "nothing", nil
	}
	return fmt.Sprintf("%.1f KiB of memory per start", float64(grown)/moreStarts/1024), nil
}

func failStarts(ctx context.Context, n *harness.Node, handler string, starts int) error {
	const parallel = 6
	var done atomic.Int64
	errs := make([]error, parallel)
	var workers sync.WaitGroup
	for i := range parallel {
		workers.Go(func() {
			for done.Add(1) <= int64(starts) && errs[i] == nil {
				config := n.PodConfig(fmt.Sprint("pod-", pods.Add(1)))
				if pod, err := n.RunPod(ctx, handler, config); err == nil {
					errs[i] = fmt.Errorf("pod %q has started", pod.ID)
				}
			}
		})
	}
	workers.Wait()
	return errors.Join(errs...)
}

var pods atomic.Int64 // that were made for failStarts
