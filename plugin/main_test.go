package plugin

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/events/exchange"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	gocni "github.com/containerd/go-cni"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/history"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/pause"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/userns"
)

// creationPath are the names of the steps that lead to Ready.
func creationPath() (path []states.Event) {
	for _, step := range Steps() {
		if !step.OnDemand {
			path = append(path, step.Name)
		}
	}
	return path
}

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreCurrent(),
		goleak.IgnoreTopFunction("github.com/docker/go-events.(*Broadcaster).run")) // containerd's event exchange has no end
}

// podConfig is a pod with its own user namespace, changed as a test likes.
func podConfig(change ...func(*runtime.PodSandboxConfig)) *runtime.PodSandboxConfig {
	config := &runtime.PodSandboxConfig{
		Metadata: &runtime.PodSandboxMetadata{Name: "web", Namespace: "default", Uid: "u-1", Attempt: 2},
		Linux: &runtime.LinuxPodSandboxConfig{SecurityContext: &runtime.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtime.NamespaceOption{
				Pid: runtime.NamespaceMode_CONTAINER,
				UsernsOptions: &runtime.UserNamespace{
					Mode: runtime.NamespaceMode_POD,
					Uids: []*runtime.IDMapping{{HostId: 131072, Length: 65536}},
					Gids: []*runtime.IDMapping{{HostId: 131072, Length: 65536}},
				},
			},
		}},
	}
	for _, c := range change {
		c(config)
	}
	return config
}

func options(config *runtime.PodSandboxConfig) *runtime.NamespaceOption {
	return config.GetLinux().GetSecurityContext().GetNamespaceOptions()
}

func named(name string) func(*runtime.PodSandboxConfig) {
	return func(config *runtime.PodSandboxConfig) { config.Metadata.Name = name }
}

// stockWith is containerd's configuration with three handlers, of which "podfsm" is podfsm's.
func stockWith(change ...func(*stockConfig)) *stockConfig {
	stock := &stockConfig{}
	stock.Containerd.DefaultRuntimeName = "runc"
	stock.Containerd.Runtimes = map[string]handler{
		"runc":   {Type: "io.containerd.runc.v2", Sandboxer: "podsandbox"},
		"podfsm": {Type: "io.containerd.runc.v2", Sandboxer: Name},
		"kata":   {Type: "io.containerd.kata.v2", Sandboxer: "shim"},
	}
	stock.CNI.ConfDir = "/etc/cni/net.d"
	stock.image.Snapshotter = "overlayfs"
	stock.image.PinnedImages = map[string]string{"sandbox": "registry.example/pause:3.10.1"}
	for _, c := range change {
		c(stock)
	}
	return stock
}

// book is a ledger that keeps nothing itself, and can be told to fail or to wait. As the real one, it takes no records of a sandbox that
// was forgotten.
type book struct {
	mu        sync.Mutex
	before    func(r *ledger.Record) error
	forgotten map[ledger.Key]bool
	into      *ledger.Ledger // keeps the records all the same; nil for none
}

func (b *book) Append(ctx context.Context, r *ledger.Record) error {
	b.mu.Lock()
	before, forgotten := b.before, b.forgotten[r.Key]
	b.mu.Unlock()
	if forgotten {
		return fmt.Errorf("the sandbox was not begun or has been forgotten: %w", errdefs.ErrNotFound)
	}
	if before != nil {
		if err := before(r); err != nil {
			return err
		}
	}
	if b.into != nil {
		return b.into.Append(ctx, r)
	}
	return nil
}

func (b *book) Forget(_ context.Context, k ledger.Key) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.forgotten[k] = true
	return nil
}

// waitAt makes the ledger wait before it takes the next record of a kind: reached is closed then, until release is.
func (b *book) waitAt(kind ledger.Kind) (reached, release chan struct{}) {
	reached, release = make(chan struct{}), make(chan struct{})
	b.mu.Lock()
	defer b.mu.Unlock()
	b.before = func(r *ledger.Record) error {
		if r.Kind == kind {
			close(reached)
			<-release
		}
		return nil
	}
	return reached, release
}

// fakeHost is the world that the steps of a test act on: what exists on it, by sandbox and step.
type fakeHost struct {
	mu     sync.Mutex
	exited *lifecycle.Exit // how pause has ended, for a controller that starts
	exists map[string][]states.Event
	do     map[states.Event]func(ctx context.Context, id string) error
	undo   map[states.Event]func(id string) error
	check  func(ctx context.Context, id string) error // of the network; nil finds nothing wrong
	pin    func(id string) error                      // makes a pin again; nil does nothing
	ended  func(id string)                            // is told of each pause that is stopped, unless nil
}

func (h *fakeHost) left(id string) []states.Event {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.exists[id])
}

// fail makes the undo of a step fail until the test heals it.
func (h *fakeHost) fail(step states.Event, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.undo[step] = func(string) error { return err }
}

func (h *fakeHost) heal(step states.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.undo, step)
}

// fakeStep makes nothing but an entry in its host, and the result that the real step would have.
type fakeStep struct {
	host     *fakeHost
	declared lifecycle.Declaration
}

func (s *fakeStep) Declaration() lifecycle.Declaration { return s.declared }

func (s *fakeStep) Reserve(context.Context, *lifecycle.Run) (any, error) { return nil, nil }

func (s *fakeStep) Do(ctx context.Context, r *lifecycle.Run) (any, error) {
	s.host.mu.Lock()
	s.host.exists[r.Key.ID] = append(s.host.exists[r.Key.ID], s.declared.Name)
	hook := s.host.do[s.declared.Name]
	s.host.mu.Unlock()
	if hook != nil {
		if err := hook(ctx, r.Key.ID); err != nil {
			return nil, err
		}
	}
	return s.result(r.Key.ID), nil
}

// Find finds what there is.
func (s *fakeStep) Find(_ context.Context, r *lifecycle.Run) (any, error) {
	if !slices.Contains(s.host.left(r.Key.ID), s.declared.Name) {
		return nil, errdefs.ErrNotFound
	}
	return s.result(r.Key.ID), nil
}

// result is as the real step's.
func (s *fakeStep) result(id string) any {
	switch s.declared.Name {
	case RemapSnapshot:
		return &Snapshot{Snapshotter: "overlayfs", Parent: "sha256:1", Strategy: "idmap"}
	case StartPause:
		return &Pause{Pid: 42, CgroupPath: "/pods/web", Labels: map[string]string{"oci_runtime_type": "io.containerd.runc.v2"}}
	case CaptureNetNS:
		return &NetNS{Path: "/run/netns/podfsm-" + id, Inode: 4026532000}
	case AttachNetwork:
		return &Network{IP: "10.0.0.2", AdditionalIPs: []string{"fd00::2"}, Result: &gocni.Result{}}
	default:
		return &Ready{}
	}
}

func (s *fakeStep) Undo(_ context.Context, r *lifecycle.Run) error {
	s.host.mu.Lock()
	hook := s.host.undo[s.declared.Name]
	s.host.mu.Unlock()
	if hook != nil {
		if err := hook(r.Key.ID); err != nil {
			return err
		}
	}
	s.host.mu.Lock()
	defer s.host.mu.Unlock()
	s.host.exists[r.Key.ID] = slices.DeleteFunc(s.host.exists[r.Key.ID], func(e states.Event) bool { return e == s.declared.Name })
	return nil
}

func (s *fakeStep) Probe(context.Context, *lifecycle.Run) (bool, error) { return false, nil }

// guardedIDs are the real step as well: it has nothing on the host.
type guardedIDs struct {
	fakeStep
	real *allocateIDs
}

func (s *guardedIDs) Reserve(ctx context.Context, r *lifecycle.Run) (any, error) {
	return s.real.Reserve(ctx, r)
}

func (s *guardedIDs) Do(ctx context.Context, r *lifecycle.Run) (any, error) {
	if _, err := s.fakeStep.Do(ctx, r); err != nil {
		return nil, err
	}
	return s.real.Do(ctx, r)
}

func (s *guardedIDs) Find(ctx context.Context, r *lifecycle.Run) (any, error) {
	return s.real.Find(ctx, r)
}

func (s *guardedIDs) Undo(ctx context.Context, r *lifecycle.Run) error {
	if err := s.fakeStep.Undo(ctx, r); err != nil {
		return err
	}
	return s.real.Undo(ctx, r)
}

// fakePause is the step whose process is the sandbox's life.
type fakePause struct{ fakeStep }

func (s *fakePause) End(_ context.Context, r *lifecycle.Run) (lifecycle.Exit, error) {
	if s.host.ended != nil {
		s.host.ended(r.Key.ID)
	}
	return lifecycle.Exit{Code: 137, At: time.Unix(9, 0).UTC()}, nil
}

func (s *fakePause) Exited(context.Context, *lifecycle.Run) (*lifecycle.Exit, error) {
	return s.host.exited, nil
}

// fakeNetwork is the step that can be asked.
type fakeNetwork struct{ fakeStep }

func (s *fakeNetwork) Check(ctx context.Context, r *lifecycle.Run) error {
	switch {
	case s.declared.Name == CaptureNetNS && s.host.pin != nil:
		return s.host.pin(r.Key.ID)
	case s.declared.Name == AttachNetwork && s.host.check != nil:
		return s.host.check(ctx, r.Key.ID)
	default:
		return nil
	}
}

// containerRecords are those that containerd has.
type containerRecords struct {
	containers.Store
	mu        sync.Mutex
	err       error
	sandboxes map[string]string // by the containers that are in them
	gets      int
}

func (s *containerRecords) Get(_ context.Context, id string) (containers.Container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gets++
	if s.err != nil {
		return containers.Container{}, s.err
	}
	spec, err := typeurl.MarshalAny(&specs.Spec{
		Version: specs.Version,
		Linux:   &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.NetworkNamespace}, {Type: specs.UserNamespace}}},
	})
	return containers.Container{ID: id, Image: "pause", Spec: spec, SandboxID: s.sandboxes[id]}, err
}

// List has none, for the processes of the machine are of no container of a test.
func (*containerRecords) List(context.Context, ...string) ([]containers.Container, error) {
	return nil, nil
}

// noRecords is containerd's store of sandboxes without any.
type noRecords struct{ sandbox.Store }

func (noRecords) Get(context.Context, string) (sandbox.Sandbox, error) {
	return sandbox.Sandbox{}, errdefs.ErrNotFound
}

// world is a controller on a host of a test.
type world struct {
	*Controller
	host      *fakeHost
	book      *book
	records   *containerRecords
	wait      time.Duration // the backoff of pending cleanups: so long that tests retry themselves, unless a test sets another
	published press
}

// press keeps what is published.
type press struct {
	mu     sync.Mutex
	before func() // is called first, unless nil
	events []*podfsmv1.SandboxTransition
	given  []*podfsmv1.SandboxWriteOff
}

func (p *press) Publish(_ context.Context, topic string, event events.Event) error {
	if p.before != nil {
		p.before()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch topic {
	case transitionTopic:
		p.events = append(p.events, event.(*podfsmv1.SandboxTransition))
	case writeOffTopic:
		p.given = append(p.given, event.(*podfsmv1.SandboxWriteOff))
	default:
		return fmt.Errorf("topic %q: %w", topic, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (p *press) writeOffs() []*podfsmv1.SandboxWriteOff {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.given)
}

func (p *press) all() []*podfsmv1.SandboxTransition {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.events)
}

func newWorld(t *testing.T, change ...func([]lifecycle.Step) []lifecycle.Step) *world {
	b := &book{forgotten: map[ledger.Key]bool{}}
	w := newWorldWith(t, b, change...)
	w.book = b
	return w
}

// newWorldWith has a ledger of the test's.
func newWorldWith(t *testing.T, log lifecycle.Ledger, change ...func([]lifecycle.Step) []lifecycle.Step) *world {
	w := &world{
		host: &fakeHost{
			exists: map[string][]states.Event{},
			do:     map[states.Event]func(context.Context, string) error{},
			undo:   map[states.Event]func(string) error{},
		},
		records: &containerRecords{},
		wait:    time.Hour,
	}
	client, err := containerd.New("", containerd.WithServices(
		containerd.WithContainerStore(w.records), containerd.WithSandboxStore(noRecords{}), containerd.WithNamespaceService(cris{}),
	))
	require.NoError(t, err)
	stock := stockWith()
	n := &node{limits: timeouts{cniAdd: time.Minute, cniDel: time.Minute, runtime: time.Minute}, stock: stock, client: client, containers: pause.NewContainers(client), tasks: taskEvents{&exchange.Exchange{}}}
	n.shims = pause.NewShims(nil, pause.ShimDirs{State: t.TempDir()}) // of which none is started
	n.pauses, err = pause.NewProcesses(func(string, pause.Exit) {})   // of which none is started
	require.NoError(t, err)
	w.Controller = &Controller{stock: stock, node: n}
	n.ids = userns.New(idHost{w.Controller}, nil)
	w.meters = newMeters(w.Controller)

	var steps []lifecycle.Step
	for _, step := range n.list() {
		fake := fakeStep{w.host, step.Declaration()}
		switch step := step.(type) {
		case *allocateIDs:
			steps = append(steps, &guardedIDs{fake, step})
		case lifecycle.Ender:
			steps = append(steps, &fakePause{fake})
		case lifecycle.Checker:
			steps = append(steps, &fakeNetwork{fake})
		default:
			steps = append(steps, &fake)
		}
	}
	for _, c := range change {
		steps = c(steps)
	}
	file, err := history.Open(filepath.Join(t.TempDir(), history.FileName))
	require.NoError(t, err)
	w.ended = newEnded(file)
	w.publishing = newPublishing(&w.published)
	engine, err := lifecycle.New(lifecycle.Config{
		Steps: steps, Process: StartPause, Ledger: timedLedger{log, w.meters}, Backoff: func(int) time.Duration { return w.wait },
		Observe: w.observe, WrittenOff: w.wroteOff, Meter: w.meters,
	})
	require.NoError(t, err)
	w.engine = engine
	t.Cleanup(func() { require.NoError(t, w.Close()) })
	return w
}

// inCRI is a context as containerd's CRI service has it.
func inCRI(t *testing.T) context.Context {
	return namespaces.WithNamespace(t.Context(), cri.Namespace)
}

// create accepts a sandbox as the sandbox API does.
func (w *world) create(t *testing.T, id string, change ...func(*runtime.PodSandboxConfig)) error {
	info := sandbox.Sandbox{ID: id, Runtime: sandbox.RuntimeOpts{Name: "io.containerd.runc.v2"}}
	return w.Create(inCRI(t), info, sandbox.WithOptions(podConfig(change...)))
}

// run makes a ready sandbox.
func (w *world) run(t *testing.T, id string, change ...func(*runtime.PodSandboxConfig)) {
	require.NoError(t, w.create(t, id, change...))
	_, err := w.Start(inCRI(t), id)
	require.NoError(t, err)
}

func (w *world) view(t *testing.T, id string) lifecycle.View {
	view, ok := w.find(ledger.Key{Namespace: cri.Namespace, ID: id})
	require.True(t, ok, "sandbox %q", id)
	return view
}

// waitFor waits until the sandbox is in a state.
func (w *world) waitFor(t *testing.T, id string, want states.State) {
	require.Eventually(t, func() bool { return w.view(t, id).State == want }, 10*time.Second, time.Millisecond, "sandbox %q is %s, not %s", id, w.view(t, id).State, want)
}

var errNoLuck = fmt.Errorf("no luck: %w", errdefs.ErrUnavailable)
