package netns

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// subject is a pod with everything that Capture may get wrong about it.
type subject struct {
	shim   shimOptions
	expect func(*Expect)
	alive  func(*testing.T, *pod) error
}

func TestCapture(t *testing.T) {
	requireRoot(t)
	userns := shimOptions{Flags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET}

	for name, test := range map[string]struct {
		subject
		class func(error) bool // nil: captured
		text  string
	}{
		"pod with a user namespace": {
			subject: subject{shim: userns},
		},
		"pod on the host's user namespace": {
			subject: subject{shim: shimOptions{Flags: unix.CLONE_NEWNET}},
		},
		"mapping of several extents in another order": {
			subject: subject{
				shim: shimOptions{Flags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET, IDs: []IDMap{{1000, 700000, 10}, {0, 600000, 10}}},
				expect: func(e *Expect) {
					e.UIDs = []IDMap{{0, 600000, 10}, {1000, 700000, 10}}
				},
			},
		},
		"runtime was told no cgroup": {
			subject: subject{shim: userns, expect: func(e *Expect) { e.CgroupPath = "" }},
		},
		"relative cgroup": {
			subject: subject{shim: userns, expect: func(e *Expect) { e.CgroupPath = strings.TrimPrefix(e.CgroupPath, "/") }},
		},
		"shim of another sandbox": {
			subject: subject{shim: userns, expect: func(e *Expect) { e.ID = "other" }},
			class:   errdefs.IsFailedPrecondition, text: "is not the sandbox's shim",
		},
		"shim of another containerd namespace": {
			subject: subject{shim: userns, expect: func(e *Expect) { e.Namespace = "moby" }},
			class:   errdefs.IsFailedPrecondition, text: "is not the sandbox's shim",
		},
		"shim below the pod's user namespace": {
			subject: subject{shim: shimOptions{Flags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET, ShimInUserNS: true}},
			class:   errdefs.IsFailedPrecondition, text: "parent",
		},
		"shim ends while containerd is asked": {
			subject: subject{shim: userns, alive: func(t *testing.T, p *pod) error { p.killShim(t); return nil }},
			class:   errdefs.IsFailedPrecondition, text: "has ended",
		},
		"another cgroup": {
			subject: subject{shim: userns, expect: func(e *Expect) { e.CgroupPath += "x" }},
			class:   errdefs.IsFailedPrecondition, text: "cgroup",
		},
		"parent of the cgroup": {
			subject: subject{shim: userns, expect: func(e *Expect) { e.CgroupPath = filepath.Dir(e.CgroupPath) }},
			class:   errdefs.IsFailedPrecondition, text: "cgroup",
		},
		"root cgroup proves nothing": {
			subject: subject{shim: userns, expect: func(e *Expect) { e.CgroupPath = "/" }},
			class:   errdefs.IsInvalidArgument,
		},
		"another uid mapping": {
			subject: subject{shim: userns, expect: func(e *Expect) { e.UIDs[0].HostID++ }},
			class:   errdefs.IsFailedPrecondition, text: "uid_map",
		},
		"another gid mapping": {
			subject: subject{shim: userns, expect: func(e *Expect) { e.GIDs[0].Size-- }},
			class:   errdefs.IsFailedPrecondition, text: "gid_map",
		},
		"host's user namespace where the pod has its own": {
			subject: subject{shim: shimOptions{Flags: unix.CLONE_NEWNET}, expect: func(e *Expect) { e.UIDs, e.GIDs = podIDs(), podIDs() }},
			class:   errdefs.IsFailedPrecondition, text: "user namespace: it is in the host's",
		},
		"own user namespace where the pod has the host's": {
			subject: subject{shim: userns, expect: func(e *Expect) { e.UIDs, e.GIDs = nil, nil }},
			class:   errdefs.IsFailedPrecondition, text: "user namespace: it is not in the host's",
		},
		"host's network namespace": {
			subject: subject{shim: shimOptions{}},
			class:   errdefs.IsFailedPrecondition, text: "network namespace: it is the host's",
		},
		"network namespace of the host's user namespace": {
			subject: subject{shim: shimOptions{Flags: unix.CLONE_NEWUSER, ShimInNetNS: true}},
			class:   errdefs.IsFailedPrecondition, text: "network namespace: it is owned by",
		},
		"containerd says that the task has ended": {
			subject: subject{shim: userns, alive: func(*testing.T, *pod) error { return errdefs.ErrNotFound }},
			class:   errdefs.IsNotFound, text: "failed to confirm with containerd",
		},
		"ends while containerd is asked": {
			subject: subject{shim: userns, alive: func(t *testing.T, p *pod) error { p.kill(t); return nil }},
			class:   errdefs.IsNotFound, text: "has ended",
		},
		"ends while containerd is asked, unreaped": {
			subject: subject{
				shim:  shimOptions{Flags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET, LeaveZombie: true},
				alive: func(t *testing.T, p *pod) error { p.kill(t); return nil },
			},
			class: errdefs.IsNotFound, text: "has ended",
		},
		"has ended, so what the proofs say doesn't count": {
			subject: subject{shim: userns, alive: func(t *testing.T, p *pod) error { p.kill(t); return errors.New("proof") }},
			class:   errdefs.IsNotFound, text: "has ended",
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := startPod(t, test.shim)
			expect := p.expect()
			if test.expect != nil {
				test.expect(&expect)
			}
			asked := false
			expect.Alive = func(context.Context) error {
				asked = true
				if test.alive != nil {
					return test.alive(t, p)
				}
				return nil
			}

			open := countFDs(t)
			h, err := Capture(t.Context(), expect)

			if test.class != nil {
				require.Error(t, err)
				require.True(t, test.class(err), "class of %v", err)
				require.ErrorContains(t, err, test.text)
				require.Nil(t, h)
				require.LessOrEqual(t, countFDs(t), open, "file descriptors leak")
				return
			}
			require.NoError(t, err)
			require.True(t, asked)
			require.Equal(t, p.netnsInode(t), h.Inode())
			require.NoError(t, h.Close())
			require.LessOrEqual(t, countFDs(t), open, "file descriptors leak")
		})
	}
}

func TestCaptureEndedProcess(t *testing.T) {
	requireRoot(t)
	for name, zombie := range map[string]bool{"reaped": false, "zombie": true} {
		t.Run(name, func(t *testing.T) {
			p := startPod(t, shimOptions{Flags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET, LeaveZombie: zombie})
			expect := p.expect()
			p.kill(t)
			_, err := Capture(t.Context(), expect)
			require.True(t, errdefs.IsNotFound(err), "%v", err)
		})
	}
}

func TestCaptureOrphan(t *testing.T) {
	requireRoot(t)
	p := startPod(t, shimOptions{Flags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET})
	p.killShim(t)
	_, err := Capture(t.Context(), p.expect())
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	require.ErrorContains(t, err, "parent")
}

func TestCaptureInvalid(t *testing.T) {
	valid := Expect{Pid: os.Getpid(), Namespace: "k8s.io", ID: "id", Alive: func(context.Context) error { return nil }}
	for name, change := range map[string]func(*Expect){
		"no pid":        func(e *Expect) { e.Pid = 0 },
		"process group": func(e *Expect) { e.Pid = -1 },
		"no namespace":  func(e *Expect) { e.Namespace = "" },
		"no id":         func(e *Expect) { e.ID = "" },
		"no gids":       func(e *Expect) { e.UIDs = podIDs() },
		"no alive":      func(e *Expect) { e.Alive = nil },
	} {
		t.Run(name, func(t *testing.T) {
			expect := valid
			change(&expect)
			_, err := Capture(t.Context(), expect)
			require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
		})
	}
}

// The way by /proc, which kernels before 6.11 need, finds the same namespaces.
func TestOpenNSWithoutPidfdIoctl(t *testing.T) {
	requireRoot(t)
	p := startPod(t, shimOptions{Flags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET})
	pidfd, err := openPidfd(p.pid)
	require.NoError(t, err)
	defer pidfd.Close()

	for _, kind := range []nsKind{netNS, userNS} {
		want, err := statNS(procPath(p.pid, "ns/"+kind.name))
		require.NoError(t, err)
		// An ioctl that no kernel knows stands for one that this kernel doesn't.
		file, err := openNS(pidfd, p.pid, nsKind{ioctlNone | 0xff<<8 | 0xfe, kind.name})
		require.NoError(t, err)
		got, err := identify(file)
		require.NoError(t, err)
		require.Equal(t, want, got, kind.name)
		require.NoError(t, file.Close())

		if file, err = nsOfPidfd(pidfd, kind); errors.Is(err, unix.ENOTTY) {
			continue // a kernel before 6.11
		}
		require.NoError(t, err)
		got, err = identify(file)
		require.NoError(t, err)
		require.Equal(t, want, got, kind.name)
		require.NoError(t, file.Close())
	}
}

func TestCgroupMatcher(t *testing.T) {
	for _, test := range []struct {
		cgroupsPath, path string
		match             bool
	}{
		{"/kubepods/pod1/id", "/kubepods/pod1/id", true},
		{"/kubepods/pod1//id/", "/kubepods/pod1/id", true},
		{"/kubepods/pod1/id", "/kubepods/pod1/id2", false},
		{"/kubepods/pod1/id", "/evil/kubepods/pod1/id", false},
		{"/kubepods/pod1/id", "/", false},
		{"pod1/id", "/system.slice/containerd.service/pod1/id", true},
		{"pod1/id", "/system.slice/notpod1/id", false},
		{"kubepods-pod1.slice:cri-containerd:id", "/kubepods.slice/kubepods-pod1.slice/cri-containerd-id.scope", true},
		{"kubepods-pod1.slice:cri-containerd:id", "/kubepods.slice/kubepods-pod1.slice/cri-containerd-id.scope/child", false},
		{"kubepods-pod1.slice:cri-containerd:id", "/kubepods.slice/kubepods-pod1.slice/xcri-containerd-id.scope", false},
		{"kubepods-pod1.slice:cri-containerd:id", "/", false},
		{"a.slice:p:b.slice", "/a.slice/b.slice", true},
	} {
		matches, err := cgroupMatcher(test.cgroupsPath)
		require.NoError(t, err)
		require.Equal(t, test.match, matches(test.path), "%q in %q", test.path, test.cgroupsPath)
	}
	for _, root := range []string{"/", ".", "//"} {
		_, err := cgroupMatcher(root)
		require.True(t, errdefs.IsInvalidArgument(err), "%q: %v", root, err)
	}
}

func TestOpen(t *testing.T) {
	requireRoot(t)
	p := startPod(t, shimOptions{Flags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET})
	h, err := Open(procPath(p.pid, "ns/net"))
	require.NoError(t, err)
	require.Equal(t, p.netnsInode(t), h.Inode())
	require.NoError(t, h.Close())

	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "plain"), nil, 0o644))
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o644))
	for path, class := range map[string]func(error) bool{
		filepath.Join(dir, "absent"):     errdefs.IsNotFound,
		filepath.Join(dir, "plain"):      errdefs.IsInvalidArgument,
		filepath.Join(dir, "fifo"):       errdefs.IsInvalidArgument,
		procPath(p.pid, "ns/user"):       errdefs.IsInvalidArgument,
		procPath(p.pid, "ns/uts"):        errdefs.IsInvalidArgument,
		procPath(p.pid, "status"):        errdefs.IsInvalidArgument,
		filepath.Join(dir, "plain", "x"): func(err error) bool { return errors.Is(err, unix.ENOTDIR) },
	} {
		_, err := Open(path)
		require.True(t, class(err), "%q: %v", path, err)
	}
}
