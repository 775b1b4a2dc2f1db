package lifecycle_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/history"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/show"
	"github.com/podfsm/podfsm/states"
)

// The steps that the churn treats by name.
const (
	startPause    states.Event = "start_pause"
	captureNetNS  states.Event = "capture_netns"
	attachNetwork states.Event = "attach_network"
	startShim     states.Event = "start_shim"
)

// churnPod is one pod of the churn, and its failures.
type churnPod struct {
	key      ledger.Key
	lifetime time.Duration
	patience time.Duration // of the caller of Start and of the first Stop; 0 for callers that wait

	fails     states.Event // its Do acts, and then returns an error
	panics    bool         // instead of returning that error
	undoFails states.Event // its Undo fails until heals
	heals     time.Time
	dies      bool // pause exits in the middle of the pod's life
	diesEarly bool // pause exits before the pod is ready
	ill       bool // a check fails

	driven atomic.Bool // its last request was answered

	mu     sync.Mutex
	exists map[states.Event]bool
	exit   *lifecycle.Exit
}

// left says whether the pod has resources on the node.
func (p *churnPod) left() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.exists) > 0
}

var errChurn = fmt.Errorf("no luck: %w", errdefs.ErrUnavailable)

// churnStep takes some milliseconds and only makes an entry in its pod. A step of a killed daemon
// does nothing.
type churnStep struct {
	declared lifecycle.Declaration
	node     *churnNode
	daemon   *churnDaemon
}

func (s *churnStep) Declaration() lifecycle.Declaration { return s.declared }

func (s *churnStep) Reserve(_ context.Context, r *lifecycle.Run) (any, error) {
	if s.declared.Name == captureNetNS {
		return &records.NetNS{Path: "/run/netns/podfsm-" + r.Key.ID}, nil
	}
	return nil, nil
}

func (s *churnStep) Do(ctx context.Context, r *lifecycle.Run) (any, error) {
	p, name := s.node.pod(r.Key), s.declared.Name
	if err := s.act(p, func() { p.exists[name] = true; p.exit = nil }); err != nil {
		return nil, err
	}
	if err := s.work(ctx, p); err != nil {
		return nil, err
	}
	switch {
	case p.fails == name && p.panics:
		panic("a bug in a step")
	case p.fails == name:
		return nil, errChurn
	case p.diesEarly && name == attachNetwork:
		s.node.endPause(p)
	}
	if name == attachNetwork {
		return &records.Network{IP: "10.0.0.2", AdditionalIPs: []string{"fd00::2"}}, r.Announce(ctx, &records.NetNS{Path: "announced"})
	}
	if name == startPause {
		return &records.Pause{Pid: 42, CgroupPath: "/pods/web"}, nil
	}
	return &lifecycle.Skipped{Reason: "nothing to do"}, nil
}

func (s *churnStep) Undo(ctx context.Context, r *lifecycle.Run) error {
	p := s.node.pod(r.Key)
	if err := s.work(ctx, p); err != nil {
		return err
	}
	if p.undoFails == s.declared.Name && time.Now().Before(p.heals) {
		return errChurn
	}
	return s.act(p, func() { delete(p.exists, s.declared.Name) })
}

func (s *churnStep) Probe(_ context.Context, r *lifecycle.Run) (bool, error) {
	p := s.node.pod(r.Key)
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exists[s.declared.Name], nil
}

// work takes as long as a step does on a node, or until ctx ends. For the pod of an impatient
// caller, it takes longer than the caller waits.
func (s *churnStep) work(ctx context.Context, p *churnPod) error {
	took := 15 * time.Millisecond
	if p.patience > 0 && s.declared.Name == attachNetwork {
		took = 2 * p.patience
	}
	timer := time.NewTimer(took)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// act changes the node, unless the daemon was killed.
func (s *churnStep) act(p *churnPod, change func()) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.daemon.dead.Load() {
		return errDead
	}
	change()
	return nil
}

var errDead = errors.New("the daemon was killed")

type churnPause struct{ churnStep }

func (s *churnPause) End(_ context.Context, r *lifecycle.Run) (lifecycle.Exit, error) {
	p, exit := s.node.pod(r.Key), lifecycle.Exit{Code: 137, At: time.Now()}
	err := s.act(p, func() { p.exit = &exit })
	return exit, err
}

func (s *churnPause) Exited(_ context.Context, r *lifecycle.Run) (*lifecycle.Exit, error) {
	p := s.node.pod(r.Key)
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exit, nil
}

type churnNetwork struct{ churnStep }

func (s *churnNetwork) Check(_ context.Context, r *lifecycle.Run) error {
	if s.node.pod(r.Key).ill {
		return errChurn
	}
	return nil
}

// churnDaemon is one run of the daemon: an engine and its open ledger.
type churnDaemon struct {
	*lifecycle.Engine
	ledger *ledger.Ledger
	life   context.Context // ends with the daemon, and so do the calls that wait for it
	exit   context.CancelFunc
	dead   atomic.Bool // by SIGKILL: it writes nothing and does nothing to the node any more
}

func (d *churnDaemon) Append(ctx context.Context, r *ledger.Record) error {
	if d.dead.Load() {
		return errDead
	}
	return d.ledger.Append(ctx, r)
}

func (d *churnDaemon) Forget(ctx context.Context, k ledger.Key) error {
	if d.dead.Load() {
		return errDead
	}
	return d.ledger.Forget(ctx, k)
}

// churnNode is a node without processes, mounts and networks. Its daemon has a real engine, ledger
// and history. The pods themselves record their resources.
type churnNode struct {
	t       *testing.T
	dir     string
	past    *history.File
	daemon  atomic.Pointer[churnDaemon]
	drivers sync.WaitGroup
	driving atomic.Int64 // goroutines that play kubelet

	mu      sync.Mutex
	pods    map[ledger.Key]*churnPod
	entered map[states.State]int // how often
}

func (n *churnNode) steps(d *churnDaemon) (steps []lifecycle.Step) {
	for _, declared := range lifecycle.TestSteps() {
		step := churnStep{declared: declared, node: n, daemon: d}
		switch declared.Name {
		case startPause:
			steps = append(steps, &churnPause{step})
		case attachNetwork:
			steps = append(steps, &churnNetwork{step})
		default:
			steps = append(steps, &step)
		}
	}
	return steps
}

// start opens the ledger and recovers its sandboxes, as a daemon does at its start.
func (n *churnNode) start() {
	log, err := ledger.Open(filepath.Join(n.dir, "root"), filepath.Join(n.dir, "state"))
	require.NoError(n.t, err)
	require.Empty(n.t, log.Damage())
	d := &churnDaemon{ledger: log}
	d.life, d.exit = context.WithCancel(n.t.Context())
	d.Engine, err = lifecycle.New(lifecycle.Config{
		Steps: n.steps(d), Process: startPause, Ledger: d, Backoff: lifecycle.DefaultBackoff, Release: "churn", Observe: n.observe,
	})
	require.NoError(n.t, err)
	d.Restore(n.t.Context(), log.Sandboxes(), request, func(ledger.Sandbox) lifecycle.Outside {
		return lifecycle.Outside{Listed: true, Started: true}
	})
	for _, key := range d.Keys() {
		require.NoError(n.t, d.Resume(n.t.Context(), key))
	}
	n.daemon.Store(d)
}

// observe keeps the history of sandboxes that have ended.
func (n *churnNode) observe(view lifecycle.View) {
	n.mu.Lock()
	n.entered[view.State]++
	n.mu.Unlock()
	if !view.State.Terminal() {
		return
	}
	ended, err := show.Inspection(view)
	if err == nil {
		err = n.past.Add(ended)
	}
	if err != nil {
		n.t.Errorf("failed to keep the history of a sandbox: %v", err)
	}
}

// end ends the daemon, as SIGTERM or SIGKILL does.
func (n *churnNode) end(kill bool) {
	d, ctx := n.daemon.Load(), n.t.Context()
	if kill {
		d.dead.Store(true)
		ended, cancel := context.WithCancel(ctx)
		cancel()
		ctx = ended
	}
	d.Close(ctx)
	d.exit()
	require.NoError(n.t, d.ledger.Close())
}

func (n *churnNode) pod(key ledger.Key) *churnPod {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.pods[key]
}

// sweep forgets the pods that are gone, and returns the number of the others.
func (n *churnNode) sweep() int {
	known := n.daemon.Load().Keys()
	n.mu.Lock()
	defer n.mu.Unlock()
	maps.DeleteFunc(n.pods, func(key ledger.Key, p *churnPod) bool {
		return p.driven.Load() && !p.left() && !slices.Contains(known, key)
	})
	return len(n.pods)
}

func request(key ledger.Key, spec any) lifecycle.Request {
	return lifecycle.Request{Name: "default/" + key.ID, Pod: "default/" + key.ID, Spec: spec}
}

// run drives a pod from creation to removal, as the kubelet does.
func (n *churnNode) run(p *churnPod) {
	n.mu.Lock()
	n.pods[p.key] = p
	n.mu.Unlock()
	n.drive(func() {
		defer p.driven.Store(true)
		if n.makeReady(p) == nil {
			n.drive(func() { n.watch(p) })
			n.use(p)
			n.remove(p)
		}
	})
}

func (n *churnNode) drive(act func()) {
	n.driving.Add(1)
	n.drivers.Go(func() {
		defer n.driving.Add(-1)
		act()
	})
}

// makeReady creates and starts the sandbox. If the start fails, podfsm cleans up by itself.
func (n *churnNode) makeReady(p *churnPod) error {
	spec := &records.Spec{
		Config: &runtime.PodSandboxConfig{
			Metadata: &runtime.PodSandboxMetadata{Name: p.key.ID, Namespace: "default", Uid: "uid-of-" + p.key.ID},
			Labels:   map[string]string{"app": "churn"},
		},
		Handler: "podfsm", Image: "pause", Snapshotter: "overlayfs",
	}
	ctx, cancel := p.caller(n.t.Context())
	defer cancel()
	for n.daemon.Load().Create(ctx, p.key, request(p.key, spec)) != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		time.Sleep(time.Second) // the daemon is being restarted
	}
	if err := n.daemon.Load().Start(ctx, p.key); err != nil {
		return err
	}
	n.daemon.Load().Claim(ctx, p.key, lifecycle.Taken)
	return nil
}

// caller returns the context of a call. The caller of an impatient pod doesn't wait for the answer.
func (p *churnPod) caller(ctx context.Context) (context.Context, context.CancelFunc) {
	if p.patience == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, p.patience)
}

// watch waits for the end of pause through restarts, as containerd's CRI service does.
func (n *churnNode) watch(p *churnPod) {
	for {
		d := n.daemon.Load()
		_, err := d.Wait(d.life, p.key)
		if err == nil || errdefs.IsNotFound(err) {
			return
		}
		time.Sleep(time.Second)
	}
}

// use lets the pod run for its time. Requests may fail in the meantime.
func (n *churnNode) use(p *churnPod) {
	time.Sleep(p.lifetime / 2)
	_ = n.daemon.Load().Demand(n.t.Context(), p.key, startShim)
	_ = n.daemon.Load().Check(n.t.Context(), p.key)
	if p.dies {
		n.endPause(p)
	}
	time.Sleep(p.lifetime / 2)
}

// endPause ends the pod's pause from outside.
func (n *churnNode) endPause(p *churnPod) {
	exit := lifecycle.Exit{Code: 1, At: time.Now()}
	p.mu.Lock()
	p.exit = &exit
	p.mu.Unlock()
	n.daemon.Load().PauseExited(p.key, exit)
}

// remove stops and removes the pod, as often as needed.
func (n *churnNode) remove(p *churnPod) {
	ctx, cancel := p.caller(n.t.Context())
	_ = n.daemon.Load().Stop(ctx, p.key)
	cancel()
	for _, call := range []func(*churnDaemon) error{
		func(d *churnDaemon) error { return d.Stop(n.t.Context(), p.key) },
		func(d *churnDaemon) error { return d.Remove(n.t.Context(), p.key) },
	} {
		for {
			err := call(n.daemon.Load())
			if err == nil || errdefs.IsNotFound(err) {
				break
			}
			time.Sleep(time.Minute)
		}
	}
}
