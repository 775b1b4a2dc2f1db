package plugin

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"

	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/tracing"
)

// podTasks are the tasks of containers in podfsm's pods. The task API of a shim is told to shut down after each task that is deleted, and a
// shim does so when it has no other one. A stock pod's has pause; ours would be on its way out while the next container is about to start
// in it. So the tasks of one pod are made and deleted one at a time, and who deletes the last one sees the shim's end through.
type podTasks struct {
	mu   sync.Mutex
	pods map[journal.Key]*podTask
}

// podTask is one pod's.
type podTask struct {
	turn  chan struct{} // is full while somebody has the turn
	users int           // who has the turn, or waits for it; behind podTasks.mu

	tasks map[string]bool // by container; of who has the turn
}

// shimEndTimeout bounds the end of a shim without containers, for which containerd gives it 5 s.
const shimEndTimeout = 10 * time.Second

// enter waits for the turn of a pod.
func (p *podTasks) enter(ctx context.Context, key journal.Key) (pod *podTask, leave func(), err error) {
	p.mu.Lock()
	if p.pods == nil {
		p.pods = map[journal.Key]*podTask{}
	}
	pod, ok := p.pods[key]
	if !ok {
		pod = &podTask{turn: make(chan struct{}, 1), tasks: map[string]bool{}}
		p.pods[key] = pod
	}
	pod.users++
	p.mu.Unlock()
	release := func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if pod.users--; pod.users == 0 && len(pod.tasks) == 0 {
			delete(p.pods, key)
		}
	}
	select {
	case pod.turn <- struct{}{}:
		return pod, func() { <-pod.turn; release() }, nil
	case <-ctx.Done():
		release()
		return nil, nil, fmt.Errorf("another container of sandbox %q is being started or deleted: %w", key.ID, context.Cause(ctx))
	}
}

// settle ends the shim of a pod that has no tasks. The next container gets another.
func (c *Controller) settle(ctx context.Context, key journal.Key, pod *podTask) {
	if len(pod.tasks) > 0 {
		return
	}
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.WithoutCancel(ctx), key.Namespace), shimEndTimeout)
	defer cancel()
	if err := c.node.shims.End(ctx, key.ID); err != nil {
		log.G(ctx).WithError(err).WithField(tracing.LogSandbox, key.ID).
			Warn("podfsm: failed to end the shim of a pod without containers; the stop of the pod tries again")
	}
}

// restoreTasks finds the tasks that an earlier daemon has made.
func (c *Controller) restoreTasks(ctx context.Context) error {
	for namespace := range namespacesOf(c.engine.Keys()) {
		ctx := namespaces.WithNamespace(ctx, namespace)
		all, err := c.node.client.ContainerService().List(ctx)
		if err != nil {
			return fmt.Errorf("failed to list containerd's containers: %w", err)
		}
		for _, record := range all {
			key := journal.Key{Namespace: namespace, ID: record.SandboxID}
			if c.engine.Created(key).IsZero() || !c.node.shims.Running(ctx, record.ID) {
				continue
			}
			pod, leave, err := c.tasks.enter(ctx, key)
			if err != nil {
				return err
			}
			pod.tasks[record.ID] = true
			leave()
		}
	}
	return nil
}

func namespacesOf(keys []journal.Key) map[string]bool {
	all := map[string]bool{}
	for _, key := range keys {
		all[key.Namespace] = true
	}
	return all
}
