package owners

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// shiftDir shifts the tree in a directory.
func shiftDir(t testing.TB, dir string, m Map) (Stats, error) {
	t.Helper()
	root, err := os.OpenFile(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	require.NoError(t, err)
	defer root.Close()
	return Shift(context.Background(), root, m)
}

func TestUnmappedIDs(t *testing.T) {
	dir := t.TempDir()
	for name, uid := range map[string]int{"a": 0, "b\n": 70000, "c": 65536, "d": 1} {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, nil, 0o644))
		require.NoError(t, os.Chown(path, uid, 0))
	}
	_, err := shiftDir(t, dir, podMap)
	require.EqualError(t, err, `failed to change the owners of files: uid 70000 of file "b\n" is not one of the ids that are mapped (0-65535), `+
		`and 1 other files have such ids: failed precondition`)
	require.True(t, errdefs.IsFailedPrecondition(err))
}

func TestDeepAndWide(t *testing.T) {
	dir := t.TempDir()
	const depth, wide = 600, 3000
	at, err := unix.Open(dir, unix.O_PATH, 0)
	require.NoError(t, err)
	for range depth { // ten times as long as a path can be
		require.NoError(t, unix.Mkdirat(at, strings.Repeat("d", 100), 0o755))
		next, err := unix.Openat(at, strings.Repeat("d", 100), unix.O_PATH, 0)
		require.NoError(t, err)
		require.NoError(t, unix.Close(at))
		at = next
	}
	defer unix.Close(at)
	for n := range wide {
		require.NoError(t, os.Mkdir(filepath.Join(dir, fmt.Sprint(n)), 0o755))
	}

	limited(t, 16)
	stats, err := shiftDir(t, dir, podMap)
	require.NoError(t, err)
	require.Equal(t, Stats{Inodes: 1 + depth + wide, Paths: 1 + depth + wide}, stats)
	var st unix.Stat_t
	require.NoError(t, unix.Fstatat(at, "", &st, unix.AT_EMPTY_PATH))
	require.EqualValues(t, []uint32{200000, 300000}, []uint32{st.Uid, st.Gid})
}

// limited lets this process open few more descriptors than it has.
func limited(t testing.TB, more int) {
	t.Helper()
	open, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	var old unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &old))
	few := unix.Rlimit{Cur: uint64(len(open) + more), Max: old.Max}
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &few))
	t.Cleanup(func() { require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &old)) })
}

// Links are found by several workers at once, and each finds the owners from before any change.
func TestLinksOfManyDirectories(t *testing.T) {
	const dirs, files = 64, 16
	for _, option := range []string{"metacopy=on", "metacopy=off"} {
		t.Run(option, func(t *testing.T) {
			o := overlays{t.TempDir()}
			layer, upper := o.newDir(t, "layer"), o.newDir(t, "upper")
			for n := range files {
				for d := range dirs {
					dir := filepath.Join(layer, fmt.Sprint(d))
					path := filepath.Join(dir, fmt.Sprint(n))
					if d > 0 {
						require.NoError(t, os.MkdirAll(dir, 0o755))
						require.NoError(t, os.Link(filepath.Join(layer, "0", fmt.Sprint(n)), path))
						continue
					}
					require.NoError(t, os.MkdirAll(dir, 0o755))
					require.NoError(t, os.WriteFile(path, []byte("content"), 0o755))
					require.NoError(t, os.Chown(path, n, n))
					require.NoError(t, os.Chmod(path, 0o755|os.ModeSetuid))
					require.NoError(t, unix.Setxattr(path, nameCapability, words(capabilityV2, 1, 1, 0, 0), 0))
				}
			}
			merged, unmount := o.mount(t, []string{layer}, upper, "index=on", option)
			stats, err := shiftDir(t, merged, podMap)
			require.NoError(t, err)
			require.Equal(t, Stats{Inodes: 1 + dirs + files, Paths: 1 + dirs + dirs*files, Bytes: files * 7}, stats)
			unmount()

			tree, err := look(upper)
			require.NoError(t, err)
			for n := range files {
				for d := range dirs {
					f := tree[fmt.Sprintf("%d/%d", d, n)]
					require.EqualValues(t, []any{uint32(200000 + n), uint32(300000 + n), uint64(dirs), "104755", fmt.Sprintf("0/%d", n)},
						[]any{f.UID, f.GID, f.Links, f.Mode, f.Same})
					require.Equal(t, hex.EncodeToString(words(capabilityV3, 1, 1, 0, 0, 200000)), f.Attributes[nameCapability])
				}
			}
		})
	}
}

func TestThereAndBack(t *testing.T) {
	dir := t.TempDir()
	f := &forest{T: t, Random: rand.New(rand.NewPCG(1, 1)), root: dir}
	f.Grow(200)
	before, err := look(dir)
	require.NoError(t, err)
	_, err = shiftDir(t, dir, podMap)
	require.NoError(t, err)
	_, err = shiftDir(t, dir, podMap.Inverse())
	require.NoError(t, err)
	after, err := look(dir)
	require.NoError(t, err)
	require.Equal(t, before, after)
}

func TestImmutable(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "im\tmutable")
	require.NoError(t, os.WriteFile(path, nil, 0o644))
	setFlags(t, path, fsImmutable)
	defer setFlags(t, path, 0)
	_, err := shiftDir(t, dir, podMap)
	require.EqualError(t, err, `failed to change the owners of files: file "im\tmutable" is immutable or append-only; change that with chattr -i -a: `+
		`operation not permitted: failed precondition`)
}

// fsImmutable is FS_IMMUTABLE_FL of linux/fs.h.
const fsImmutable = 0x10

func setFlags(t testing.TB, path string, flags uint32) {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags)))
}

func TestMountBelow(t *testing.T) {
	for _, name := range []string{"file", "dir"} {
		t.Run(name, func(t *testing.T) {
			dir, outside := t.TempDir(), t.TempDir()
			source, target := outside, filepath.Join(dir, "dir")
			require.NoError(t, os.Mkdir(target, 0o755))
			if name == "file" {
				source, target = filepath.Join(outside, "file"), filepath.Join(dir, "file")
				require.NoError(t, os.WriteFile(source, nil, 0o644))
				require.NoError(t, os.WriteFile(target, nil, 0o644))
			}
			require.NoError(t, unix.Mount(source, target, "", unix.MS_BIND, ""))
			defer unix.Unmount(target, 0)
			before, err := look(outside)
			require.NoError(t, err)
			_, err = shiftDir(t, dir, podMap)
			require.ErrorContains(t, err, fmt.Sprintf("file %q is a mount point; unmount it", name))
			require.True(t, errdefs.IsFailedPrecondition(err))
			after, err := look(outside)
			require.NoError(t, err)
			require.Equal(t, before, after)
		})
	}
}

// While a tree is shifted, its files and directories turn into links to a tree outside and back. Whatever the walk makes of that, it leaves
// the tree outside alone.
func TestSwapsDuringTheWalk(t *testing.T) {
	outside := t.TempDir()
	f := &forest{T: t, Random: rand.New(rand.NewPCG(2, 2)), root: outside}
	f.Grow(50)
	const dirs = 20
	for n := range dirs {
		dir := filepath.Join(outside, fmt.Sprint("dir", n))
		require.NoError(t, os.Mkdir(dir, 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o755))
		require.NoError(t, os.Chmod(filepath.Join(dir, "file"), 0o755|os.ModeSetuid))
	}
	before, err := look(outside)
	require.NoError(t, err)

	root := t.TempDir()
	for n := range dirs {
		dir := filepath.Join(root, fmt.Sprint("dir", n))
		require.NoError(t, os.Mkdir(dir, 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o755))
		require.NoError(t, os.Chmod(filepath.Join(dir, "file"), 0o755|os.ModeSetuid))
		require.NoError(t, os.Symlink(filepath.Join(outside, fmt.Sprint("dir", n)), dir+"~"))
		require.NoError(t, os.Symlink(filepath.Join(outside, fmt.Sprint("dir", n), "file"), filepath.Join(dir, "file~")))
	}
	ctx, stop := context.WithCancel(context.Background())
	swaps := make(chan int)
	go func() {
		n := 0
		for ; ctx.Err() == nil; n++ {
			dir := filepath.Join(root, fmt.Sprint("dir", n%dirs))
			for _, path := range []string{filepath.Join(dir, "file"), dir} {
				_ = unix.Renameat2(unix.AT_FDCWD, path, unix.AT_FDCWD, path+"~", unix.RENAME_EXCHANGE)
			}
		}
		swaps <- n
	}()
	met := 0
	for range 300 {
		// A map of all ids to themselves, so that the tree can be shifted again and again.
		all := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 100000}, {ContainerID: 200000, HostID: 0, Size: 100000}}
		if _, err := shiftDir(t, root, Map{UIDs: all, GIDs: all}); err != nil {
			met++
		}
	}
	stop()
	t.Logf("%d swaps, %d walks of 300 met one", <-swaps, met)
	after, err := look(outside)
	require.NoError(t, err)
	require.Equal(t, before, after)
}

func TestCancelled(t *testing.T) {
	dir := t.TempDir()
	for n := range 2000 {
		require.NoError(t, os.WriteFile(filepath.Join(dir, fmt.Sprint(n)), nil, 0o644))
	}
	root, err := os.Open(dir)
	require.NoError(t, err)
	defer root.Close()
	cause := errors.New("no longer wanted")
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(cause)
	stats, err := Shift(ctx, root, podMap)
	require.ErrorIs(t, err, cause)
	require.Less(t, stats.Paths, int64(2000))
}
