package plugin

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/tracing"
)

// podTasks serializes the creation and deletion of tasks per pod. containerd tells a shim to shut
// down after each deleted task, and a shim without other tasks obeys. The shim of a stock pod
// always has pause; the shim of a podfsm pod could exit while the next container is about to start
// in it. So tasks of one pod are created and deleted one at a time, and the deletion of the last
// task waits for the shim's end.
type podTasks struct {
	mu   sync.Mutex
	pods map[ledger.Key]*podTask
}

// podTask holds the lock and the tasks of one pod.
type podTask struct {
	lock  chan struct{} // full while locked; a channel, so that waiting can be canceled
	users int           // that hold the lock or wait for it; guarded by podTasks.mu

	tasks map[string]bool // by container; guarded by lock
}

// shimEndTimeout bounds the end of a shim without containers. containerd gives the shim 5 s.
const shimEndTimeout = 10 * time.Second

// enter locks a pod's tasks. The caller unlocks them with leave.
func (p *podTasks) enter(ctx context.Context, key ledger.Key) (pod *podTask, leave func(), err error) {
	p.mu.Lock()
	if p.pods == nil {
		p.pods = map[ledger.Key]*podTask{}
	}
	pod, ok := p.pods[key]
	if !ok {
		pod = &podTask{lock: make(chan struct{}, 1), tasks: map[string]bool{}}
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
	case pod.lock <- struct{}{}:
		return pod, func() { <-pod.lock; release() }, nil
	case <-ctx.Done():
		release()
		return nil, nil, fmt.Errorf("waiting for another container of sandbox %q to start or to be deleted: %w", key.ID, context.Cause(ctx))
	}
}

// endIdleShim ends the shim of a pod without tasks. The next container gets a new shim.
func (c *Controller) endIdleShim(ctx context.Context, key ledger.Key, pod *podTask) {
	if len(pod.tasks) > 0 {
		return
	}
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.WithoutCancel(ctx), key.Namespace), shimEndTimeout)
	defer cancel()
	if err := c.node.shims.End(ctx, key.ID); err != nil {
		log.G(ctx).WithError(err).WithField(tracing.LogSandbox, key.ID).
			Warn("failed to end the shim of a pod without containers, the stop of the pod will retry")
	}
}

// restoreTasks restores the tasks that an earlier daemon made.
func (c *Controller) restoreTasks(ctx context.Context) error {
	for namespace := range namespacesOf(c.engine.Keys()) {
		ctx := namespaces.WithNamespace(ctx, namespace)
		all, err := c.node.client.ContainerService().List(ctx)
		if err != nil {
			return fmt.Errorf("failed to list containerd's containers: %w", err)
		}
		for _, record := range all {
			key := ledger.Key{Namespace: namespace, ID: record.SandboxID}
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

func namespacesOf(keys []ledger.Key) map[string]bool {
	all := map[string]bool{}
	for _, key := range keys {
		all[key.Namespace] = true
	}
	return all
}
