package pause

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/internal/roottest"
)

// testFiles are in a temporary directory that is left without mounts.
func testFiles(t *testing.T) Files {
	t.Helper()
	roottest.Require(t)
	dir := t.TempDir()
	t.Cleanup(func() { require.NoError(t, unmountTrees([]string{dir})) })
	return Files{RootDir: filepath.Join(dir, "root"), StateDir: filepath.Join(dir, "state")}
}

func read(t *testing.T, file string) string {
	t.Helper()
	content, err := os.ReadFile(file)
	require.NoError(t, err)
	return string(content)
}

// readIn reads a file as it is in namespaces of a process. What runs there is not on the test's goroutine, where alone a test may fail.
func readIn(t *testing.T, process *host.Process, kinds int, file string) string {
	t.Helper()
	var content []byte
	require.NoError(t, process.In(kinds, func() (err error) {
		content, err = os.ReadFile(file)
		return err
	}))
	return string(content)
}

func mountsUnder(t *testing.T, dir string) []*mountinfo.Info {
	t.Helper()
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	require.NoError(t, err)
	return infos
}

// mountOn mounts a tmpfs on a directory that it makes.
func mountOn(t *testing.T, dir string) {
	t.Helper()
	require.NoError(t, os.MkdirAll(dir, 0o755))
	require.NoError(t, unix.Mount("test", dir, "tmpfs", 0, ""))
}

func TestFilesSetup(t *testing.T) {
	files := testFiles(t)
	config := &runtime.PodSandboxConfig{
		Hostname: "web",
		DnsConfig: &runtime.DNSConfig{
			Servers:  []string{"10.0.0.10", "10.0.0.11"},
			Searches: []string{"shop.svc", "svc"},
			Options:  []string{"ndots:5", "timeout:1"},
		},
	}
	for range 2 { // the second time over what the first left
		require.NoError(t, files.Setup("sandbox", config))

		dir := filepath.Join(files.RootDir, "sandboxes/sandbox")
		require.Equal(t, "web\n", read(t, filepath.Join(dir, "hostname")))
		require.Equal(t, read(t, "/etc/hosts"), read(t, filepath.Join(dir, "hosts")))
		require.Equal(t, "search shop.svc svc\nnameserver 10.0.0.10\nnameserver 10.0.0.11\noptions ndots:5 timeout:1\n",
			read(t, filepath.Join(dir, "resolv.conf")))

		shm := filepath.Join(files.StateDir, "sandboxes/sandbox/shm")
		mounts := mountsUnder(t, files.StateDir)
		require.Len(t, mounts, 1)
		require.Equal(t, shm, mounts[0].Mountpoint)
		require.Equal(t, "tmpfs", mounts[0].FSType)
		require.Subset(t, strings.Split(mounts[0].Options, ","), []string{"nosuid", "nodev", "noexec"})

		var stat unix.Statfs_t
		require.NoError(t, unix.Statfs(shm, &stat))
		require.EqualValues(t, 64<<20, int64(stat.Blocks)*stat.Bsize)
		info, err := os.Stat(shm)
		require.NoError(t, err)
		require.Equal(t, os.ModeDir|os.ModeSticky|0o777, info.Mode())
	}
}

func TestFilesSetupKeepsShm(t *testing.T) {
	files := testFiles(t)
	require.NoError(t, files.Setup("sandbox", nil))
	kept := filepath.Join(files.shm("sandbox"), "kept")
	require.NoError(t, os.WriteFile(kept, nil, 0o600))
	require.NoError(t, files.Setup("sandbox", nil))
	require.FileExists(t, kept)
}

func TestFilesSetupDefaults(t *testing.T) {
	files := testFiles(t)
	require.NoError(t, files.Setup("sandbox", nil))
	hostname, err := os.Hostname()
	require.NoError(t, err)
	require.Equal(t, hostname+"\n", read(t, files.hostname("sandbox")))
	require.Equal(t, read(t, "/etc/resolv.conf"), read(t, files.resolvConf("sandbox")))

	// An empty DNS configuration is one.
	require.NoError(t, files.Setup("sandbox", &runtime.PodSandboxConfig{DnsConfig: &runtime.DNSConfig{}}))
	require.Empty(t, read(t, files.resolvConf("sandbox")))
}

func TestFilesSetupInTheNodesIPC(t *testing.T) {
	files := testFiles(t)
	require.NoError(t, files.Setup("sandbox", &runtime.PodSandboxConfig{Linux: &runtime.LinuxPodSandboxConfig{
		SecurityContext: &runtime.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtime.NamespaceOption{Ipc: runtime.NamespaceMode_NODE},
		},
	}}))
	require.Empty(t, mountsUnder(t, files.StateDir))
	require.NoDirExists(t, files.shm("sandbox"))
	require.FileExists(t, files.hostname("sandbox"))
}

func TestFilesSetupNamesWhatFailed(t *testing.T) {
	files := testFiles(t)
	require.NoError(t, os.WriteFile(files.RootDir, nil, 0o600)) // a file where a directory is needed
	err := files.Setup("sandbox", nil)
	require.ErrorContains(t, err, `files of sandbox "sandbox"`)
	require.ErrorContains(t, err, files.RootDir)
	err = files.Remove(t.Context(), "sandbox")
	require.ErrorContains(t, err, `files of sandbox "sandbox"`)
	require.ErrorContains(t, err, files.RootDir)
}

func TestFilesRemove(t *testing.T) {
	files := testFiles(t)
	require.NoError(t, files.Remove(t.Context(), "sandbox"), "never made")
	require.NoError(t, files.Setup("sandbox", nil))
	require.NoError(t, files.Setup("sandbox-2", nil))

	require.NoError(t, files.Remove(t.Context(), "sandbox"))
	require.NoDirExists(t, files.rootDir("sandbox"))
	require.NoDirExists(t, files.stateDir("sandbox"))
	require.DirExists(t, files.rootDir("sandbox-2"), "only its own")
	require.Len(t, mountsUnder(t, files.StateDir), 1)

	require.NoError(t, files.Remove(t.Context(), "sandbox"), "a second time")
}

func TestFilesRemoveWhatIsHalfMade(t *testing.T) {
	for name, half := range map[string]func(*testing.T, Files){
		"only the root directory":  func(t *testing.T, f Files) { require.NoError(t, os.MkdirAll(f.rootDir("sandbox"), 0o755)) },
		"only the state directory": func(t *testing.T, f Files) { require.NoError(t, os.MkdirAll(f.stateDir("sandbox"), 0o755)) },
		"shm not mounted":          func(t *testing.T, f Files) { require.NoError(t, os.MkdirAll(f.shm("sandbox"), 0o755)) },
		"shm mounted twice": func(t *testing.T, f Files) {
			mountOn(t, f.shm("sandbox"))
			mountOn(t, f.shm("sandbox"))
		},
		"mounts below mounts": func(t *testing.T, f Files) {
			mountOn(t, f.shm("sandbox"))
			mountOn(t, filepath.Join(f.shm("sandbox"), "a"))
			mountOn(t, filepath.Join(f.shm("sandbox"), "a/b"))
			mountOn(t, filepath.Join(f.rootDir("sandbox"), "c"))
		},
		"a mount hidden by another": func(t *testing.T, f Files) {
			mountOn(t, filepath.Join(f.shm("sandbox"), "a"))
			mountOn(t, f.shm("sandbox"))
		},
		"a mount on a file": func(t *testing.T, f Files) {
			require.NoError(t, f.Setup("sandbox", nil))
			require.NoError(t, unix.Mount("/etc/hosts", f.hosts("sandbox"), "", unix.MS_BIND, ""))
		},
		"mounts that unmount each other": func(t *testing.T, f Files) {
			shm, copied := f.shm("sandbox"), filepath.Join(f.stateDir("sandbox"), "copy")
			mountOn(t, shm)
			require.NoError(t, unix.Mount("", shm, "", unix.MS_SHARED, ""))
			require.NoError(t, os.Mkdir(copied, 0o755))
			require.NoError(t, unix.Mount(shm, copied, "", unix.MS_BIND, ""))
			mountOn(t, filepath.Join(shm, "a"))
			require.Len(t, mountsUnder(t, f.StateDir), 4)
		},
		"open file in shm": func(t *testing.T, f Files) {
			mountOn(t, f.shm("sandbox"))
			file, err := os.Create(filepath.Join(f.shm("sandbox"), "open"))
			require.NoError(t, err)
			t.Cleanup(func() { file.Close() })
		},
	} {
		t.Run(name, func(t *testing.T) {
			files := testFiles(t)
			half(t, files)
			require.NoError(t, files.Remove(t.Context(), "sandbox"))
			require.Empty(t, mountsUnder(t, filepath.Dir(files.StateDir)))
			require.NoDirExists(t, files.rootDir("sandbox"))
			require.NoDirExists(t, files.stateDir("sandbox"))
		})
	}
}

// On a full node a list of all mounts takes long, so what a pod leaves is removed without one.
func TestFilesRemoveListsNoMounts(t *testing.T) {
	files := testFiles(t)
	listed := 0
	list := listMounts
	t.Cleanup(func() { listMounts = list })
	listMounts = func(filter mountinfo.FilterFunc) ([]*mountinfo.Info, error) {
		listed++
		return list(filter)
	}
	require.NoError(t, files.Setup("sandbox", nil))
	require.NoError(t, files.UnmountShm("sandbox"))
	require.NoError(t, files.Remove(t.Context(), "sandbox"))
	require.NoError(t, files.Remove(t.Context(), "sandbox"), "a second time")
	require.Zero(t, listed)

	require.NoError(t, files.Setup("sandbox", nil))
	require.NoError(t, files.Remove(t.Context(), "sandbox"), "with its shm mounted")
	require.NotZero(t, listed)
}

// A directory that is mounted below is unmounted, not emptied, also where the
// path to it has symbolic links, as /var/run has.
func TestFilesRemoveSparesWhatIsMounted(t *testing.T) {
	files := testFiles(t)
	precious := filepath.Join(t.TempDir(), "precious")
	require.NoError(t, os.WriteFile(precious, []byte("x"), 0o600))
	link := filepath.Join(filepath.Dir(files.StateDir), "link")
	require.NoError(t, os.Symlink(files.StateDir, link))

	target := filepath.Join(files.stateDir("sandbox"), "shm/volume")
	require.NoError(t, os.MkdirAll(target, 0o755))
	require.NoError(t, unix.Mount(filepath.Dir(precious), target, "", unix.MS_BIND, ""))
	require.NoError(t, os.Symlink(filepath.Dir(precious), filepath.Join(files.stateDir("sandbox"), "symlink")))

	require.NoError(t, Files{RootDir: files.RootDir, StateDir: link}.Remove(t.Context(), "sandbox"))
	require.FileExists(t, precious)
	require.NoDirExists(t, files.stateDir("sandbox"))
}

func TestFilesUnmountShm(t *testing.T) {
	files := testFiles(t)
	require.NoError(t, files.UnmountShm("sandbox"), "never made")
	require.NoError(t, files.Setup("sandbox", nil))
	mountOn(t, files.shm("sandbox"))                     // over it
	mountOn(t, filepath.Join(files.shm("sandbox"), "a")) // below it

	require.NoError(t, files.UnmountShm("sandbox"))
	require.Empty(t, mountsUnder(t, files.StateDir))
	require.DirExists(t, files.shm("sandbox"))
	require.FileExists(t, files.hostname("sandbox"), "which containers may still have")

	require.NoError(t, files.UnmountShm("sandbox"), "a second time")
}

func TestFilesRefuseHostileIDs(t *testing.T) {
	files := testFiles(t)
	outside := filepath.Join(files.RootDir, "outside")
	require.NoError(t, os.MkdirAll(outside, 0o755))
	for _, id := range []string{"", ".", "..", "../outside", "/etc", "a/b", "a/../../outside", "a\x00b", "-rf", strings.Repeat("x", 77)} {
		for name, call := range map[string]func() error{
			"Setup":      func() error { return files.Setup(id, nil) },
			"Remove":     func() error { return files.Remove(t.Context(), id) },
			"UnmountShm": func() error { return files.UnmountShm(id) },
			"Exist":      func() error { _, err := files.Exist(id); return err },
		} {
			require.ErrorIs(t, call(), errdefs.ErrInvalidArgument, "%s(%q)", name, id)
		}
	}
	require.DirExists(t, outside)
	entries, err := os.ReadDir(files.RootDir)
	require.NoError(t, err)
	require.Len(t, entries, 1, "nothing was made")
}

func TestRetryBusy(t *testing.T) {
	busy := fmt.Errorf("x: %w", unix.EBUSY)
	other := errors.New("other")
	for name, tc := range map[string]struct {
		errs  []error // of one call after the other, the last one of all that follow
		calls int
		want  error
	}{
		"at once":      {errs: []error{nil}, calls: 1},
		"busy twice":   {errs: []error{busy, busy, nil}, calls: 3},
		"always busy":  {errs: []error{busy}, calls: busyTries, want: unix.EBUSY},
		"other error":  {errs: []error{other}, calls: 1, want: other},
		"then another": {errs: []error{busy, other}, calls: 2, want: other},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				calls := 0
				err := retryBusy(t.Context(), func() error {
					calls++
					return tc.errs[min(calls, len(tc.errs))-1]
				})
				require.ErrorIs(t, err, tc.want)
				require.Equal(t, tc.calls, calls)
			})
		})
	}
}

func TestRetryBusyEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), busyDelay*3/2)
		defer cancel()
		start := time.Now()
		err := retryBusy(ctx, func() error { return unix.EBUSY })
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, unix.EBUSY, "what it waited for is told too")
		require.Equal(t, busyDelay*3/2, time.Since(start))
	})
}

func TestListFiles(t *testing.T) {
	files := Files{RootDir: filepath.Join(t.TempDir(), "root"), StateDir: filepath.Join(t.TempDir(), "state")}
	ids, err := files.List()
	require.NoError(t, err)
	require.Empty(t, ids)
	for _, dir := range []string{files.rootDir("s2"), files.rootDir("s1"), files.stateDir("s1"), files.stateDir("s3")} {
		require.NoError(t, os.MkdirAll(dir, 0o755))
	}
	require.NoError(t, os.WriteFile(files.rootDir("file"), nil, 0o644))
	ids, err = files.List()
	require.NoError(t, err)
	require.Equal(t, []string{"s1", "s2", "s3"}, ids)
}
