package pause

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func bindOf(dir string) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: dir, Options: []string{"rbind", "rw"}}}
}

func TestMountRootfs(t *testing.T) {
	f := testFiles(t)
	image := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(image, "file"), []byte("text"), 0o644))
	require.NoError(t, unix.Mknod(filepath.Join(image, "device"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	for name, before := range map[string]func(*testing.T){
		"anew": func(*testing.T) {},
		"over the mounts of a daemon that was killed": func(t *testing.T) {
			mountOn(t, f.rootfs("s1"))
			mountOn(t, f.rootfs("s1"))
			mountOn(t, filepath.Join(f.rootfs("s1"), "below"))
		},
		"over its directory": func(t *testing.T) { require.NoError(t, os.MkdirAll(f.rootfs("s1"), 0o755)) },
	} {
		t.Run(name, func(t *testing.T) {
			before(t)
			fds := countFDs(t)
			rootfs, err := f.MountRootfs("s1", bindOf(image), "", nil)
			require.NoError(t, err)
			require.Empty(t, mountsUnder(t, f.StateDir), "nothing stays mounted")
			require.NoDirExists(t, f.rootfs("s1"))
			open := func(name string, flags int) error {
				fd, err := unix.Openat(int(rootfs.Fd()), name, flags, 0o600)
				if err == nil {
					unix.Close(fd)
				}
				return err
			}
			require.NoError(t, open("file", unix.O_RDONLY))
			require.NoError(t, open("made", unix.O_CREAT|unix.O_WRONLY), "it is made read-only last")
			require.ErrorIs(t, open("device", unix.O_RDWR), unix.EACCES, "nodev")
			var st unix.Statfs_t
			require.NoError(t, unix.Fstatfs(int(rootfs.Fd()), &st))
			require.NotZero(t, st.Flags&unix.ST_NOSUID)
			require.NoError(t, rootfs.Close())
			require.Equal(t, fds, countFDs(t), "file descriptors leak")
		})
	}
}

func TestMountRootfsFails(t *testing.T) {
	f := testFiles(t)
	image := t.TempDir()
	for name, tc := range map[string]struct {
		id     string
		mounts []mount.Mount
		is     func(error) bool
		text   string
	}{
		"hostile id":         {id: "../x", mounts: bindOf(image), is: errdefs.IsInvalidArgument, text: "invalid sandbox id"},
		"source is gone":     {id: "s1", mounts: bindOf(filepath.Join(image, "absent")), text: "no such file"},
		"second mount fails": {id: "s1", mounts: append(bindOf(image), bindOf(filepath.Join(image, "absent"))...), text: "no such file"},
		"nothing to mount":   {id: "s1", is: errdefs.IsInvalidArgument, text: "the snapshot has no mounts"},
	} {
		t.Run(name, func(t *testing.T) {
			fds := countFDs(t)
			rootfs, err := f.MountRootfs(tc.id, tc.mounts, "", nil)
			if rootfs != nil {
				rootfs.Close()
			}
			require.Equal(t, fds, countFDs(t), "file descriptors leak")
			require.Error(t, err)
			require.ErrorContains(t, err, tc.text)
			require.ErrorContains(t, err, "failed to mount the root filesystem of sandbox")
			if tc.is != nil {
				require.True(t, tc.is(err), err)
			}
			require.Empty(t, mountsUnder(t, f.StateDir), "nothing stays mounted")
			require.NoDirExists(t, f.rootfs("s1"))
		})
	}
}

func TestLabelled(t *testing.T) {
	mounts := []mount.Mount{{Type: "overlay", Options: make([]string, 1, 8)}, {Type: "bind"}}
	require.Equal(t, mounts, labelled(mounts, ""))
	got := labelled(mounts, "system_u:object_r:container_file_t:s0:c1,c2")
	const context = `context="system_u:object_r:container_file_t:s0:c1,c2"`
	require.Equal(t, []string{"", context}, got[0].Options)
	require.Equal(t, []string{context}, got[1].Options)
	require.Equal(t, []mount.Mount{{Type: "overlay", Options: []string{""}}, {Type: "bind"}}, mounts)
	require.Empty(t, mounts[0].Options[:2][1], "nor the space behind")
}

// Nobody but root passes the directories above the image and above the sandbox's files.
func TestRootfsOutOfReach(t *testing.T) {
	b := newTestbed(t)
	require.NoError(t, os.MkdirAll(b.files.StateDir, 0o700))
	require.NoError(t, os.Chmod(b.files.StateDir, 0o700))
	require.NoError(t, os.Chmod(filepath.Dir(b.image), 0o700))
	_, record := b.start(t, inUserNS(testPod()))
	require.Equal(t, "pause", strings.TrimSpace(read(t, proc(record.Pid, "comm"))))
	require.Len(t, mountsUnder(t, b.files.StateDir), 1, "the pod's shm")
}

// An image chooses what its directories are. Its pause sees no more for it.
func TestHostileImages(t *testing.T) {
	newTestbed(t)
	for _, tc := range []struct {
		name string
		make func(*testing.T, string)
		ok   bool
	}{
		{"dev leads out", func(t *testing.T, dir string) {
			require.NoError(t, os.Symlink("../../../../../etc", filepath.Join(dir, "dev")))
		}, false},
		{"dev leads elsewhere", func(t *testing.T, dir string) { require.NoError(t, os.Symlink("work", filepath.Join(dir, "dev"))) }, true},
		{"dev leads to the root", func(t *testing.T, dir string) { require.NoError(t, os.Symlink("/", filepath.Join(dir, "dev"))) }, true},
		{"dev leads to itself", func(t *testing.T, dir string) { require.NoError(t, os.Symlink("dev", filepath.Join(dir, "dev"))) }, false},
		{"dev leads to the process", func(t *testing.T, dir string) {
			require.NoError(t, os.Symlink("/proc/self/fd/3", filepath.Join(dir, "dev")))
		}, false},
		{"dev is missing", func(*testing.T, string) {}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newTestbed(t)
			require.NoError(t, os.Remove(filepath.Join(b.image, "dev")))
			tc.make(t, b.image)
			pod := testPod()
			pod.ImageConfig.Entrypoint = []string{"/prober", "rootreadonly"}
			r := b.request(t, pod)
			_, err := b.Start(t.Context(), r)
			if tc.ok {
				require.NoError(t, err)
				require.Zero(t, b.exit(t).exit.Status, "the line of testdata/prober.c that failed")
			} else {
				require.ErrorContains(t, err, `"/dev"`)
			}
			require.NoError(t, b.files.Remove(t.Context(), pod.ID))
			require.Empty(t, mountsUnder(t, filepath.Dir(b.image)))
			require.Empty(t, mountsUnder(t, b.files.StateDir))
		})
	}
	for _, program := range []string{"/proc/self/exe", "/proc/self/fd/7", "/proc/1/exe", "/dev/fd/7", "../../../../bin/true"} {
		b := newTestbed(t)
		pod := testPod()
		pod.ImageConfig.Entrypoint = []string{program}
		_, err := b.Start(t.Context(), b.request(t, pod))
		require.ErrorContains(t, err, "no such file", program)
	}
}

func TestSealed(t *testing.T) {
	file, err := sealed("test", strings.NewReader("text"))
	require.NoError(t, err)
	defer file.Close()
	writable, err := os.OpenFile(fdPath(file), os.O_RDWR, 0)
	require.NoError(t, err)
	defer writable.Close()
	_, err = writable.WriteString("x")
	require.ErrorIs(t, err, unix.EPERM)
	require.ErrorIs(t, writable.Truncate(0), unix.EPERM)
	data, err := io.ReadAll(file)
	require.NoError(t, err)
	require.Equal(t, "text", string(data))
}
