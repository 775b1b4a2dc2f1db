package userns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// mounted mounts a filesystem in a new directory, until the test ends.
func mounted(t testing.TB, filesystem, options string) string {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, unix.Mount(filesystem, dir, filesystem, 0, options))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, 0)) })
	return dir
}

func TestCheckVolume(t *testing.T) {
	pid := inUserNS(t, Mapping{HostID: 1_500_000_000, Length: 100}, Mapping{HostID: 1_500_001_000, Length: 200})
	tmpfs, ramfs := mounted(t, "tmpfs", ""), mounted(t, "ramfs", "")
	for _, dir := range []string{tmpfs, ramfs} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
		require.NoError(t, unix.Mknod(filepath.Join(dir, "socket"), unix.S_IFSOCK|0o600, 0))
		require.NoError(t, os.Symlink("file", filepath.Join(dir, "link")))
		require.NoError(t, os.Symlink("nowhere", filepath.Join(dir, "broken")))
	}
	overlay := mounted(t, "overlay", "lowerdir="+t.TempDir()+":"+t.TempDir())
	across := filepath.Join(tmpfs, "across")
	require.NoError(t, os.Symlink(ramfs, across))
	ofTest := mountinfo.PrefixFilter(filepath.Dir(tmpfs))
	before, err := mountinfo.GetMounts(ofTest)
	require.NoError(t, err)
	require.Len(t, before, 3)

	for _, below := range []string{"", "file", "socket", "link", "broken", "not/there/yet"} {
		require.NoError(t, CheckVolume(filepath.Join(tmpfs, below), pid), below)
		err := CheckVolume(filepath.Join(ramfs, below), pid)
		require.True(t, errdefs.IsFailedPrecondition(err), "%q: %v", below, err)
		require.ErrorContains(t, err, "ramfs")
		require.NoFileExists(t, filepath.Join(tmpfs, "not"))
	}
	for path, filesystem := range map[string]string{across: "ramfs", across + "/file": "ramfs", overlay: "overlay", "/proc/self": "proc"} {
		err := CheckVolume(path, pid)
		require.True(t, errdefs.IsFailedPrecondition(err), "%q: %v", path, err)
		require.ErrorContains(t, err, filesystem)
	}
	after, err := mountinfo.GetMounts(ofTest)
	require.NoError(t, err)
	require.Equal(t, before, after, "nothing is mounted for a look")
}

// The runtime binds what is mounted below a volume, and maps only the volume itself.
func TestCheckBelow(t *testing.T) {
	volume, plain := mounted(t, "tmpfs", ""), t.TempDir()
	mountAt := func(path string) {
		require.NoError(t, os.MkdirAll(path, 0o755))
		require.NoError(t, unix.Mount("tmpfs", path, "tmpfs", 0, ""))
		t.Cleanup(func() { require.NoError(t, unix.Unmount(path, 0)) })
	}
	link := filepath.Join(t.TempDir(), "link")
	require.NoError(t, os.Symlink(volume, link))
	require.NoError(t, os.Mkdir(filepath.Join(volume, "sub"), 0o755))
	mountAt(filepath.Join(volume, "sub mount"))
	mountAt(filepath.Join(volume, "sub mount/deep/er"))

	below := func(path string) string {
		err := CheckBelow([]string{plain, filepath.Join(volume, "not/here"), path})
		unmappable := new(UnmappableError)
		if !errors.As(err, &unmappable) {
			require.NoError(t, err)
			return ""
		}
		require.True(t, errdefs.IsFailedPrecondition(err))
		require.Equal(t, path, unmappable.Volume)
		require.ErrorContains(t, err, fmt.Sprintf("%q, of the filesystem tmpfs, is mounted below it", unmappable.Below))
		return strings.TrimPrefix(unmappable.Below, volume)
	}
	for path, want := range map[string]string{
		volume:                                  "/sub mount",
		link:                                    "/sub mount",
		filepath.Join(volume, "sub mount"):      "/sub mount/deep/er",
		filepath.Join(volume, "sub mount/deep"): "/sub mount/deep/er",
		filepath.Join(volume, "sub mount/deep/er"):  "",
		filepath.Join(volume, "sub"):                "", // the name of a mount begins with its own
		filepath.Join(volume, "sub mount/not/here"): "", // it is to be made
	} {
		require.Equal(t, want, below(path), path)
	}

	require.NoError(t, unix.Mount("tmpfs", volume, "tmpfs", 0, ""))
	covered := below(volume)
	require.NoError(t, unix.Unmount(volume, 0))
	require.Empty(t, covered, "what another mount covers")
	require.ErrorIs(t, CheckBelow([]string{plain, "/dev/null/volume"}), unix.ENOTDIR)
}

// A node has mounts for each of its pods: the volumes of a container take one list of them.
func TestCheckBelowListsMountsOnce(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	list, err := os.ReadFile("/proc/thread-self/mountinfo")
	require.NoError(t, err)
	read := func() (bytes int) {
		text, err := os.ReadFile("/proc/thread-self/io")
		require.NoError(t, err)
		_, err = fmt.Sscanf(string(text), "rchar: %d", &bytes)
		require.NoError(t, err)
		return bytes
	}
	cost := func(volumes int) int {
		var paths []string
		for range volumes {
			paths = append(paths, t.TempDir())
		}
		before := read()
		require.NoError(t, CheckBelow(paths))
		return read() - before
	}
	one, many := cost(1), cost(20)
	require.GreaterOrEqual(t, one, len(list)/2, "it is counted")
	require.Less(t, many, one+len(list)/2)
}

// automounted is the volume of the process that TestCheckVolumeAutomounts runs.
const automounted = "PODFSM_TEST_AUTOMOUNTED"

// An automount point is triggered, as a mount of it would, and what is mounted then is judged. The test is the daemon of one, autofs(5), so
// another process looks: those of the daemon's process group trigger nothing.
func TestCheckVolumeAutomounts(t *testing.T) {
	if path := os.Getenv(automounted); path != "" {
		err := CheckVolume(path, inUserNS(t, Mapping{HostID: 1_500_000_000, Length: 100}, Mapping{HostID: 1_500_001_000, Length: 200}))
		require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
		require.ErrorContains(t, err, "the ids of its filesystem, ramfs")
		return
	}
	ownMounts(t)
	for _, below := range []string{"", "below", "not/there"} {
		dir := t.TempDir()
		requests, answers, err := os.Pipe()
		require.NoError(t, err)
		defer requests.Close()
		options := fmt.Sprintf("fd=%d,pgrp=%d,minproto=5,maxproto=5,direct", answers.Fd(), unix.Getpgrp())
		require.NoError(t, unix.Mount("test", dir, "autofs", 0, options))
		t.Cleanup(func() { // and of what is mounted there
			for range 2 {
				require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH))
			}
		})
		require.NoError(t, answers.Close()) // the kernel has it
		point, err := os.Open(dir)
		require.NoError(t, err)
		defer point.Close()

		look := exec.Command(os.Args[0], "-test.run=^TestCheckVolumeAutomounts$")
		look.Env = append(os.Environ(), automounted+"="+filepath.Join(dir, below))
		look.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		var said strings.Builder
		look.Stdout, look.Stderr = &said, &said
		require.NoError(t, look.Start())
		require.NoError(t, requests.SetReadDeadline(time.Now().Add(time.Minute)))
		request := make([]byte, 512)
		_, err = requests.Read(request)
		require.NoError(t, err, "it triggers nothing")
		require.NoError(t, unix.Mount("ramfs", dir, "ramfs", 0, ""))
		require.NoError(t, os.Mkdir(filepath.Join(dir, "below"), 0o755))
		const ready = 0x9360 // AUTOFS_IOC_READY, of the request's token, which is behind a version and a type
		require.NoError(t, unix.IoctlSetInt(int(point.Fd()), ready, int(binary.NativeEndian.Uint32(request[8:]))))
		require.NoError(t, look.Wait(), "%q: %s", below, &said)
	}
}

// ownMounts gives the test's thread, and what it starts, a private mount namespace. The thread ends
// with the test.
func ownMounts(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	require.NoError(t, unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS))
	require.NoError(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
}

// The kernel maps the ids of a mount once.
func TestCheckVolumeThatIsMapped(t *testing.T) {
	pid := inUserNS(t, Mapping{HostID: 1_500_000_000, Length: 100}, Mapping{HostID: 1_500_001_000, Length: 200})
	users, err := mount.GetUsernsFD("0:1500000000:100", "0:1500001000:200")
	require.NoError(t, err)
	defer users.Close()
	target := t.TempDir()
	require.NoError(t, mount.IDMapMount(mounted(t, "tmpfs", ""), target, int(users.Fd())))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(target, 0)) })

	err = CheckVolume(target, pid)
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	require.ErrorIs(t, err, unix.EPERM)
	require.ErrorContains(t, err, "tmpfs, is mounted with mapped ids already")
}

// Files that root makes in the namespace of a try belong to an id that no pod may have.
func TestTry(t *testing.T) {
	users, err := Try()
	require.NoError(t, err)
	defer users.Close()
	tree, err := newTmpfs()
	require.NoError(t, err)
	defer unix.Close(tree)
	if err := mapIDs(tree, users); err != nil {
		t.Skip("this kernel can't map the ids of tmpfs: ", err)
	}
	var stat unix.Stat_t
	require.NoError(t, unix.Fstat(tree, &stat))
	require.Less(t, stat.Uid, uint32(MinHostID))
	require.Less(t, stat.Gid, uint32(MinHostID))
	require.NotZero(t, stat.Uid)
	require.NotZero(t, stat.Gid)
}

// The kernel maps the ids of tmpfs since 6.3.
func TestCheckTmpfs(t *testing.T) {
	ownMounts(t)
	mounts := func() string {
		text, err := os.ReadFile("/proc/thread-self/mountinfo")
		require.NoError(t, err)
		return string(text)
	}
	before := mounts()
	var name unix.Utsname
	require.NoError(t, unix.Uname(&name))
	var major, minor int
	_, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &major, &minor)
	require.NoError(t, err)
	if err := CheckTmpfs(); major > 6 || major == 6 && minor >= 3 {
		require.NoError(t, err)
	} else {
		require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
		require.EqualError(t, err, "this kernel can't map the ids of its filesystem, tmpfs: invalid argument")
	}
	require.Equal(t, before, mounts(), "nothing is mounted for a look")
}

func TestCheckVolumeFails(t *testing.T) {
	pid := inUserNS(t, Mapping{HostID: 1_500_000_000, Length: 100}, Mapping{HostID: 1_500_001_000, Length: 200})
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	require.ErrorIs(t, CheckVolume(file+"/below", pid), unix.ENOTDIR)
	require.ErrorContains(t, CheckVolume(file, 0), "pod's user namespace", "a process that has ended")
}

func BenchmarkCheckVolume(b *testing.B) {
	pid := inUserNS(b, Mapping{HostID: 1_500_000_000, Length: 100}, Mapping{HostID: 1_500_001_000, Length: 200})
	dir := mounted(b, "tmpfs", "")
	for b.Loop() {
		require.NoError(b, CheckVolume(dir, pid))
	}
}
