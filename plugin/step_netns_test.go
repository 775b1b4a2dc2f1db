package plugin

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/internal/roottest"
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/netns"
	"github.com/podfsm/podfsm/pause"
)

// pinnedID is the sandbox of a pinWorld.
var pinnedID = strings.Repeat("5", 64)

// pinWorld is a world with a ready sandbox whose process runs in a network namespace of its own. The real steps pin that, and end the
// process.
type pinWorld struct {
	*world
	network  *detaching
	dir, pin string
	inode    uint64
}

func newPinWorld(t *testing.T) *pinWorld {
	roottest.Require(t)
	process, capture, network := &realPause{real: &startPause{}}, &realCapture{real: &captureNetNS{}}, &detaching{}
	w := newWorld(t, func(steps []lifecycle.Step) []lifecycle.Step {
		for i, step := range steps {
			switch step := step.(type) {
			case *fakePause:
				process.fakePause, steps[i] = *step, process
			case *fakeNetwork:
				if step.declared.Name == CaptureNetNS {
					capture.fakeStep, steps[i] = step.fakeStep, capture
				} else {
					network.fakeNetwork, steps[i] = *step, network
				}
			}
		}
		return steps
	})
	process.real.node, capture.real.node, network.node = w.node, w.node, w.node
	dir := t.TempDir()
	w.stock.NetNSMountsUnderStateDir, w.stock.StateDir = true, dir
	w.node.settings.Files = pause.Files{RootDir: dir, StateDir: dir}
	w.node.pinPrefix = leaks.PinPrefix
	w.host.do[StartPause] = func(ctx context.Context, id string) error {
		cmd := exec.Command("sleep", "1000")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
		require.NoError(t, cmd.Start())
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
		stat, err := host.ReadStat(ctx, cmd.Process.Pid)
		require.NoError(t, err)
		lives, err := w.node.pauses.Adopt(ctx, holderID(criKey(id)), pause.Record{Pid: cmd.Process.Pid, StartTime: stat.StartTime})
		require.True(t, lives)
		return err
	}
	w.run(t, pinnedID)
	p := &pinWorld{world: w, network: network, dir: w.stock.netNSDir(), pin: filepath.Join(w.stock.netNSDir(), leaks.PinPrefix+pinnedID)}
	t.Cleanup(func() {
		for unix.Unmount(p.pin, unix.MNT_DETACH) == nil {
		}
	})
	info, err := netns.Inspect(p.pin)
	require.NoError(t, err)
	require.True(t, info.Pinned)
	p.inode = info.Inode
	return p
}

func (w *pinWorld) unpin(t *testing.T) {
	t.Helper()
	require.NoError(t, netns.Unpin(t.Context(), w.pin))
}

func (w *pinWorld) isPinned() bool { return isPinned(&NetNS{Path: w.pin, Inode: w.inode}) }

func (w *pinWorld) process(t *testing.T) *host.Process {
	t.Helper()
	process, err := w.node.pauses.Process(holderID(criKey(pinnedID)))
	require.NoError(t, err)
	return process
}

// block puts something in the place of the pin that no pin can be made on.
func (w *pinWorld) block(t *testing.T) {
	t.Helper()
	w.unpin(t)
	require.NoError(t, os.WriteFile(w.pin, []byte("not a mount point"), 0o644))
}

// realPause ends its process as the real step does.
type realPause struct {
	fakePause
	real *startPause
}

func (s *realPause) End(ctx context.Context, r *lifecycle.Run) (lifecycle.Exit, error) {
	return s.real.End(ctx, r)
}

// realCapture is the real step.
type realCapture struct {
	fakeStep
	real *captureNetNS
}

func (s *realCapture) Do(ctx context.Context, r *lifecycle.Run) (any, error) {
	return s.real.Do(ctx, r)
}
func (s *realCapture) Check(ctx context.Context, r *lifecycle.Run) error { return s.real.Check(ctx, r) }
func (s *realCapture) Undo(ctx context.Context, r *lifecycle.Run) error  { return s.real.Undo(ctx, r) }
func (s *realCapture) Probe(ctx context.Context, r *lifecycle.Run) (bool, error) {
	return s.real.Probe(ctx, r)
}

// detaching keeps where its DEL would find the namespace.
type detaching struct {
	fakeNetwork
	node  *node
	delIn *string // nil before
}

func (s *detaching) Undo(ctx context.Context, r *lifecycle.Run) error {
	path := s.node.netNSAtDel(r, "the pin")
	s.delIn = &path
	return s.fakeNetwork.Undo(ctx, r)
}

// The watch makes a pin again that was taken away, and leaves those that are there alone.
func TestPinAgain(t *testing.T) {
	w := newPinWorld(t)
	require.False(t, unpinned(w.view(t, pinnedID)))
	require.Empty(t, w.pinAgain(t.Context(), nil))

	w.unpin(t)
	require.True(t, unpinned(w.view(t, pinnedID)))
	require.Empty(t, w.pinAgain(t.Context(), nil))
	require.True(t, w.isPinned())

	require.NoError(t, w.Controller.Stop(inCRI(t), pinnedID))
	require.False(t, unpinned(w.view(t, pinnedID)), "a sandbox that has stopped needs no pin")
}

// A pin that can't be made is tried again, later and later, and is made once that is possible.
func TestPinAgainAfterFailures(t *testing.T) {
	w := newPinWorld(t)
	w.block(t)
	key := w.view(t, pinnedID).Key
	failed := w.pinAgain(t.Context(), nil)
	require.Equal(t, 1, failed[key].failed)
	require.Equal(t, failed, w.pinAgain(t.Context(), failed), "its time has not come")

	due := func() map[ledger.Key]pinTries {
		return map[ledger.Key]pinTries{key: {failed: failed[key].failed, next: time.Now()}}
	}
	again := w.pinAgain(t.Context(), due())
	require.Equal(t, 2, again[key].failed)
	require.Greater(t, time.Until(again[key].next), time.Until(failed[key].next))

	require.NoError(t, os.Remove(w.pin))
	require.Empty(t, w.pinAgain(t.Context(), due()))
	require.True(t, w.isPinned())
}

// A sandbox ends although its pin can't be made again, as on a filesystem that is read-only or full.
func TestStopWithoutAPin(t *testing.T) {
	w := newPinWorld(t)
	process := w.process(t)
	w.unpin(t)
	require.NoError(t, unix.Mount("read-only", w.dir, "tmpfs", unix.MS_RDONLY, ""))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(w.dir, unix.MNT_DETACH)) })
	require.NoError(t, w.Controller.Stop(inCRI(t), pinnedID))
	require.False(t, process.Alive())
	require.NotNil(t, w.network.delIn)
	require.Empty(t, *w.network.delIn)
}

// Only an operator can remove what is in the place of the pin. The pod keeps its namespace until
// then.
func TestStopWithAFileInThePlaceOfThePin(t *testing.T) {
	w := newPinWorld(t)
	process := w.process(t)
	w.block(t)
	err := w.Controller.Stop(inCRI(t), pinnedID)
	require.True(t, process.Alive())
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	require.ErrorContains(t, err, "remove it")

	require.NoError(t, os.Remove(w.pin))
	require.NoError(t, w.Controller.Stop(inCRI(t), pinnedID))
	require.False(t, process.Alive())
	require.Equal(t, "the pin", *w.network.delIn)
}

// Another namespace is pinned under the name: it is not the pod's, so DEL must not look into it.
func TestDetachWithAnotherPinInItsPlace(t *testing.T) {
	w := newPinWorld(t)
	w.unpin(t)
	other := exec.Command("sleep", "1000")
	other.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	require.NoError(t, other.Start())
	t.Cleanup(func() {
		_ = other.Process.Kill()
		_ = other.Wait()
	})
	held, err := host.Open(other.Process.Pid)
	require.NoError(t, err)
	defer held.Close()
	handle, err := netns.Capture(held)
	require.NoError(t, err)
	defer handle.Close()
	require.NoError(t, handle.Pin(w.pin))

	process := w.process(t)
	err = w.Controller.Stop(inCRI(t), pinnedID)
	require.True(t, errdefs.IsAlreadyExists(err), "%v", err)
	require.True(t, process.Alive())

	w.killPause(t)
	require.NoError(t, w.Controller.Stop(inCRI(t), pinnedID))
	require.NotNil(t, w.network.delIn)
	require.Empty(t, *w.network.delIn)
}

// cover mounts something over the directory of the pins.
func (w *pinWorld) cover(t *testing.T) (uncover func()) {
	t.Helper()
	require.NoError(t, unix.Mount("cover", w.dir, "tmpfs", 0, ""))
	uncover = sync.OnceFunc(func() { require.NoError(t, unix.Unmount(w.dir, unix.MNT_DETACH)) })
	t.Cleanup(uncover)
	return uncover
}

func (w *pinWorld) killPause(t *testing.T) {
	t.Helper()
	process := w.process(t)
	require.NoError(t, process.Kill())
	require.Eventually(t, func() bool { return !process.Alive() }, 10*time.Second, time.Millisecond)
}

// DEL of a pod whose pin is covered has the namespace, by a pin in what covers the first one.
func TestStopWithACoveredPin(t *testing.T) {
	w := newPinWorld(t)
	uncover := w.cover(t)
	err := w.Controller.Stop(inCRI(t), pinnedID)
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	require.Equal(t, "the pin", *w.network.delIn)
	uncover()
	require.NoError(t, w.Controller.Stop(inCRI(t), pinnedID))
	require.NoFileExists(t, w.pin)
}

// A pin is found by its record, even if the prefix of new pins has changed and a mount hides the
// file.
func TestUnpinAfterAChangeOfThePrefix(t *testing.T) {
	w := newPinWorld(t)
	w.killPause(t)
	uncover := w.cover(t)
	w.node.pinPrefix = leaks.StockPinPrefix

	err := w.Controller.Stop(inCRI(t), pinnedID)
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	require.ErrorContains(t, err, w.pin)
	uncover()
	require.True(t, w.isPinned())
	require.NoError(t, w.Controller.Stop(inCRI(t), pinnedID))
	require.False(t, w.isPinned())
	require.NoFileExists(t, w.pin)
}

// Without a record, the pin has one of the names that podfsm gives, also where a mount covers it.
func TestUnpinWithoutARecord(t *testing.T) {
	id := strings.Repeat("6", 64)
	for _, prefix := range []string{leaks.PinPrefix, leaks.StockPinPrefix} {
		t.Run(prefix, func(t *testing.T) {
			w := newPinWorld(t)
			step, r := &captureNetNS{w.node}, &lifecycle.Run{Key: criKey(id), Spec: &Spec{}}
			path := filepath.Join(w.dir, prefix+id)
			handle, err := netns.Capture(w.process(t))
			require.NoError(t, err)
			defer handle.Close()
			require.NoError(t, handle.Pin(path))
			t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })

			uncover := w.cover(t)
			err = step.Undo(t.Context(), r)
			require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
			require.ErrorContains(t, err, path)
			uncover()
			there, err := step.Probe(t.Context(), r)
			require.NoError(t, err)
			require.True(t, there)
			require.NoError(t, step.Undo(t.Context(), r))
			there, err = step.Probe(t.Context(), r)
			require.NoError(t, err)
			require.False(t, there)
		})
	}
}
