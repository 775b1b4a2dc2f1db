package integration

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// TestRandomSequences makes random CRI calls, valid and invalid, from several clients, and checks
// the promises of the CRI: Stop and Remove are idempotent, a stopped pod is never ready again, a
// removed pod never comes back, no event is lost or sent twice, and no two pods have the same
// address.
func TestRandomSequences(t *testing.T) {
	sequences := 6
	if full() {
		sequences = 100
	}
	random := rand.New(rand.NewPCG(takeSeed(t), 0))
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	for i := range sequences {
		passed := t.Run(fmt.Sprint(i), func(t *testing.T) {
			s := newSequence(t, n, random.Uint64())
			clients, ctx := errgroup.WithContext(t.Context())
			for client := range uint64(3) {
				clients.Go(func() error { return s.play(ctx, client) })
			}
			err := clients.Wait()
			require.NoError(t, err, strings.Join(s.told, "\n"))
			s.finish(t)
			n.RequireClean(t, before)
		})
		if !passed {
			return // the next sequence would find the pods of this one
		}
	}
}

// sequence is a random run of calls, and the expected state of its pods.
type sequence struct {
	node   *harness.Node
	events *harness.Events
	seed   uint64
	pods   []*runtime.PodSandboxConfig // what the clients run, each with attempts

	// starts excludes starts of containers in a pod that is being ended, which the kubelet never
	// does. containerd only ends the containers that it finds, and a shim that is ended while it
	// mounts another rootfs leaves the mount.
	starts sync.RWMutex

	mu   sync.Mutex
	told []string          // the calls and their answers, for the log of a failure
	runs map[string]*known // by sandbox id
}

// known is what the clients know of a sandbox. A call that begins after the end of another call
// sees its effect.
type known struct {
	pod     string // with its attempt
	ip      string
	ending  bool // a client has requested its end, or killed it
	stopped bool // a Stop has succeeded
	removed bool // a Remove has succeeded
}

func newSequence(t *testing.T, n *harness.Node, seed uint64) *sequence {
	events, err := n.Events(t.Context())
	require.NoError(t, err)
	t.Cleanup(events.Close)
	s := &sequence{node: n, events: events, seed: seed, runs: map[string]*known{}}
	for i := range 3 {
		s.pods = append(s.pods, n.PodConfig(fmt.Sprintf("pod-%d", i)))
	}
	return s
}

// play makes random calls. A seed and a client give the same calls, except for the ids of
// sandboxes.
func (s *sequence) play(ctx context.Context, client uint64) error {
	random := rand.New(rand.NewPCG(s.seed, client))
	calls := []func(context.Context, *rand.Rand) error{
		s.run, s.run, s.run, s.runInvalid, s.stop, s.stop, s.remove, s.remove, s.look, s.look, s.list, s.container, s.container, s.kill, s.unknown,
	}
	for range 20 {
		if err := calls[random.IntN(len(calls))](ctx, random); err != nil {
			return fmt.Errorf("client %d: %w", client, err)
		}
	}
	return nil
}

func (s *sequence) tell(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.told = append(s.told, fmt.Sprintf(format, args...))
}

// any returns a sandbox that was run and its known state, or nil.
func (s *sequence) any(random *rand.Rand) (string, known) {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := fmt.Sprintf("pod-%d/", random.IntN(len(s.pods)))
	var found string
	for id, k := range s.runs { // the latest attempt, which sorts last
		if strings.HasPrefix(k.pod, name) && (found == "" || !k.removed && s.runs[found].removed) {
			found = id
		}
	}
	if found == "" {
		return "", known{}
	}
	return found, *s.runs[found]
}

// now returns the known state of a sandbox after change has updated it.
func (s *sequence) now(id string, change func(*known)) known {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s.runs[id])
	return *s.runs[id]
}

func unchanged(*known) {}

func (s *sequence) run(ctx context.Context, random *rand.Rand) error {
	config := proto.CloneOf(s.pods[random.IntN(len(s.pods))])
	config.Metadata.Attempt = uint32(random.IntN(2))
	name := fmt.Sprintf("%s/%d", config.GetMetadata().GetName(), config.GetMetadata().GetAttempt())
	pod, err := s.node.RunPod(ctx, harness.PodfsmHandler, config)
	if err != nil {
		s.tell("run %s: %v", name, err)
		if status.Code(err) != codes.AlreadyExists { // another sandbox of this pod and attempt
			return fmt.Errorf("running %s failed: %w", name, err)
		}
		return nil
	}
	s.tell("run %s: %.13s", name, pod.ID)
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, other := range s.runs {
		if id != pod.ID && other.pod == name && !other.ending {
			return fmt.Errorf("%s has two sandboxes, %s and %s", name, id, pod.ID)
		}
	}
	if s.runs[pod.ID] == nil {
		s.runs[pod.ID] = &known{pod: name}
	}
	return nil
}

// runInvalid makes an invalid request.
func (s *sequence) runInvalid(ctx context.Context, random *rand.Rand) error {
	handler := harness.PodfsmHandler
	config := proto.CloneOf(s.pods[0])
	config.Metadata.Name = "invalid"
	switch random.IntN(4) {
	case 0:
		config.Metadata = nil
	case 1:
		nsOptions(config).Network = runtime.NamespaceMode_TARGET
	case 2:
		harness.UserNS(1, 65536)(config)
	case 3:
		handler = "nobody"
	}
	_, err := s.node.Runtime.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: config, RuntimeHandler: handler})
	s.tell("run invalid: %v", err)
	if status.Code(err) != codes.InvalidArgument {
		return fmt.Errorf("an invalid pod: %w", err)
	}
	return nil
}

// short shortens an id sometimes, as people do.
func short(random *rand.Rand, id string) string {
	if random.IntN(3) == 0 {
		return id[:20]
	}
	return id
}

func (s *sequence) stop(ctx context.Context, random *rand.Rand) error {
	return s.end(random, "stop", func(k *known) { k.stopped = true }, func(id string) error {
		_, err := s.node.Runtime.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: id})
		return err
	})
}

func (s *sequence) remove(ctx context.Context, random *rand.Rand) error {
	return s.end(random, "remove", func(k *known) { k.removed = true }, func(id string) error {
		_, err := s.node.Runtime.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id})
		return err
	})
}

// end makes a call that ends a sandbox, and notes its success.
func (s *sequence) end(random *rand.Rand, name string, done func(*known), call func(id string) error) error {
	id, _ := s.any(random)
	if id == "" {
		return nil
	}
	s.now(id, func(k *known) { k.ending = true })
	s.starts.RLock()
	defer s.starts.RUnlock()
	err := call(short(random, id))
	s.tell("%s %.13s: %v", name, id, err)
	if err != nil {
		return fmt.Errorf("%s of %s failed: %w", name, id, err)
	}
	s.now(id, done)
	return nil
}

// look compares the status of a sandbox with its known state.
func (s *sequence) look(ctx context.Context, random *rand.Rand) error {
	id, before := s.any(random)
	if id == "" {
		return nil
	}
	resp, err := s.node.Runtime.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: short(random, id), Verbose: random.IntN(2) == 0})
	s.tell("status %.13s: %s %v", id, resp.GetStatus().GetState(), err)
	if err != nil {
		if status.Code(err) == codes.NotFound && s.now(id, unchanged).ending {
			return nil
		}
		return fmt.Errorf("status of %s, of which is known %+v: %w", id, before, err)
	}
	if before.removed {
		return fmt.Errorf("%s was removed and is back", id)
	}
	return s.judge(id, before, resp.GetStatus().GetState(), resp.GetStatus().GetNetwork().GetIp())
}

// judge compares an observed state of a sandbox with the known states before and after the
// observation.
func (s *sequence) judge(id string, before known, state runtime.PodSandboxState, ip string) error {
	now := s.now(id, unchanged)
	ready := state == runtime.PodSandboxState_SANDBOX_READY
	switch {
	case ready && before.stopped:
		return fmt.Errorf("%s was stopped and is ready again", id)
	case !ready && !now.ending:
		return fmt.Errorf("%s isn't ready, although no client has ended it", id)
	case !ready || now.ending || ip == "":
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for other, k := range s.runs {
		if other != id && k.ip == ip && !k.ending {
			return fmt.Errorf("%s and %s have the address %s", id, other, ip)
		}
	}
	s.runs[id].ip = ip
	return nil
}

// list compares the whole list with the known states before it.
func (s *sequence) list(ctx context.Context, _ *rand.Rand) error {
	s.mu.Lock()
	before := map[string]known{}
	for id, k := range s.runs {
		before[id] = *k
	}
	s.mu.Unlock()
	resp, err := s.node.Runtime.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		return fmt.Errorf("list: %w", err)
	}
	s.tell("list: %d", len(resp.GetItems()))
	listed := map[string]bool{}
	for _, item := range resp.GetItems() {
		listed[item.GetId()] = true
		k, ok := before[item.GetId()]
		if !ok {
			continue // run during the call
		}
		if k.removed {
			return fmt.Errorf("%s was removed and is listed", item.GetId())
		}
		if err := s.judge(item.GetId(), k, item.GetState(), ""); err != nil {
			return err
		}
	}
	for id := range before {
		if !listed[id] && !s.now(id, unchanged).ending {
			return fmt.Errorf("%s isn't listed, although no client has ended it", id)
		}
	}
	return nil
}

// container starts a container in a pod. It may only fail if the pod is being ended.
func (s *sequence) container(ctx context.Context, random *rand.Rand) error {
	s.starts.Lock()
	defer s.starts.Unlock()
	id, k := s.any(random)
	if id == "" {
		return nil
	}
	name, _, _ := strings.Cut(k.pod, "/")
	pod := s.node.FindPod(id, s.node.PodConfig(name))
	for _, config := range s.pods {
		if config.GetMetadata().GetName() == name {
			pod.Config = config
		}
	}
	_, err := pod.StartContainer(ctx, fmt.Sprintf("c-%d", random.Uint32()))
	s.tell("container in %.13s: %v", id, err)
	if err != nil && !s.now(id, unchanged).ending {
		return fmt.Errorf("failed to start a container in %s, which no client has ended: %w", id, err)
	}
	if err == nil && k.stopped {
		return fmt.Errorf("a container was started in %s, which was stopped", id)
	}
	return nil
}

// kill ends pause as the kernel's OOM killer would.
func (s *sequence) kill(ctx context.Context, random *rand.Rand) error {
	id, k := s.any(random)
	if id == "" || k.ending || random.IntN(2) == 0 {
		return nil
	}
	pod := s.node.FindPod(id, nil)
	pid, err := pod.Pid(ctx)
	if err != nil || pid == 0 {
		return nil // the pod is being ended
	}
	s.starts.RLock()
	defer s.starts.RUnlock()
	s.now(id, func(k *known) { k.ending = true })
	s.tell("kill %.13s", id)
	_ = unix.Kill(pid, unix.SIGKILL) // fails when it has ended
	return nil
}

// unknown makes calls about a sandbox that never existed.
func (s *sequence) unknown(ctx context.Context, random *rand.Rand) error {
	id := fmt.Sprintf("%064x", random.Uint64())
	if _, err := s.node.Runtime.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("stopping an unknown sandbox: %w", err)
	}
	if _, err := s.node.Runtime.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("removing an unknown sandbox: %w", err)
	}
	if _, err := s.node.Runtime.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: id}); status.Code(err) != codes.NotFound {
		return fmt.Errorf("status of an unknown sandbox: %w", err)
	}
	if _, err := s.node.Runtime.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: id}); status.Code(err) != codes.NotFound {
		return fmt.Errorf("starting an unknown container: %w", err)
	}
	return nil
}

// finish removes every sandbox, and looks for each of its events.
func (s *sequence) finish(t *testing.T) {
	t.Helper()
	for id := range s.runs {
		pod := s.node.FindPod(id, s.pods[0])
		require.NoError(t, pod.StopAndRemove(t.Context()))
		require.NoError(t, pod.StopAndRemove(t.Context()), "again")
	}
	kinds := []runtime.ContainerEventType{
		runtime.ContainerEventType_CONTAINER_CREATED_EVENT,
		runtime.ContainerEventType_CONTAINER_STARTED_EVENT,
		runtime.ContainerEventType_CONTAINER_STOPPED_EVENT,
		runtime.ContainerEventType_CONTAINER_DELETED_EVENT,
	}
	ctx, cancel := context.WithTimeout(t.Context(), waitFor)
	defer cancel()
	all, err := s.events.WaitFor(ctx, func(all []*runtime.ContainerEventResponse) bool {
		for id := range s.runs {
			for _, kind := range kinds {
				if len(harness.OfType(all, id, kind)) == 0 {
					return false
				}
			}
		}
		return true
	})
	require.NoError(t, err, "every event comes: %s", strings.Join(s.told, "\n"))
	for id := range s.runs {
		for _, kind := range kinds {
			require.Len(t, harness.OfType(all, id, kind), 1, "%s of %s\n%s", kind, id, strings.Join(s.told, "\n"))
		}
	}
}
