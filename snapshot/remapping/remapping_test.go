package remapping

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/internal/roottest"
	"github.com/podfsm/podfsm/snapshot/owners"
	"github.com/podfsm/podfsm/userns"
)

var (
	strategies = []Strategy{IDMap, Metacopy, Chown}
	layered    = []Strategy{Metacopy, Chown}

	// Two ranges of uids, and other gids.
	podMap = owners.Map{
		UIDs: []specs.LinuxIDMapping{{HostID: 131072, Size: 1000}, {ContainerID: 1000, HostID: 200000, Size: 1000}},
		GIDs: []specs.LinuxIDMapping{{HostID: 262144, Size: 65536}},
	}
)

// capability is cap_net_raw+ep as file capabilities of revision 2.
var capability = []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

func TestMain(m *testing.M) { os.Exit(roottest.Main(m.Run, os.Stderr)) }

// labelled asks for id maps with every snapshot.
type labelled struct {
	*Snapshotter
	maps owners.Map
}

func withMaps(m owners.Map) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotUIDMapping: extentsText(m.UIDs), snapshots.LabelSnapshotGIDMapping: extentsText(m.GIDs),
	})
}

func (l *labelled) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return l.Snapshotter.Prepare(ctx, key, parent, append(opts, withMaps(l.maps))...)
}

func (l *labelled) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return l.Snapshotter.View(ctx, key, parent, append(opts, withMaps(l.maps))...)
}

// TestSuite is containerd's own for snapshotters, which takes long. It asks for no id maps by itself, and without them all strategies
// are the same. PODFSM_FULL=1 has it run for all of them.
func TestSuite(t *testing.T) {
	same := []specs.LinuxIDMapping{{Size: 65536}}
	for name, wrap := range map[string]func(root string) snapshots.Snapshotter{
		"without maps": func(root string) snapshots.Snapshotter { return New(Config{Root: root}) },
		"idmap": func(root string) snapshots.Snapshotter {
			return &labelled{New(Config{Root: root, Strategy: IDMap}), owners.Map{UIDs: same, GIDs: same}}
		},
		"metacopy": func(root string) snapshots.Snapshotter {
			return &labelled{New(Config{Root: root, Strategy: Metacopy}), owners.Map{UIDs: same, GIDs: same}}
		},
		"chown": func(root string) snapshots.Snapshotter {
			return &labelled{New(Config{Root: root, Strategy: Chown}), owners.Map{UIDs: same, GIDs: same}}
		},
	} {
		if name != "metacopy" && os.Getenv("PODFSM_FULL") == "" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			testsuite.SnapshotterSuite(t, "overlayfs", func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				s := wrap(root)
				return s, s.Close, nil
			})
		})
	}
}

// node has a snapshotter with an image of two layers.
type node struct {
	*Snapshotter
	t    *testing.T
	root string
}

const (
	image = "test/2/top"

	waitFor = 10 * time.Second
	tick    = 5 * time.Millisecond
)

func newNode(t *testing.T, strategy Strategy) *node {
	t.Helper()
	n := &node{t: t, root: filepath.Join(t.TempDir(), "root")}
	n.open(strategy)
	t.Cleanup(func() { require.NoError(t, n.Close()) })
	n.commit("test/1/base", "", func(root string) {
		n.write(root, "file", 7, 8, 0o644)
		n.write(root, "suid", 0, 0, 0o755|os.ModeSetuid)
		n.write(root, "caps", 0, 0, 0o755)
		require.NoError(t, unix.Lsetxattr(filepath.Join(root, "caps"), "security.capability", capability, 0))
		n.write(root, "a", 1001, 5, 0o600)
		require.NoError(t, os.Link(filepath.Join(root, "a"), filepath.Join(root, "b")))
		require.NoError(t, os.Mkdir(filepath.Join(root, "dir"), 0o700))
		n.write(root, "dir/below", 1, 1, 0o600)
		require.NoError(t, os.Symlink("/etc/passwd", filepath.Join(root, "link")))
		require.NoError(t, os.Lchown(filepath.Join(root, "link"), 3, 3))
	})
	n.commit(image, "test/1/base", func(root string) { n.write(root, "top", 1, 2, 0o644) })
	return n
}

// open is what a start of containerd does.
func (n *node) open(strategy Strategy) { n.Snapshotter = New(Config{Root: n.root, Strategy: strategy}) }

// restart ends the snapshotter and opens another.
func (n *node) restart(strategy Strategy) {
	n.t.Helper()
	require.NoError(n.t, n.Close())
	n.open(strategy)
}

func (n *node) write(root, name string, uid, gid int, mode os.FileMode) {
	n.t.Helper()
	file := filepath.Join(root, name)
	require.NoError(n.t, os.WriteFile(file, bytes.Repeat([]byte(name+"\n"), 1000), 0o600))
	require.NoError(n.t, os.Lchown(file, uid, gid))
	require.NoError(n.t, os.Chmod(file, mode))
}

func (n *node) commit(name, parent string, change func(root string)) {
	n.t.Helper()
	mounts, err := n.Prepare(n.t.Context(), name+"-active", parent)
	require.NoError(n.t, err)
	n.mounted(mounts, change)
	require.NoError(n.t, n.Commit(n.t.Context(), name, name+"-active"))
}

func (n *node) mounted(mounts []mount.Mount, look func(root string)) {
	n.t.Helper()
	require.NoError(n.t, mount.WithTempMount(n.t.Context(), mounts, func(root string) error {
		look(root)
		return nil
	}))
}

func (n *node) pod(key string) []mount.Mount {
	n.t.Helper()
	mounts, err := n.Prepare(n.t.Context(), key, image, withMaps(podMap))
	require.NoError(n.t, err)
	return mounts
}

// keys are those of all snapshots below, hidden ones included.
func (n *node) keys() (keys []string) {
	n.t.Helper()
	b, err := n.existing()
	require.NoError(n.t, err)
	require.NoError(n.t, b.Walk(n.t.Context(), func(_ context.Context, info snapshots.Info) error {
		keys = append(keys, info.Name)
		return nil
	}))
	return keys
}

func (n *node) layers() (keys []string) {
	n.t.Helper()
	for _, key := range n.keys() {
		if hidden(key) {
			keys = append(keys, key)
		}
	}
	return keys
}

// dirs are those of snapshots on disk.
func (n *node) dirs() int {
	n.t.Helper()
	dirs, err := os.ReadDir(filepath.Join(n.root, "snapshots"))
	require.NoError(n.t, err)
	return len(dirs)
}

func (n *node) requireOwner(root, name string, uid, gid uint32) {
	n.t.Helper()
	stat, err := statOf(filepath.Join(root, name))
	require.NoError(n.t, err)
	require.Equal(n.t, [2]uint32{uid, gid}, [2]uint32{stat.Uid, stat.Gid}, name)
}

func attribute(t *testing.T, file, name string) []byte {
	t.Helper()
	value := make([]byte, 1024)
	n, err := unix.Lgetxattr(file, name, value)
	require.NoError(t, err, file)
	return value[:n]
}

func TestPods(t *testing.T) {
	for _, strategy := range strategies {
		t.Run(string(strategy), func(t *testing.T) {
			n := newNode(t, strategy)
			before := n.dirs()
			n.mounted(n.pod("pod"), func(root string) {
				n.requireOwner(root, ".", 131072, 262144)
				n.requireOwner(root, "file", 131072+7, 262144+8)
				n.requireOwner(root, "top", 131072+1, 262144+2)
				n.requireOwner(root, "a", 200001, 262144+5)
				n.requireOwner(root, "dir/below", 131072+1, 262144+1)
				n.requireOwner(root, "link", 131072+3, 262144+3)
				a, err := statOf(filepath.Join(root, "a"))
				require.NoError(t, err)
				b, err := statOf(filepath.Join(root, "b"))
				require.NoError(t, err)
				require.Equal(t, a.Ino, b.Ino)
				require.EqualValues(t, 2, a.Nlink)
				info, err := os.Lstat(filepath.Join(root, "suid"))
				require.NoError(t, err)
				require.Equal(t, 0o755|os.ModeSetuid, info.Mode())
				caps := attribute(t, filepath.Join(root, "caps"), "security.capability")
				require.Equal(t, append([]byte{1, 0, 0, 3}, append(bytes.Clone(capability[4:]), 0, 0, 2, 0)...), caps, "revision 3, root id 131072")
				content, err := os.ReadFile(filepath.Join(root, "a"))
				require.NoError(t, err)
				require.Equal(t, strings.Repeat("a\n", 1000), string(content))
				n.write(root, "file", 131072, 262144, 0o644)
			})

			info, err := n.Stat(t.Context(), "pod")
			require.NoError(t, err)
			require.Equal(t, image, info.Parent)
			require.Len(t, n.layers(), map[Strategy]int{Metacopy: 1, Chown: 1}[strategy])
			for _, key := range n.layers() {
				_, err = n.Stat(t.Context(), key)
				require.True(t, errdefs.IsNotFound(err), "%v", err)
				require.True(t, errdefs.IsNotFound(n.Remove(t.Context(), key)))
				_, err = n.Prepare(t.Context(), "other", key)
				require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
			}
			require.NoError(t, n.Walk(t.Context(), func(_ context.Context, info snapshots.Info) error {
				require.NotContains(t, info.Name+info.Parent, "podfsm")
				return nil
			}))
			var found []string
			require.NoError(t, n.Walk(t.Context(), func(_ context.Context, info snapshots.Info) error {
				found = append(found, info.Name)
				return nil
			}, `kind==active,parent=="`+image+`"`))
			require.Equal(t, []string{"pod"}, found)
			usage, err := n.Usage(t.Context(), "pod")
			require.NoError(t, err)
			require.EqualValues(t, 2, usage.Inodes, "the root and the file that was written")

			// It is the same for the daemon's next run, whatever that takes for new pods.
			n.restart(Chown)
			mounts, err := n.Mounts(t.Context(), "pod")
			require.NoError(t, err)
			n.mounted(mounts, func(root string) {
				n.requireOwner(root, "top", 131072+1, 262144+2)
				n.requireOwner(root, "file", 131072, 262144)
			})

			require.NoError(t, n.Cleanup(t.Context()))
			mounts, err = n.Mounts(t.Context(), "pod") // to mount changes the last ones
			require.NoError(t, err)
			n.mounted(mounts, func(root string) { n.requireOwner(root, "a", 200001, 262144+5) })
			require.NoError(t, n.Remove(t.Context(), "pod"))
			require.NoError(t, n.Cleanup(t.Context()))
			require.Empty(t, n.layers())
			require.Equal(t, before, n.dirs())
		})
	}
}

func TestMountsOfOthersAreStock(t *testing.T) {
	options := []string{"xino=off", "metacopy=off"}
	for _, strategy := range strategies {
		n := newNode(t, strategy)
		n.restart(strategy)
		n.config.MountOptions = options
		n.pod("userns")
		_, err := n.Prepare(t.Context(), "host", image)
		require.NoError(t, err)
		_, err = n.View(t.Context(), "view", image)
		require.NoError(t, err)
		_, err = n.View(t.Context(), "small", "test/1/base")
		require.NoError(t, err)

		ours := map[string][]mount.Mount{}
		for _, key := range []string{"userns", "host", "view", "small"} {
			ours[key], err = n.Mounts(t.Context(), key)
			require.NoError(t, err)
		}
		require.NoError(t, n.Close())
		stock, err := overlay.NewSnapshotter(n.root, overlay.WithRemapIDs, overlay.WithMountOptions(options))
		require.NoError(t, err)
		for _, key := range []string{"host", "view", "small"} {
			mounts, err := stock.Mounts(t.Context(), key)
			require.NoError(t, err)
			require.Equal(t, mounts, ours[key], key)
		}
		mounts, err := stock.Mounts(t.Context(), "userns")
		require.NoError(t, err)
		require.Equal(t, strategy == IDMap, mounts[0].Options[0] == ours["userns"][0].Options[0])
		require.Equal(t, strategy == Metacopy, ours["userns"][0].Options[len(ours["userns"][0].Options)-1] == "metacopy=on")
		require.NoError(t, stock.Close())
		n.open(strategy)
	}
}

func TestSnapshotsOnAPod(t *testing.T) {
	for _, strategy := range layered {
		n := newNode(t, strategy)
		n.mounted(n.pod("pod"), func(root string) { n.write(root, "new", 131072, 262144, 0o644) })
		require.NoError(t, n.Commit(t.Context(), "committed", "pod"))
		for name, opt := range map[string]snapshots.Opt{"with the map": withMaps(podMap), "without": snapshots.WithLabels(nil)} {
			mounts, err := n.Prepare(t.Context(), name, "committed", opt)
			require.NoError(t, err)
			n.mounted(mounts, func(root string) {
				n.requireOwner(root, ".", 131072, 262144)
				n.requireOwner(root, "new", 131072, 262144)
				n.requireOwner(root, "a", 200001, 262144+5)
				_, err := os.ReadFile(filepath.Join(root, "a"))
				require.NoError(t, err)
			})
		}
		require.Len(t, n.layers(), 1)
		other := owners.Map{UIDs: podMap.GIDs, GIDs: podMap.GIDs}
		_, err := n.Prepare(t.Context(), "other", "committed", withMaps(other))
		require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	}
}

func TestScratch(t *testing.T) {
	for _, strategy := range strategies {
		n := newNode(t, strategy)
		mounts, err := n.Prepare(t.Context(), "scratch", "", withMaps(podMap))
		require.NoError(t, err)
		n.mounted(mounts, func(root string) { n.requireOwner(root, ".", 131072, 262144) })
	}
}

func TestManyAtOnceMakeOneLayer(t *testing.T) {
	n := newNode(t, Metacopy)
	var group errgroup.Group
	for i := range 16 {
		group.Go(func() error {
			_, err := n.Prepare(t.Context(), fmt.Sprint("pod-", i), image, withMaps(podMap))
			return err
		})
	}
	require.NoError(t, group.Wait())
	require.Len(t, n.layers(), 1)
	require.EqualValues(t, 1, n.Totals()[Metacopy].Layers)
	require.EqualValues(t, 9, n.Totals()[Metacopy].Inodes)
	// The order of the ranges doesn't matter.
	_, err := n.Prepare(t.Context(), "turned", image, withMaps(owners.Map{UIDs: []specs.LinuxIDMapping{podMap.UIDs[1], podMap.UIDs[0]}, GIDs: podMap.GIDs}))
	require.NoError(t, err)
	require.Len(t, n.layers(), 1)
}

// theLayer is the one that pods of the image get in this boot.
func theLayer(t *testing.T, strategy Strategy) layer {
	t.Helper()
	boot, err := os.ReadFile(bootIDFile)
	require.NoError(t, err)
	return layer{strategy, podMap, strings.TrimSpace(string(boot)), image}
}

// TestLayersAfterAReboot makes a layer anew for the pods of another boot, and keeps the one of the pods from before.
func TestLayersAfterAReboot(t *testing.T) {
	n := newNode(t, Metacopy)
	n.pod("before")
	real := bootIDFile
	t.Cleanup(func() { bootIDFile = real })
	bootIDFile = filepath.Join(t.TempDir(), "boot_id")
	require.NoError(t, os.WriteFile(bootIDFile, []byte("another\n"), 0o644))
	n.restart(Metacopy)
	n.pod("after")
	require.Len(t, n.layers(), 2)
	mounts, err := n.Mounts(t.Context(), "before")
	require.NoError(t, err)
	n.mounted(mounts, func(root string) { n.requireOwner(root, "a", 200001, 262144+5) })
	require.NoError(t, n.Remove(t.Context(), "before"))
	require.NoError(t, n.Cleanup(t.Context()))
	require.Equal(t, []string{theLayer(t, Metacopy).key()}, n.layers())
}

// at has f called at a phase of making a layer.
func at(t *testing.T, phase string, f func(ctx context.Context) error) {
	real := AtPhase
	AtPhase = func(ctx context.Context, p string) error {
		if p == phase {
			return f(ctx)
		}
		return nil
	}
	t.Cleanup(func() { AtPhase = real })
}

func TestCallersThatGoAway(t *testing.T) {
	n := newNode(t, Metacopy)
	reached, proceed := make(chan struct{}), make(chan struct{})
	once := sync.OnceFunc(func() { close(reached) })
	at(t, PhaseMounted, func(ctx context.Context) error {
		once()
		select {
		case <-proceed:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	prepare := func(ctx context.Context, key string) chan error {
		done := make(chan error, 1)
		go func() {
			_, err := n.Prepare(ctx, key, image, withMaps(podMap))
			done <- err
		}()
		return done
	}
	first, leaveFirst := context.WithCancel(t.Context())
	second, leaveSecond := context.WithCancel(t.Context())
	a := prepare(first, "a")
	<-reached
	b := prepare(second, "b")
	require.Eventually(t, func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.entries[theLayer(t, Metacopy).key()].users == 2
	}, waitFor, tick)

	leaveFirst()
	require.ErrorIs(t, <-a, context.Canceled)
	leaveSecond()
	require.ErrorIs(t, <-b, context.Canceled)

	// Their retry joins what they have begun.
	c := prepare(t.Context(), "c")
	close(proceed)
	require.NoError(t, <-c)
	require.Len(t, n.layers(), 1)
	require.EqualValues(t, 1, n.Totals()[Metacopy].Layers)
	require.Empty(t, n.entries)
}

// TestStopped ends what is under way when containerd stops.
func TestStopped(t *testing.T) {
	n := newNode(t, Metacopy)
	reached := make(chan struct{})
	at(t, PhaseMounted, func(ctx context.Context) error {
		close(reached)
		<-ctx.Done()
		return ctx.Err()
	})
	done := make(chan error, 1)
	go func() {
		_, err := n.Prepare(t.Context(), "pod", image, withMaps(podMap))
		done <- err
	}()
	<-reached
	require.NoError(t, n.Close())
	require.ErrorIs(t, <-done, context.Canceled)
	_, err := n.Prepare(t.Context(), "late", image, withMaps(podMap))
	require.Error(t, err)
	n.open(Metacopy)
	require.Empty(t, n.layers())
}

// TestCollectedWhileAsked removes a layer again and again while pods come and go.
func TestCollectedWhileAsked(t *testing.T) {
	n := newNode(t, Metacopy)
	var group errgroup.Group
	for i := range 4 {
		group.Go(func() error {
			for range 25 {
				key := fmt.Sprint("pod-", i)
				if _, err := n.Prepare(t.Context(), key, image, withMaps(podMap)); err != nil {
					return err
				}
				if err := n.Remove(t.Context(), key); err != nil {
					return err
				}
				if err := n.Cleanup(t.Context()); err != nil {
					return err
				}
			}
			return nil
		})
	}
	require.NoError(t, group.Wait())
	require.Empty(t, n.entries)
	require.NoError(t, n.Cleanup(t.Context()))
	require.Empty(t, n.layers())
}

// TestLinksInManyDirectories gives files other owners that are linked into directories which are worked on at a time: overlayfs may
// say ESTALE of a path while another path of the same file is copied up.
func TestLinksInManyDirectories(t *testing.T) {
	const dirs, files = 60, 20
	for _, strategy := range layered {
		n := newNode(t, strategy)
		n.commit("links", image, func(root string) {
			for d := range dirs {
				require.NoError(t, os.Mkdir(filepath.Join(root, fmt.Sprint(d)), 0o755))
				for f := range files {
					if name := fmt.Sprintf("%d/%d", d, f); d == 0 {
						n.write(root, name, 5, 5, 0o600)
					} else {
						require.NoError(t, os.Link(filepath.Join(root, fmt.Sprintf("0/%d", f)), filepath.Join(root, name)))
					}
				}
			}
		})
		for i := range 2 {
			extents := []specs.LinuxIDMapping{{HostID: uint32(i+1) * 65536, Size: 65536}}
			mounts, err := n.Prepare(t.Context(), fmt.Sprint("pod-", i), "links", withMaps(owners.Map{UIDs: extents, GIDs: extents}))
			require.NoError(t, err)
			n.mounted(mounts, func(root string) {
				for f := range files {
					first, err := statOf(filepath.Join(root, fmt.Sprintf("0/%d", f)))
					require.NoError(t, err)
					last, err := statOf(filepath.Join(root, fmt.Sprintf("%d/%d", dirs-1, f)))
					require.NoError(t, err)
					require.Equal(t, first.Ino, last.Ino)
					require.EqualValues(t, dirs, first.Nlink)
					require.EqualValues(t, extents[0].HostID+5, last.Uid)
				}
			})
		}
	}
}

// TestKilled leaves what a kill in each phase leaves on disk and on record.
func TestKilled(t *testing.T) {
	for _, strategy := range layered {
		for _, phase := range []string{PhasePrepared, PhaseMounted, PhaseShifted, PhaseCommitted} {
			t.Run(string(strategy)+" "+phase, func(t *testing.T) {
				n := newNode(t, strategy)
				before := n.dirs()
				at(t, phase, func(context.Context) error { return errors.New("killed") })
				b, err := n.existing()
				require.NoError(t, err)
				killed := &backend{undying{b.Snapshotter}, b.store, b.root}
				_, err = killed.remap(t.Context(), theLayer(t, strategy))
				require.ErrorContains(t, err, "killed")
				require.Len(t, n.layers(), 1)
				AtPhase = func(context.Context, string) error { return nil }

				// The next one in the same run, and in the next run.
				n.mounted(n.pod("pod"), func(root string) { n.requireOwner(root, "a", 200001, 262144+5) })
				n.restart(strategy)
				require.Len(t, n.layers(), 1)
				require.NoError(t, n.Remove(t.Context(), "pod"))
				require.NoError(t, n.Cleanup(t.Context()))
				require.Empty(t, n.layers())
				require.Equal(t, before, n.dirs())
			})
		}
	}
}

// undying is a snapshotter for one that is killed: nothing is removed any more.
type undying struct{ snapshots.Snapshotter }

func (u undying) Remove(ctx context.Context, key string) error {
	if _, err := u.Stat(ctx, key); err != nil {
		return err
	}
	return nil
}

func (u undying) Cleanup(context.Context) error { return nil }

func TestSweep(t *testing.T) {
	n := newNode(t, Metacopy)
	before := n.dirs()
	b, err := n.existing()
	require.NoError(t, err)
	_, err = b.Prepare(t.Context(), theLayer(t, Metacopy).making(), image)
	require.NoError(t, err)
	require.NoError(t, os.MkdirAll(filepath.Join(n.root, "probe-1/lower"), 0o755))
	n.restart(Metacopy)
	_, err = n.Stat(t.Context(), image)
	require.NoError(t, err)
	require.Empty(t, n.layers())
	require.Eventually(t, func() bool { return n.dirs() == before }, waitFor, tick)
	require.NoDirExists(t, filepath.Join(n.root, "probe-1"))
}

func TestIDsThatAreNotMapped(t *testing.T) {
	for _, strategy := range layered {
		n := newNode(t, strategy)
		before := n.dirs()
		small := []specs.LinuxIDMapping{{HostID: 131072, Size: 1000}}
		for range 2 {
			_, err := n.Prepare(t.Context(), "pod", image, withMaps(owners.Map{UIDs: small, GIDs: small}))
			require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
			require.ErrorContains(t, err, `uid 1001 of file "a"`)
		}
		require.Empty(t, n.layers())
		require.Equal(t, before, n.dirs())
	}
}

func TestBadMaps(t *testing.T) {
	n := newNode(t, Metacopy)
	for _, bad := range [][2]string{{"0:1:2", ""}, {"", "0:1:2"}, {"1:1:1", "0:1:2"}, {"0:1", "0:1:2"}, {"0:-1:2", "0:1:2"}, {"0:1:2,0:4:2", "0:1:2"}, {"x", "x"}} {
		_, err := n.Prepare(t.Context(), "pod", image, snapshots.WithLabels(map[string]string{
			snapshots.LabelSnapshotUIDMapping: bad[0], snapshots.LabelSnapshotGIDMapping: bad[1],
		}))
		require.True(t, errdefs.IsInvalidArgument(err), "%v: %v", bad, err)
	}
	require.Empty(t, n.layers())
	_, err := n.Prepare(t.Context(), "pod", "none", withMaps(podMap))
	require.True(t, errdefs.IsNotFound(err), "%v", err)
}

func TestImageGoesWithItsLayers(t *testing.T) {
	n := newNode(t, Metacopy)
	ready, ok, err := Prepared(t.Context(), n, image, podMap)
	require.NoError(t, err)
	require.True(t, ok)
	require.Equal(t, Metacopy, ready.Strategy)
	require.EqualValues(t, 9, ready.Work.Inodes)
	require.NoError(t, n.Cleanup(t.Context()))
	require.Len(t, n.layers(), 1, "it is held")
	require.True(t, errdefs.IsFailedPrecondition(n.Remove(t.Context(), image)))
	n.pod("pod")
	ready.Release()
	require.True(t, errdefs.IsFailedPrecondition(n.Remove(t.Context(), image)))
	again, _, err := Prepared(t.Context(), n, image, podMap)
	require.NoError(t, err)
	require.Zero(t, again.Work)
	again.Release()
	again.Release()
	require.NoError(t, n.Remove(t.Context(), "pod"))
	require.NoError(t, n.Remove(t.Context(), image))
	require.Empty(t, n.layers())
	require.NoError(t, n.Remove(t.Context(), "test/1/base"))
	require.NoError(t, n.Cleanup(t.Context()))
	require.Zero(t, n.dirs())
}

func TestUnusedCostsNothing(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	s := New(Config{Root: root, Strategy: "nonsense"})
	require.NoError(t, s.Walk(t.Context(), nil))
	require.NoError(t, s.Cleanup(t.Context()))
	_, err := s.Stat(t.Context(), "pod")
	require.True(t, errdefs.IsNotFound(err))
	require.True(t, errdefs.IsNotFound(s.Remove(t.Context(), "pod")))
	require.NoDirExists(t, root)
	require.NoError(t, s.Close())
}

func TestRefusals(t *testing.T) {
	n := newNode(t, "nonsense")
	_, err := n.Prepare(t.Context(), "pod", image, withMaps(podMap))
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	require.ErrorContains(t, err, `strategy "nonsense" isn't one of auto, idmap, metacopy and chown`)
	_, err = n.Prepare(t.Context(), "host", image)
	require.NoError(t, err)

	nothing := Report{{Strategy: IDMap, Evidence: "no", Remedy: "buy"}, {Strategy: Chown, Evidence: "neither", Remedy: "sell"}}
	_, err = nothing.Best()
	require.True(t, errdefs.IsFailedPrecondition(err))
	require.ErrorContains(t, err, "idmap doesn't work: no; buy. chown doesn't work: neither; sell")
	require.ErrorContains(t, nothing.check(Chown), "chown doesn't work: neither; sell")
}

// TestNothingWorks has a pod with id maps refused, and no other.
func TestNothingWorks(t *testing.T) {
	n := &node{t: t, root: t.TempDir()}
	require.NoError(t, unix.Mount("ramfs", n.root, "ramfs", 0, ""))
	defer func() { require.NoError(t, unix.Unmount(n.root, unix.MNT_DETACH)) }()
	n.open("")
	n.commit(image, "", func(root string) { n.write(root, "file", 0, 0, 0o644) })
	for range 2 {
		_, err := n.Prepare(t.Context(), "pod", image, withMaps(podMap))
		require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
		for _, says := range []string{"idmap doesn't work: ", "needs Linux 5.19", "metacopy doesn't work: ", "chown doesn't work: ", "file handles"} {
			require.ErrorContains(t, err, says)
		}
	}
	_, err := n.Prepare(t.Context(), "host", image)
	require.NoError(t, err)
	require.NoError(t, n.Close())
}

func TestProbe(t *testing.T) {
	dir := t.TempDir()
	report, err := Probe(t.Context(), dir)
	require.NoError(t, err)
	require.Len(t, report, 3)
	for _, v := range report {
		require.True(t, v.Works, "%+v", v)
		require.Empty(t, v.Remedy)
		t.Log(v.Strategy, v.Evidence)
	}
	require.Contains(t, report[0].Evidence, fmt.Sprintf("as of uid %d", userns.TryHostID))
	best, err := report.Best()
	require.NoError(t, err)
	require.Equal(t, IDMap, best)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)

	// On ramfs nothing works.
	require.NoError(t, unix.Mount("ramfs", dir, "ramfs", 0, ""))
	defer func() { require.NoError(t, unix.Unmount(dir, 0)) }()
	report, err = Probe(t.Context(), dir)
	require.NoError(t, err)
	for _, v := range report {
		require.False(t, v.Works, "%+v", v)
		require.NotEmpty(t, v.Remedy)
		t.Log(v.Strategy, v.Evidence)
	}
}

func TestNoMountIsSeen(t *testing.T) {
	n := newNode(t, Metacopy)
	at(t, PhaseMounted, func(context.Context) error {
		mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
			return !strings.Contains(m.Mountpoint+m.VFSOptions, n.root), false
		})
		require.NoError(t, err)
		require.Empty(t, mounts)
		return nil
	})
	n.pod("pod")
}
