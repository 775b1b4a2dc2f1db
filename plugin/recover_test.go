package plugin

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/internal/roottest"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/netns"
	"github.com/podfsm/podfsm/states"
)

// cris are the containerd namespaces that there are: the CRI's.
type cris struct{ namespaces.Store }

func (cris) List(context.Context) ([]string, error) { return []string{cri.Namespace}, nil }

// newStores is a containerd client on real stores of sandboxes and leases.
func newStores(t *testing.T) *containerd.Client {
	file, err := bolt.Open(filepath.Join(t.TempDir(), "meta.db"), 0o600, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, file.Close()) })
	db := metadata.NewDB(file, nil, nil)
	client, err := containerd.New("", containerd.WithServices(
		containerd.WithNamespaceService(cris{}),
		containerd.WithSandboxStore(metadata.NewSandboxStore(db)),
		containerd.WithContainerStore(metadata.NewContainerStore(db)),
		containerd.WithLeasesService(metadata.NewLeaseManager(db)),
	))
	require.NoError(t, err)
	return client
}

func TestRecoverSweepsOnlyWhatNeverRan(t *testing.T) {
	ran, err := typeurl.MarshalAny(&specs.Spec{})
	require.NoError(t, err)
	for name, tc := range map[string]struct {
		record sandbox.Sandbox
		lost   bool // the ledger
		stays  bool
	}{
		"killed before Create": {record: sandbox.Sandbox{Sandboxer: Name}},
		// Or after it: only the ledger would know.
		"killed before Create or after it": {record: sandbox.Sandbox{Sandboxer: Name}, lost: true, stays: true},
		"another's":                        {record: sandbox.Sandbox{Sandboxer: "podsandbox"}, stays: true},
		// The ledger was lost, or set aside as damaged: the pod may well run, and only this record leads to it.
		"ran, but isn't on the ledger": {record: sandbox.Sandbox{Sandboxer: Name, Spec: ran}, stays: true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			rootDir, stateDir := t.TempDir(), t.TempDir()
			w.ledger, err = ledger.Open(rootDir, stateDir)
			require.NoError(t, err)
			if !tc.lost {
				require.NoError(t, w.ledger.Close())
				w.ledger, err = ledger.Open(rootDir, stateDir)
				require.NoError(t, err)
			}
			client, ctx := newStores(t), inCRI(t)
			tc.record.ID, tc.record.Runtime.Name = "s1", "io.containerd.runc.v2"
			_, err := client.SandboxStore().Create(ctx, tc.record)
			require.NoError(t, err)
			_, err = client.LeasesService().Create(ctx, leases.WithID("s1"))
			require.NoError(t, err)

			require.NoError(t, w.recover(t.Context(), client, true))

			record, err := client.SandboxStore().Get(ctx, "s1")
			left, listErr := client.LeasesService().List(ctx)
			require.NoError(t, listErr)
			if tc.stays {
				require.NoError(t, err)
				for _, view := range w.engine.List() {
					require.True(t, record.CreatedAt.Equal(view.Created), "it is as old as it was")
				}
				require.Len(t, left, 1)
				return
			}
			require.True(t, errdefs.IsNotFound(err), "%v", err)
			require.Empty(t, left)
		})
	}
}

// The daemon was killed when the ledger had lost a removed sandbox, and containerd's store not yet.
func TestRecoverSweepsWhatWasRemoved(t *testing.T) {
	rootDir, stateDir, key := t.TempDir(), t.TempDir(), ledger.Key{Namespace: cri.Namespace, ID: "s1"}
	log, err := ledger.Open(rootDir, stateDir)
	require.NoError(t, err)
	require.NoError(t, log.Append(t.Context(), &ledger.Record{Key: key, Kind: ledger.Begun}))
	require.NoError(t, log.Forget(t.Context(), key))
	require.NoError(t, log.Close())
	ran, err := typeurl.MarshalAny(&specs.Spec{})
	require.NoError(t, err)
	client := newStores(t)
	_, err = client.SandboxStore().Create(inCRI(t), sandbox.Sandbox{ID: "s1", Sandboxer: Name, Spec: ran, Runtime: sandbox.RuntimeOpts{Name: "io.containerd.runc.v2"}})
	require.NoError(t, err)

	w := newWorld(t)
	w.ledger, err = ledger.Open(rootDir, stateDir)
	require.NoError(t, err)
	require.NoError(t, w.recover(t.Context(), client, true))
	_, err = client.SandboxStore().Get(inCRI(t), "s1")
	require.True(t, errdefs.IsNotFound(err), "%v", err)
	require.Empty(t, w.engine.List())
}

// restart runs a sandbox, does something to the ledger's log when the controller has closed, and returns the controller that
// finds it so.
func restart(t *testing.T, spoil func(t *testing.T, stateDir string), change ...func(before *world)) *world {
	rootDir, stateDir := t.TempDir(), t.TempDir()
	client := newStores(t)
	spec, err := typeurl.MarshalAny(&specs.Spec{})
	require.NoError(t, err)
	_, err = client.SandboxStore().Create(inCRI(t), sandbox.Sandbox{
		ID: "s1", Sandboxer: Name, Spec: spec, Runtime: sandbox.RuntimeOpts{Name: "io.containerd.runc.v2"},
	})
	require.NoError(t, err)

	log, err := ledger.Open(rootDir, stateDir)
	require.NoError(t, err)
	b := &book{forgotten: map[ledger.Key]bool{}, into: log}
	before := newWorldWith(t, b)
	before.book = b
	before.run(t, "s1")
	for _, c := range change {
		c(before)
	}
	require.NoError(t, before.Close())
	require.NoError(t, log.Close())
	spoil(t, stateDir)

	log, err = ledger.Open(rootDir, stateDir)
	require.NoError(t, err)
	w := newWorldWith(t, log)
	w.ledger = log
	w.host.exists["s1"], w.host.exited = before.host.left("s1"), before.host.exited
	require.NoError(t, w.recover(t.Context(), client, true))
	return w
}

// A log that is damaged, on a node that hasn't rebooted, leaves a ledger that knows of the sandbox, but not of all that was made
// for it.
func TestRecoverSweepsLeasesWithoutASandbox(t *testing.T) {
	w := newWorld(t)
	var err error
	w.ledger, err = ledger.Open(t.TempDir(), t.TempDir())
	require.NoError(t, err)
	client, ctx := newStores(t), inCRI(t)
	orphan, sandboxs := strings.Repeat("a", 64), strings.Repeat("b", 64)
	_, err = client.SandboxStore().Create(ctx, sandbox.Sandbox{ID: sandboxs, Sandboxer: "podsandbox", Runtime: sandbox.RuntimeOpts{Name: "io.containerd.runc.v2"}})
	require.NoError(t, err)
	for _, id := range []string{orphan, sandboxs, "foreign"} {
		_, err = client.LeasesService().Create(ctx, leases.WithID(id))
		require.NoError(t, err)
	}
	require.NoError(t, w.recover(t.Context(), client, true))
	left, err := client.LeasesService().List(ctx)
	require.NoError(t, err)
	ids := make([]string, len(left))
	for i, lease := range left {
		ids[i] = lease.ID
	}
	require.ElementsMatch(t, []string{sandboxs, "foreign"}, ids)
}

func TestRecoverWithoutTheLogLosesNothing(t *testing.T) {
	key := ledger.Key{Namespace: cri.Namespace, ID: "s1"}
	for name, spoil := range map[string]func(t *testing.T, stateDir string){
		"missing": func(t *testing.T, stateDir string) { require.NoError(t, os.RemoveAll(stateDir)) },
		"damaged in the middle": func(t *testing.T, stateDir string) {
			rewriteLog(t, stateDir, func(content []byte) []byte {
				for i := len(content) / 3; i < len(content); i++ {
					content[i] ^= 0xff
				}
				return content
			})
		},
		"cut off inside of a record": func(t *testing.T, stateDir string) {
			rewriteLog(t, stateDir, func(content []byte) []byte { return content[:len(content)-1] })
		},
	} {
		t.Run(name, func(t *testing.T) {
			var was lifecycle.View
			w := restart(t, spoil, func(before *world) { was = before.view(t, "s1") })
			require.NotEmpty(t, w.ledger.Damage())
			view, err := w.engine.Get(key)
			require.NoError(t, err)
			require.Equal(t, states.Ready, view.State, "the host shows it")
			require.True(t, was.Created.Equal(view.Created))
			for _, step := range was.Steps {
				require.Equal(t, step.Result, view.Step(step.Name).Result)
			}

			w = restart(t, spoil, func(before *world) {
				before.host.exists["s1"] = before.host.left("s1")[:2]
				before.host.exited = &lifecycle.Exit{Code: 9} // for a look at a pause that is on record
			})
			require.NoError(t, w.Close()) // waits for what recovery has left to the background
			view, err = w.engine.Get(key)
			require.NoError(t, err)
			require.Contains(t, []states.State{states.NotReady, states.Stopped}, view.State, "it was ready: containerd lists it until the kubelet removes it")
		})
	}
}

func rewriteLog(t *testing.T, stateDir string, change func([]byte) []byte) {
	files, err := filepath.Glob(filepath.Join(stateDir, "*"))
	require.NoError(t, err)
	require.Len(t, files, 1)
	content, err := os.ReadFile(files[0])
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(files[0], change(content), 0o600))
}

// The daemon was killed when it had recorded that pause is gone, and not yet that the sandbox isn't ready any more.
func TestRecoverAfterAnExitThatIsHalfOnRecord(t *testing.T) {
	w := restart(t, func(*testing.T, string) {}, func(before *world) {
		before.book.mu.Lock()
		before.book.before = func(r *ledger.Record) error {
			if r.Kind == ledger.Moved {
				return errNoLuck
			}
			return nil
		}
		before.book.mu.Unlock()
		before.host.exited = &lifecycle.Exit{Code: 9, At: time.Unix(8, 0).UTC()}
		before.engine.PauseExited(ledger.Key{Namespace: cri.Namespace, ID: "s1"}, *before.host.exited)
		before.waitFor(t, "s1", states.NotReady)
	})
	got, err := w.Status(inCRI(t), "s1", false)
	require.NoError(t, err)
	require.Equal(t, "SANDBOX_NOTREADY", got.State)
	ctx, cancel := context.WithTimeout(inCRI(t), 5*time.Second)
	defer cancel()
	exit, err := w.Wait(ctx, "s1")
	require.NoError(t, err)
	require.EqualValues(t, 9, exit.ExitStatus)
}

// All unreadable records are quarantined until the sandbox is removed: by a caller that finds the
// sandbox in a list, else at once.
func TestRecoverKeepsAllThatItCantRead(t *testing.T) {
	log, err := ledger.Open(t.TempDir(), t.TempDir())
	require.NoError(t, err)
	client := newStores(t)
	ids, unlisted := []string{"s1", "s2"}, "s3"
	for _, id := range append(ids, unlisted) {
		require.NoError(t, log.Append(t.Context(), &ledger.Record{
			Key: ledger.Key{Namespace: cri.Namespace, ID: id}, Kind: ledger.Begun, Data: &ledger.Data{TypeURL: "of a later version"},
		}))
	}
	for _, id := range ids {
		_, err := client.SandboxStore().Create(inCRI(t), sandbox.Sandbox{ID: id, Sandboxer: Name, Runtime: sandbox.RuntimeOpts{Name: "io.containerd.runc.v2"}})
		require.NoError(t, err)
	}
	w := newWorldWith(t, log)
	w.ledger = log
	w.host.exists[unlisted] = creationPath()
	require.NoError(t, w.recover(t.Context(), client, true))
	w.waitFor(t, unlisted, states.Removed)
	require.Empty(t, w.host.left(unlisted))
	for _, id := range ids {
		require.Equal(t, states.Quarantined, w.view(t, id).State)
		require.NoError(t, w.RemoveSandbox(t.Context(), id))
	}
	require.Empty(t, log.Sandboxes())
}

// A pending cleanup may complete a removal after its caller has gone. Then containerd's record
// doesn't bring the sandbox back, even if the ledger's log, which tells of the removal, is lost.
func TestRecoverAfterACompletedRemoval(t *testing.T) {
	rootDir, stateDir, client := t.TempDir(), t.TempDir(), newStores(t)
	log, err := ledger.Open(rootDir, stateDir)
	require.NoError(t, err)
	before := newWorldWith(t, log)
	before.ledger = log
	require.NoError(t, before.recover(t.Context(), client, true))
	before.run(t, "s1")
	spec, err := typeurl.MarshalAny(&specs.Spec{})
	require.NoError(t, err)
	_, err = client.SandboxStore().Create(inCRI(t), sandbox.Sandbox{ID: "s1", Sandboxer: Name, Spec: spec, Runtime: sandbox.RuntimeOpts{Name: "io.containerd.runc.v2"}})
	require.NoError(t, err)

	before.wait = time.Millisecond
	before.host.fail(RemapSnapshot, errNoLuck)
	require.NoError(t, before.Stop(inCRI(t), "s1"))
	require.ErrorIs(t, before.Shutdown(inCRI(t), "s1"), errNoLuck)
	before.host.heal(RemapSnapshot)
	before.waitFor(t, "s1", states.Removed)
	require.NoError(t, before.Close())
	require.NoError(t, os.RemoveAll(stateDir))

	w := newWorld(t)
	w.ledger, err = ledger.Open(rootDir, stateDir)
	require.NoError(t, err)
	require.NoError(t, w.recover(t.Context(), client, true))
	require.Empty(t, w.engine.List())
	_, err = client.SandboxStore().Get(inCRI(t), "s1")
	require.True(t, errdefs.IsNotFound(err), "%v", err)
}

// A completed creation waits for a retry of its caller. It is removed if no caller can know of it:
// it was discarded, or the daemon was killed before containerd's service had it.
func TestRecoverOfFinishedCreations(t *testing.T) {
	spec, err := typeurl.MarshalAny(&specs.Spec{})
	require.NoError(t, err)
	key := ledger.Key{Namespace: cri.Namespace, ID: "s1"}
	for name, tc := range map[string]struct {
		claim     lifecycle.Claim
		handed    bool // to containerd's service
		goes      bool
		unclaimed []string
	}{
		"unclaimed":                     {handed: true, unclaimed: []string{"s1"}},
		"shown":                         {claim: lifecycle.Shown, handed: true},
		"taken":                         {claim: lifecycle.Taken, handed: true},
		"discarded":                     {claim: lifecycle.Discarded, handed: true, goes: true},
		"killed before it was handed":   {goes: true},
		"shown, whatever the record is": {claim: lifecycle.Shown},
	} {
		t.Run(name, func(t *testing.T) {
			rootDir, stateDir, client := t.TempDir(), t.TempDir(), newStores(t)
			record := sandbox.Sandbox{ID: "s1", Sandboxer: Name, Runtime: sandbox.RuntimeOpts{Name: "io.containerd.runc.v2"}}
			if tc.handed {
				record.Spec = spec
			}
			_, err := client.SandboxStore().Create(inCRI(t), record)
			require.NoError(t, err)
			log, err := ledger.Open(rootDir, stateDir)
			require.NoError(t, err)
			before := newWorldWith(t, log)
			require.NoError(t, before.engine.Create(inCRI(t), key, request(key, &Spec{Config: podConfig()})))
			require.NoError(t, before.engine.Start(inCRI(t), key))
			if tc.claim == lifecycle.Discarded {
				require.True(t, before.Discard("s1", lifecycle.Unclaimed))
			} else {
				require.True(t, before.Claim(inCRI(t), "s1", tc.claim))
			}
			require.NoError(t, before.Close())
			require.NoError(t, log.Close())

			log, err = ledger.Open(rootDir, stateDir)
			require.NoError(t, err)
			w := newWorldWith(t, log)
			w.ledger = log
			w.host.exists["s1"] = before.host.left("s1")
			require.NoError(t, w.recover(t.Context(), client, true))
			require.Equal(t, tc.unclaimed, w.Unclaimed())
			_, err = client.SandboxStore().Get(inCRI(t), "s1")
			if tc.goes {
				w.waitFor(t, "s1", states.Removed)
				require.Equal(t, lifecycle.Discarded, w.view(t, "s1").Claim, "a retry that came first would have had it")
				require.Empty(t, w.host.left("s1"))
				require.True(t, errdefs.IsNotFound(err), "containerd's service doesn't list it: %v", err)
				return
			}
			require.NoError(t, err)
			pod, ok := w.Named(podConfig().GetMetadata())
			require.True(t, ok)
			require.Equal(t, states.Ready, pod.State)
			require.Equal(t, tc.claim, pod.Claim)
		})
	}
}

// A namespace that is pinned under the pod's name is the pod's if pause is in it.
func TestFindNetNS(t *testing.T) {
	roottest.Require(t)
	pause := exec.Command("sleep", "100")
	pause.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	require.NoError(t, pause.Start())
	t.Cleanup(func() {
		require.NoError(t, pause.Process.Kill())
		require.Error(t, pause.Wait())
	})
	handle, err := netns.Open(fmt.Sprintf("/proc/%d/ns/net", pause.Process.Pid))
	require.NoError(t, err)
	defer handle.Close()
	pin := func(t *testing.T, path string) {
		require.NoError(t, handle.Pin(path))
		t.Cleanup(func() { require.NoError(t, netns.Unpin(context.Background(), path)) })
	}
	file := func(t *testing.T, path string) {
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, nil, 0o444))
	}
	for name, tc := range map[string]struct {
		make  func(t *testing.T, path string)
		pid   int
		found bool
	}{
		"pause is in it":                {pin, pause.Process.Pid, true},
		"pause is elsewhere":            {pin, os.Getpid(), false},
		"nothing is there":              {func(*testing.T, string) {}, pause.Process.Pid, false},
		"a mount point without a mount": {file, pause.Process.Pid, false},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "netns", "podfsm-s1")
			tc.make(t, path)
			found, err := findNetNS(t.Context(), path, tc.pid)
			if !tc.found {
				require.True(t, errdefs.IsNotFound(err), "%v", err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, &NetNS{Path: path, Inode: handle.Inode()}, found)
		})
	}
}

// A pod that is ready stays ready, also when a later release wrote its specification in a way that this one can't read: containerd's
// record stands in for it.
func TestRecoverWithASpecificationOfALaterRelease(t *testing.T) {
	client := newStores(t)
	spec, err := typeurl.MarshalAny(&specs.Spec{})
	require.NoError(t, err)
	_, err = client.SandboxStore().Create(inCRI(t), sandbox.Sandbox{ID: "s1", Sandboxer: Name, Spec: spec, Runtime: sandbox.RuntimeOpts{Name: "io.containerd.runc.v2"}})
	require.NoError(t, err)
	log, err := ledger.Open(t.TempDir(), t.TempDir())
	require.NoError(t, err)
	b := &book{forgotten: map[ledger.Key]bool{}, into: log, before: func(r *ledger.Record) error {
		if r.Kind == ledger.Begun {
			r.Data.TypeURL = "of a later release"
		}
		return nil
	}}
	before := newWorldWith(t, b)
	before.book = b
	before.run(t, "s1")
	require.NoError(t, before.Close())

	w := newWorldWith(t, log)
	w.ledger = log
	w.host.exists["s1"] = before.host.left("s1")
	require.NoError(t, w.recover(t.Context(), client, true))
	view := w.view(t, "s1")
	require.Equal(t, states.Ready, view.State)
	require.Contains(t, view.Unread[0], "of a later release")
	require.True(t, before.view(t, "s1").Created.Equal(view.Created))
	require.NoError(t, w.StopSandbox(t.Context(), "s1"))
	require.NoError(t, w.RemoveSandbox(t.Context(), "s1"))
	require.Empty(t, w.host.left("s1"))
}
