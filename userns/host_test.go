package userns

import (
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// inUserNS runs a process of this machine in a user namespace, until the test ends.
func inUserNS(t testing.TB, uids, gids Mapping) int {
	t.Helper()
	maps := func(m Mapping) []syscall.SysProcIDMap {
		return []syscall.SysProcIDMap{{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Length)}}
	}
	cmd := exec.Command("cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: maps(uids), GidMappings: maps(gids)}
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		stdin.Close()
		require.NoError(t, cmd.Wait())
	})
	return cmd.Process.Pid
}

// of are the uses by one user, by the start of its name.
func of(uses []Use, by string) []Use {
	return slices.DeleteFunc(slices.Clone(uses), func(u Use) bool { return !strings.HasPrefix(u.By, by) })
}

func TestProcesses(t *testing.T) {
	uids, gids := Mapping{HostID: 1_500_000_000, Length: 100}, Mapping{HostID: 1_500_001_000, Length: 200}
	mapped := inUserNS(t, uids, gids)
	plain := exec.Command("cat")
	plain.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1_500_002_000, Gid: 1_500_003_000, Groups: []uint32{5, 1_500_004_000}}}
	stdin, err := plain.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, plain.Start())
	defer func() {
		stdin.Close()
		require.NoError(t, plain.Wait())
	}()

	processes, err := Processes(t.Context())
	require.NoError(t, err)
	var uses []Use
	for _, p := range processes {
		require.True(t, strings.HasPrefix(p.By, fmt.Sprintf("process %d (", p.Pid)))
		uses = append(uses, p.Use)
	}
	found := of(uses, fmt.Sprintf("process %d (", mapped))
	require.Len(t, found, 1)
	require.Contains(t, found[0].UIDs, uids)
	require.Contains(t, found[0].GIDs, gids)

	found = of(uses, fmt.Sprintf("process %d (cat)", plain.Process.Pid))
	require.Len(t, found, 1)
	one := func(id uint32) Mappings { return ids(id, 1) }
	require.True(t, found[0].touches(Mappings{UIDs: one(1_500_002_000).UIDs, GIDs: one(70000).GIDs}))
	require.True(t, found[0].touches(Mappings{UIDs: one(70000).UIDs, GIDs: one(1_500_003_000).GIDs}))
	require.False(t, found[0].touches(Mappings{UIDs: one(70000).UIDs, GIDs: one(1_500_004_000).GIDs}), "a supplementary group costs nothing")
	require.False(t, found[0].touches(one(1_500_005_000)))

	require.Empty(t, of(uses, fmt.Sprintf("process %d (", os.Getpid())), "this one has no ids that pods can have")
}

// A process that only waits for its parent uses nothing; one whose first thread has ended does.
func TestProcessesThatHaveEnded(t *testing.T) {
	zombie := exec.Command("cat")
	zombie.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1_500_002_000, Gid: 1_500_003_000}}
	stdin, err := zombie.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, zombie.Start())
	defer zombie.Wait()
	p, err := process(t.Context(), zombie.Process.Pid, "")
	require.NoError(t, err)
	require.NotEmpty(t, p.UIDs)
	pidfd, err := unix.PidfdOpen(zombie.Process.Pid, 0)
	require.NoError(t, err)
	defer unix.Close(pidfd)
	stdin.Close()
	for err = unix.EINTR; err == unix.EINTR; { // the runtime signals its threads
		_, err = unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, -1)
	}
	require.NoError(t, err)
	p, err = process(t.Context(), zombie.Process.Pid, "")
	require.NoError(t, err)
	require.Empty(t, p.UIDs)

	for _, c := range []struct {
		state, threads string
		want           bool
	}{
		{"Z (zombie)", "1", true}, {"Z (zombie)", "0", true}, {"X (dead)", "1", true},
		{"Z (zombie)", "2", false}, {"Z (zombie)", "12", false}, {"S (sleeping)", "1", false}, {"D (disk sleep)", "1", false},
	} {
		status := fmt.Sprintf("Name:\tZ\nState:\t%s\nUid:\t0\nThreads:\t%s\n", c.state, c.threads)
		require.Equal(t, c.want, ended(status), "%s with %s threads", c.state, c.threads)
	}
	require.False(t, ended("State:\tZ (zombie)\n"), "without a count of threads")
}

func TestWithin(t *testing.T) {
	t.Parallel()
	given := []Mapping{{HostID: 131072, Length: 65536}}
	for _, tc := range []struct{ used, want []Mapping }{
		{nil, nil},
		{[]Mapping{{HostID: 65536, Length: 65536}, {HostID: 196608, Length: 1}}, nil},
		{[]Mapping{{HostID: 131072, Length: 1}, {HostID: 196607, Length: 1}}, []Mapping{{HostID: 131072, Length: 1}, {HostID: 196607, Length: 1}}},
		{[]Mapping{{HostID: 0, Length: math.MaxUint32}}, given},
		{[]Mapping{{HostID: 140000, Length: 65536}}, []Mapping{{HostID: 140000, Length: 56608}}},
		{[]Mapping{{HostID: 140000}}, nil},
	} {
		use := Use{UIDs: tc.used, GIDs: tc.used, By: "process 7 (sh)"}
		require.Equal(t, Use{UIDs: tc.want, By: use.By}, use.Within(given, nil))
		require.Equal(t, Use{GIDs: tc.want, By: use.By}, use.Within(nil, given))
	}
}

func TestMounts(t *testing.T) {
	uids, gids := Mapping{HostID: 1_600_000_000, Length: 65536}, Mapping{HostID: 1_600_100_000, Length: 65536}
	userNS, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", inUserNS(t, uids, gids)))
	require.NoError(t, err)
	defer userNS.Close()
	mount := func() (at string, unmount func()) {
		from, at := t.TempDir(), t.TempDir()
		fd, err := unix.OpenTree(unix.AT_FDCWD, from, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		require.NoError(t, err)
		require.NoError(t, unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userNS.Fd())}))
		require.NoError(t, unix.MoveMount(fd, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH))
		require.NoError(t, unix.Close(fd))
		unmount = sync.OnceFunc(func() { require.NoError(t, unix.Unmount(at, 0)) })
		t.Cleanup(unmount)
		return at, unmount
	}
	at, unmount := mount()

	uses, err := Mounts(t.Context())
	require.NoError(t, err)
	require.Equal(t, []Use{{UIDs: []Mapping{uids}, GIDs: []Mapping{gids}, By: "mount " + at}}, of(uses, "mount "+at))

	flagged, err := flaggedMounts() // what an older kernel tells
	require.NoError(t, err)
	require.NotEmpty(t, flagged)
	require.True(t, flagged[0].touches(ids(MinHostID, 1)))
	require.True(t, flagged[0].touches(ids(maxHostID, 1)))
	mount()
	flagged, err = flaggedMounts()
	require.NoError(t, err)
	require.Len(t, flagged, 1, "all use the same ids, and a search takes memory for each")
	require.Regexp(t, `^mount /.* and [1-9]\d* more, whose id maps this kernel does not report$`, flagged[0].By)

	unmount()
	uses, err = Mounts(t.Context())
	require.NoError(t, err)
	require.Empty(t, of(uses, "mount "+at))
}

func TestSubIDs(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(text), 0o644))
		return path
	}
	uids := file("subuid", "root:1:what\n\n  pods:100000:65536 \nother:165536:65536\npods:1000000:131072\npods2:7:7\n")
	gids := file("subgid", "pods:300000:65536")
	ranges, err := SubIDs("pods", uids, gids)
	require.NoError(t, err)
	require.Equal(t, Ranges{UIDs: []Extent{{100000, 65536}, {1000000, 131072}}, GIDs: []Extent{{300000, 65536}}}, ranges)

	ranges, err = SubIDs("root", file("by-uid", "0:100000:65536\n"), file("by-name", "root:100000:65536\n"))
	require.NoError(t, err)
	require.Equal(t, ranges.UIDs, ranges.GIDs)

	_, err = SubIDs("nobody-knows", uids, gids)
	require.True(t, errdefs.IsFailedPrecondition(err))
	require.ErrorContains(t, err, `add a line "nobody-knows:FIRST:COUNT"`)
	_, err = SubIDs("pods", uids, filepath.Join(dir, "none"))
	require.True(t, errdefs.IsFailedPrecondition(err))
	require.ErrorContains(t, err, "none")
	for text, want := range map[string]string{
		"root:1:1\npods:100000":  `line 2, "pods:100000": not of the form`,
		"pods:100000:65536:1":    `invalid number of ids "65536:1"`,
		"pods:-1:65536":          `invalid number of ids "-1"`,
		"pods:100000:":           `invalid number of ids ""`,
		"pods:0x10:65536":        `invalid number of ids "0x10"`,
		"pods:100000:4294967296": `invalid number of ids "4294967296"`,
		"pods: 100000:65536":     `invalid number of ids " 100000"`,
	} {
		_, err := SubIDs("pods", file("bad", text), gids)
		require.True(t, errdefs.IsInvalidArgument(err), "%q: %v", text, err)
		require.ErrorContains(t, err, want)
	}
}

func FuzzParseSubIDs(f *testing.F) {
	for _, seed := range []string{"", "pods:100000:65536\n", "pods:1:1\npods:2:2", "pods:", "pods:4294967295:4294967295", ":1:1", "#pods:1:1", "pods:1:1\x00", "x:1:1\npods:\xff:1"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		extents, err := parseSubIDs(strings.NewReader(text), []string{"pods"})
		if err != nil {
			require.Empty(t, extents)
			return
		}
		var written strings.Builder
		for _, e := range extents {
			fmt.Fprintf(&written, "pods:%d:%d\n", e.First, e.Size)
		}
		again, err := parseSubIDs(strings.NewReader(written.String()), []string{"pods"})
		require.NoError(t, err)
		require.Equal(t, extents, again)
		pool, err := OpenPool("test", Ranges{UIDs: extents, GIDs: extents[:min(len(extents), 1)]}, filepath.Join(t.TempDir(), "h"))
		if err != nil {
			require.True(t, errdefs.IsInvalidArgument(err))
			return
		}
		for m := range pool.slots {
			require.NoError(t, m.Validate())
		}
	})
}

func FuzzParseLabel(f *testing.F) {
	for _, seed := range []string{"", "0:131072:65536", "0:1:1,1:2:1", "0:4294967295:1", "0:4294967295:2", "0:1:0", "-1:1:1", "0:1", "a:b:c", ",", "0:1:1,"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		extents, err := ParseLabel(text)
		if err != nil {
			require.True(t, errdefs.IsInvalidArgument(err))
			return
		}
		var parts []string
		for _, m := range extents {
			require.LessOrEqual(t, m.last(), uint64(1<<32-1))
			parts = append(parts, m.String())
		}
		again, err := ParseLabel(strings.Join(parts, ","))
		require.NoError(t, err)
		require.Equal(t, extents, again)
		lines, err := parseExtents(strings.NewReplacer(":", " ", ",", "\n").Replace(strings.Join(parts, ",")))
		require.NoError(t, err)
		require.Equal(t, extents, lines, "the same in the kernel's form")
	})
}

// FuzzFromCRI has the numbers of two extents, and whether there are others.
func FuzzFromCRI(f *testing.F) {
	f.Add(int32(0), uint32(0), uint32(131072), uint32(65536), uint32(0), uint32(131072), uint32(65536), 1, 1)
	f.Add(int32(0), uint32(0), uint32(4294901760), uint32(65536), uint32(0), uint32(4294901760), uint32(65536), 1, 1)
	f.Add(int32(2), uint32(0), uint32(0), uint32(0), uint32(0), uint32(0), uint32(0), 0, 0)
	f.Add(int32(0), uint32(1), uint32(1<<31), uint32(1<<31), uint32(0), uint32(1), uint32(1), 2, 0)
	f.Fuzz(func(t *testing.T, mode int32, uc, uh, ul, gc, gh, gl uint32, uids, gids int) {
		repeat := func(e []*runtime.IDMapping, n int) (all []*runtime.IDMapping) {
			for range n & 3 {
				all = append(all, e...)
			}
			return all
		}
		opts := podMode(repeat(extents(uc, uh, ul), uids), repeat(extents(gc, gh, gl), gids))
		opts.Mode = runtime.NamespaceMode(mode)
		m, err := FromCRI(opts)
		switch {
		case err != nil:
			require.True(t, errdefs.IsInvalidArgument(err))
			require.Nil(t, m)
		case m != nil:
			require.NoError(t, m.Validate())
			require.Equal(t, Mapping{0, uh, ul}, m.UIDs)
			require.Equal(t, Mapping{0, gh, gl}, m.GIDs)
			require.GreaterOrEqual(t, min(uh, gh), uint32(65536))
			require.Less(t, max(m.UIDs.last(), m.GIDs.last()), uint64(1<<32-1))
			require.Equal(t, opts.String(), m.CRI().String())
		}
	})
}
