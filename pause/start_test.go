package pause

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/host"
)

func TestNamespaces(t *testing.T) {
	node := runtime.NamespaceMode_NODE
	everywhere := func(o *runtime.NamespaceOption) { o.Network, o.Pid, o.Ipc = node, node, node }
	bringNetNS := func(t *testing.T, r *StartRequest) {
		other := exec.Command("sleep", "100")
		other.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
		require.NoError(t, other.Start())
		var err error
		r.NetNS, err = os.Open(proc(other.Process.Pid, "ns/net"))
		require.NoError(t, err)
		t.Cleanup(func() { r.NetNS.Close() })
		require.NoError(t, other.Process.Kill())
		require.Error(t, other.Wait())
	}
	for _, tc := range []struct {
		name   string
		pod    Pod
		before func(*testing.T, *StartRequest)
		hosts  []string // namespaces of the host
	}{
		{name: "pod", pod: testPod()},
		{name: "user namespace", pod: inUserNS(testPod())},
		{name: "shared pid", pod: with(func(o *runtime.NamespaceOption) { o.Pid = runtime.NamespaceMode_POD })},
		{name: "host's network", pod: with(func(o *runtime.NamespaceOption) { o.Network = node }), hosts: []string{"net", "uts"}},
		{name: "host's network, user namespace", pod: inUserNS(with(func(o *runtime.NamespaceOption) { o.Network = node })), hosts: []string{"net", "uts"}},
		{name: "host's pids", pod: with(func(o *runtime.NamespaceOption) { o.Pid = node }), hosts: []string{"pid"}},
		{name: "host's pids, user namespace", pod: inUserNS(with(func(o *runtime.NamespaceOption) { o.Pid = node })), hosts: []string{"pid"}},
		{name: "host's ipc", pod: with(func(o *runtime.NamespaceOption) { o.Ipc = node }), hosts: []string{"ipc"}},
		{name: "host's ipc, user namespace", pod: inUserNS(with(func(o *runtime.NamespaceOption) { o.Ipc = node })), hosts: []string{"ipc"}},
		{name: "all of the host", pod: with(everywhere), hosts: []string{"net", "uts", "pid", "ipc"}},
		{name: "all of the host, user namespace", pod: inUserNS(with(everywhere)), hosts: []string{"net", "uts", "pid", "ipc"}},
		{
			name: "network namespace of the caller", before: bringNetNS,
			pod: func() Pod { p := testPod(); p.NetNSPath = "/run/netns/mine"; return p }(),
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newTestbed(t)
			if tc.pod.UIDs == nil {
				tc.hosts = append(tc.hosts, "user")
			}
			r := b.request(t, tc.pod)
			if tc.before != nil {
				tc.before(t, &r)
			}
			record, err := b.Start(t.Context(), r)
			require.NoError(t, err)
			for _, kind := range []string{"net", "pid", "ipc", "uts", "mnt", "user"} {
				own, theirs := link(t, "/proc/self/ns/"+kind), link(t, proc(record.Pid, "ns/"+kind))
				require.Equal(t, slices.Contains(tc.hosts, kind), own == theirs, kind)
			}
			require.Equal(t, "pause", strings.TrimSpace(read(t, proc(record.Pid, "comm"))), "it is executed when Start returns")
			requireMap(t, proc(record.Pid, "uid_map"), tc.pod.UIDs)
			requireMap(t, proc(record.Pid, "gid_map"), tc.pod.GIDs)
			requireCgroup(t, record.Pid, r.Spec.Linux.CgroupsPath)
			found, err := Find(t.Context(), r.Cgroup, r.Spec)
			require.NoError(t, err)
			require.Equal(t, record, found)

			pids := strings.Fields(status(t, record.Pid)["NSpid"])
			require.Equal(t, strconv.Itoa(record.Pid), pids[0])
			if slices.Contains(tc.hosts, "pid") {
				require.Len(t, pids, 1)
			} else {
				require.Equal(t, "1", pids[1])
			}
			if r.NetNS != nil {
				requireSameFile(t, r.NetNS, proc(record.Pid, "ns/net"))
			} else if !slices.Contains(tc.hosts, "net") {
				requireOwner(t, record.Pid)
			}
			process, err := b.Process(r.Key)
			require.NoError(t, err)
			want := "web"
			if slices.Contains(tc.hosts, "uts") {
				want, err = os.Hostname()
				require.NoError(t, err)
			}
			var uts unix.Utsname
			require.NoError(t, process.In(unix.CLONE_NEWUTS, func() error { return unix.Uname(&uts) }))
			require.Equal(t, want, unix.ByteSliceToString(uts.Nodename[:]))
			started, err := process.StartTime(t.Context())
			require.NoError(t, err)
			require.Equal(t, record.StartTime, started)
		})
	}
}

func requireMap(t *testing.T, file string, want []specs.LinuxIDMapping) {
	t.Helper()
	if want == nil {
		want = []specs.LinuxIDMapping{{Size: 1<<32 - 1}}
	}
	var lines [][]string
	for _, m := range want {
		lines = append(lines, []string{fmt.Sprint(m.ContainerID), fmt.Sprint(m.HostID), fmt.Sprint(m.Size)})
	}
	var got [][]string
	for line := range strings.Lines(read(t, file)) {
		got = append(got, strings.Fields(line))
	}
	require.Equal(t, lines, got, file)
}

// requireCgroup wants a process in one cgroup of every hierarchy.
func requireCgroup(t *testing.T, pid int, want string) {
	t.Helper()
	for line := range strings.Lines(read(t, proc(pid, "cgroup"))) {
		require.Equal(t, want, strings.SplitN(strings.TrimSpace(line), ":", 3)[2], line)
	}
}

func requireSameFile(t *testing.T, file *os.File, path string) {
	t.Helper()
	want, err := file.Stat()
	require.NoError(t, err)
	got, err := os.Stat(path)
	require.NoError(t, err)
	require.True(t, os.SameFile(want, got), path)
}

// requireOwner wants a process's user namespace to own its network namespace.
func requireOwner(t *testing.T, pid int) {
	t.Helper()
	net, err := os.Open(proc(pid, "ns/net"))
	require.NoError(t, err)
	defer net.Close()
	fd, err := unix.IoctlRetInt(int(net.Fd()), unix.NS_GET_USERNS)
	require.NoError(t, err)
	owner := os.NewFile(uintptr(fd), "owner")
	defer owner.Close()
	requireSameFile(t, owner, proc(pid, "ns/user"))
}

func TestHardening(t *testing.T) {
	user := func(pod Pod) Pod {
		pod.ImageConfig.User = "65535:65534"
		pod.Config.Linux.SecurityContext.SupplementalGroups = []int64{3000}
		return pod
	}
	for _, tc := range []struct {
		name             string
		pod              Pod
		uid, gid, groups string
	}{
		{"root", testPod(), "0", "0", ""},
		{"image's user", user(testPod()), "65535", "65534", "3000 65534"},
		{"root of a user namespace", inUserNS(testPod()), "131072", "262144", ""},
		{"image's user in a user namespace", user(inUserNS(testPod())), "196607", "327678", "265144 327678"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newTestbed(t)
			tc.pod.ImageConfig.WorkingDir = "/work"
			_, record := b.start(t, tc.pod)

			fields, own := status(t, record.Pid), status(t, os.Getpid())
			for name, want := range map[string]string{
				"NoNewPrivs": "1", "Seccomp": "2", "Seccomp_filters": "1", "Umask": "0022", "Threads": "1", "Groups": tc.groups,
				"Uid":    strings.Join([]string{tc.uid, tc.uid, tc.uid, tc.uid}, " "),
				"Gid":    strings.Join([]string{tc.gid, tc.gid, tc.gid, tc.gid}, " "),
				"SigBlk": strings.Repeat("0", 16), "SigIgn": own["SigIgn"],
			} {
				require.Equal(t, want, fields[name], name)
			}
			for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
				require.Equal(t, strings.Repeat("0", 16), fields[set], set)
			}
			require.Equal(t, read(t, "/proc/self/oom_score_adj"), read(t, proc(record.Pid, "oom_score_adj")))
			require.Equal(t, "/work", link(t, proc(record.Pid, "cwd")))
			require.Equal(t, "PATH=/bin\x00", read(t, proc(record.Pid, "environ")))
			sid, err := unix.Getsid(record.Pid)
			require.NoError(t, err)
			require.Equal(t, record.Pid, sid)

			fds, err := os.ReadDir(proc(record.Pid, "fd"))
			require.NoError(t, err)
			require.Len(t, fds, 3)
			for _, fd := range fds {
				var st unix.Stat_t
				require.NoError(t, unix.Stat(proc(record.Pid, "fd/"+fd.Name()), &st))
				require.Equal(t, unix.Mkdev(1, 3), st.Rdev, "it is /dev/null")
			}
			requireLimits(t, record.Pid)

			mounts, err := mountinfo.GetMountsFromReader(strings.NewReader(read(t, proc(record.Pid, "mountinfo"))), nil)
			require.NoError(t, err)
			got := map[string]string{}
			for _, m := range mounts {
				require.Empty(t, m.Optional, "it is private")
				got[m.Mountpoint] = m.Options
			}
			require.Equal(t, map[string]string{
				"/": "ro,nosuid,nodev,relatime", "/dev": "ro,nosuid,nodev,noexec,relatime", "/dev/shm": "ro,nosuid,nodev,noexec,relatime",
			}, got)
			require.Len(t, mounts, len(got))
		})
	}
}

// A user has 200 keys (keyrings(7)), and on some nodes all pods have the same users.
func TestNoKeyIsMade(t *testing.T) {
	b := newTestbed(t)
	before := strings.Count(read(t, "/proc/keys"), "\n")
	const n = 20 // others on the host make some, too
	for i := range n {
		pod := testPod()
		pod.ID = fmt.Sprint("sandbox", i)
		_, _ = b.start(t, pod)
	}
	require.Less(t, strings.Count(read(t, "/proc/keys"), "\n"), before+n)
}

// requireLimits wants the limits that a child of this process has that Go doesn't touch: Go raises the number of files for itself.
func requireLimits(t *testing.T, pid int) {
	t.Helper()
	want, err := exec.Command("cat", "/proc/self/limits").Output()
	require.NoError(t, err)
	require.Equal(t, string(want), read(t, proc(pid, "limits")))
}

func TestProbes(t *testing.T) {
	for name, change := range map[string]func(Pod) Pod{"host's users": func(p Pod) Pod { return p }, "user namespace": inUserNS} {
		for _, probe := range []string{"seccomp", "readonly"} {
			t.Run(probe+", "+name, func(t *testing.T) {
				b := newTestbed(t)
				_, _ = b.start(t, change(prober(probe)))
				require.Zero(t, b.exit(t).exit.Status, "the line of testdata/prober.c that failed")
			})
		}
	}
	info, err := os.Stat(os.DevNull)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o666), info.Mode().Perm())
}

func TestStartFails(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*Pod)
		before func(*testing.T, *testbed, *StartRequest)
		text   string
		is     func(error) bool
	}{
		{name: "no program", change: func(p *Pod) { p.ImageConfig.Entrypoint = []string{"/absent"} }, text: `failed to execute "/absent" of the pause image: no such file`},
		{name: "no program in PATH", change: func(p *Pod) { p.ImageConfig.Entrypoint = []string{"absent"} }, text: `the pause image has no program "absent" in "/bin"`},
		{name: "not executable", change: func(p *Pod) { p.ImageConfig.Entrypoint = []string{"/text"} }, text: `failed to execute "/text" of the pause image: permission denied`},
		{name: "no working directory", change: func(p *Pod) { p.ImageConfig.WorkingDir = "/absent" }, text: `failed to change to the working directory "/absent": no such file`},
		{name: "user that isn't mapped", is: errdefs.IsInvalidArgument, change: func(p *Pod) { *p = inUserNS(*p); p.ImageConfig.User = "70000:1" }, text: "the user 70000 isn't in the pod's user namespace"},
		{name: "group that isn't mapped", is: errdefs.IsInvalidArgument, change: func(p *Pod) { *p = inUserNS(*p); p.ImageConfig.User = "1:70000" }, text: "the group 70000 isn't in the pod's user namespace"},
		{name: "working directory behind a descriptor", change: func(p *Pod) { p.ImageConfig.WorkingDir = "/proc/self/fd/5" }, text: "no such file"},
		{name: "environment without end", change: func(p *Pod) { p.ImageConfig.Env = []string{"A=" + strings.Repeat("a", 4<<20)} }, text: "argument list too long"},
		{
			name: "sysctl of the node", is: errdefs.IsInvalidArgument, text: `sysctl "kernel.core_pattern" is not of a namespace`,
			change: func(p *Pod) { p.Config.Linux.Sysctls = map[string]string{"kernel.core_pattern": "|/x"} },
		},
		{
			name: "value that the kernel refuses", text: `failed to set the sysctl kernel/shm_rmid_forced = "7": write /proc/sys/kernel/shm_rmid_forced: invalid argument`,
			change: func(p *Pod) { p.Config.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "7"} },
		},
		{
			name: "id map of nobody", change: func(p *Pod) { p.UIDs, p.GIDs = []specs.LinuxIDMapping{{ContainerID: 5, HostID: 5, Size: 1}}, podGIDs },
			before: func(_ *testing.T, _ *testbed, r *StartRequest) { r.Spec.Process.User.UID = 5 },
			text:   "failed to clone: fork/exec /proc/self/fd/5: invalid argument",
		},
		{
			name: "namespace that can't be joined", is: errdefs.IsInvalidArgument, text: `unsupported ipc namespace with the path "/proc/1/ns/ipc"`,
			before: func(_ *testing.T, _ *testbed, r *StartRequest) {
				for i, namespace := range r.Spec.Linux.Namespaces {
					if namespace.Type == specs.IPCNamespace {
						r.Spec.Linux.Namespaces[i].Path = "/proc/1/ns/ipc"
					}
				}
			},
		},
		{name: "network namespace that nobody has opened", change: func(p *Pod) { p.NetNSPath = "/absent" }, is: errdefs.IsInvalidArgument, text: `unsupported network namespace with the path "/absent"`},
		{
			name: "unknown namespace", is: errdefs.IsInvalidArgument, text: "unsupported time namespace",
			before: func(_ *testing.T, _ *testbed, r *StartRequest) {
				r.Spec.Linux.Namespaces = append(r.Spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
			},
		},
		{
			name: "host's mounts", is: errdefs.IsInvalidArgument, text: "pause has no mount namespace of its own",
			before: func(_ *testing.T, _ *testbed, r *StartRequest) {
				r.Spec.Linux.Namespaces = slices.DeleteFunc(r.Spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.MountNamespace })
			},
		},
		{
			name: "host's name", is: errdefs.IsInvalidArgument, text: `the hostname "web" would be the host's`,
			before: func(_ *testing.T, _ *testbed, r *StartRequest) {
				r.Spec.Linux.Namespaces = slices.DeleteFunc(r.Spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.UTSNamespace })
			},
		},
		{
			name: "source of a mount is gone", text: "failed to copy the mount of",
			before: func(t *testing.T, b *testbed, r *StartRequest) {
				require.NoError(t, b.files.UnmountShm(r.Key))
				require.NoError(t, os.Remove(b.files.shm(r.Key)))
			},
		},
		{
			name: "mount point is a file", text: `failed to mount "/dev": not a directory`,
			before: func(t *testing.T, b *testbed, _ *StartRequest) {
				require.NoError(t, os.Remove(filepath.Join(b.image, "dev")))
				require.NoError(t, os.WriteFile(filepath.Join(b.image, "dev"), nil, 0o644))
			},
		},
		{
			name: "no seccomp filter", text: "the seccomp filter is empty",
			before: func(t *testing.T, _ *testbed, r *StartRequest) {
				empty, err := sealed("empty", strings.NewReader(""))
				require.NoError(t, err)
				t.Cleanup(func() { empty.Close() })
				r.Seccomp = empty
			},
		},
		{
			name: "key in use", is: errdefs.IsAlreadyExists, text: `there is a pause of "other"`,
			before: func(t *testing.T, b *testbed, r *StartRequest) {
				pod := testPod()
				pod.ID = "other"
				_, _ = b.start(t, pod)
				r.Key = pod.ID
			},
		},
		{
			name: "podfsm-init that is another program", text: "podfsm-init ended before it executed pause, without a report; it ended with status 0: it may not be of the daemon's release",
			before: func(t *testing.T, b *testbed, _ *StartRequest) { b.replaceInit(t, "/bin/true") },
		},
		{
			name: "podfsm-init that is no program", text: "failed to clone: fork/exec /proc/self/fd/5: exec format error",
			before: func(t *testing.T, b *testbed, _ *StartRequest) { b.replaceInit(t, filepath.Join(b.image, "text")) },
		},
		{
			name: "podfsm-init that is killed", text: "without a report; it ended with status 137: the memory of the pod's cgroup may be exhausted",
			before: func(t *testing.T, b *testbed, r *StartRequest) {
				b.replaceInit(t, programs.pause) // it waits
				go func() {
					for t.Context().Err() == nil {
						pids, err := r.Cgroup.Pids()
						if err != nil || len(pids) != 1 {
							continue
						}
						if exe, err := os.Readlink(proc(pids[0], "exe")); err == nil && strings.HasPrefix(exe, "/memfd:") {
							_ = unix.Kill(pids[0], unix.SIGKILL)
							return
						}
					}
				}()
			},
		},
		{
			name: "user namespace without maps", is: errdefs.IsInvalidArgument, text: "a user namespace needs maps",
			before: func(_ *testing.T, _ *testbed, r *StartRequest) {
				r.Spec.Linux.Namespaces = append(r.Spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
			},
		},
		{
			name: "maps without a user namespace", is: errdefs.IsInvalidArgument, text: "a user namespace needs maps",
			before: func(_ *testing.T, _ *testbed, r *StartRequest) { r.Spec.Linux.GIDMappings = podGIDs },
		},
		{
			name: "invalid cgroup", text: "failed to make cgroup",
			before: func(t *testing.T, b *testbed, r *StartRequest) {
				var err error
				r.Cgroup, err = host.PodCgroupOf(b.cgroup+"/cgroup.procs/x", false, nil)
				require.NoError(t, err)
			},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newTestbed(t)
			pod := testPod()
			if tc.change != nil {
				tc.change(&pod)
			}
			r := b.request(t, pod)
			if tc.before != nil {
				tc.before(t, b, &r)
			}
			fds, before := countFDs(t), children(t)
			_, err := b.Start(t.Context(), r)
			require.ErrorContains(t, err, "failed to start pause: ")
			require.ErrorContains(t, err, tc.text)
			if tc.is != nil {
				require.True(t, tc.is(err), "class of %v", err)
			}
			require.Equal(t, fds, countFDs(t), "file descriptors leak")
			require.ElementsMatch(t, before, children(t), "nothing runs, and there is no zombie")
			if tc.name != "key in use" {
				pids, err := r.Cgroup.Pids()
				require.NoError(t, err)
				require.Empty(t, pids)
				_, err = b.Process(r.Key)
				require.True(t, errdefs.IsNotFound(err), err)
			}
			require.Empty(t, b.exits)
		})
	}
}

// mountsWithoutOthers are the lines of mountinfo without those of other tests, which run at the same time and mount in directories for temporary
// files.
func mountsWithoutOthers(t *testing.T, own string) (lines []string) {
	t.Helper()
	for line := range strings.Lines(read(t, "/proc/self/mountinfo")) {
		if !strings.Contains(line, os.TempDir()+"/") || strings.Contains(line, own) {
			lines = append(lines, line)
		}
	}
	return lines
}

// An image's links lead nowhere but into the image: the host's files and mounts are as before.
func TestLinksOfAnImage(t *testing.T) {
	for _, tc := range []struct {
		name  string
		links map[string]string
		runs  bool
	}{
		{"the root in the place of /dev", map[string]string{"dev": "/"}, true},
		{"above the root in the place of /dev", map[string]string{"dev": "../../../../work"}, true},
		{"the host's directory in the place of /dev", map[string]string{"dev": "/host"}, false},
		{"links in the place of /proc and /sys", map[string]string{"proc": "/", "sys": "../.."}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newTestbed(t)
			hosts := t.TempDir()
			for name, target := range tc.links {
				_ = os.Remove(filepath.Join(b.image, name))
				require.NoError(t, os.Symlink(strings.ReplaceAll(target, "/host", hosts), filepath.Join(b.image, name)))
			}
			r := b.request(t, testPod())
			mounts := mountsWithoutOthers(t, "TestLinksOfAnImage")
			record, err := b.Start(t.Context(), r)
			require.Equal(t, tc.runs, err == nil, err)
			require.Equal(t, mounts, mountsWithoutOthers(t, "TestLinksOfAnImage"))
			entries, err := os.ReadDir(hosts)
			require.NoError(t, err)
			require.Empty(t, entries)
			if tc.runs {
				require.Equal(t, "/pause", link(t, proc(record.Pid, "exe")))
			}
		})
	}
}

// A pause program leaves processes behind that outlive it, in the node's pid namespace: they end with its cgroup.
func TestPauseBecomesADaemon(t *testing.T) {
	busybox, err := exec.LookPath("busybox")
	require.NoError(t, err)
	b := newTestbed(t)
	program, err := os.ReadFile(busybox)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(b.image, "busybox"), program, 0o755))
	pod := with(func(o *runtime.NamespaceOption) { o.Pid = runtime.NamespaceMode_NODE })
	pod.ImageConfig.Entrypoint = []string{"/busybox", "setsid", "/busybox", "sleep", "600"} // which forks, as it leads its process group
	r, _ := b.start(t, pod)
	require.Zero(t, b.exit(t).exit.Status)
	pids, err := r.Cgroup.Pids()
	require.NoError(t, err)
	require.NotEmpty(t, pids)
	require.NoError(t, r.Cgroup.End(t.Context()))
	for _, pid := range pids {
		soon(t, func() bool {
			stat, err := os.ReadFile(proc(pid, "stat"))
			return err != nil || strings.Contains(string(stat), ") Z ")
		}, "it lives")
	}
}

// replaceInit has another program in the place of podfsm-init.
func (b *testbed) replaceInit(t *testing.T, path string) {
	t.Helper()
	program, err := loadInit(path)
	require.NoError(t, err)
	require.NoError(t, b.init.Close())
	b.init = program
}

func TestStartEndsWithItsContext(t *testing.T) {
	b := newTestbed(t)
	b.replaceInit(t, programs.pause) // it waits for ever, and reads no specification
	for name, grow := range map[string]int{"waiting for the report": 0, "sending the specification": 1 << 20} {
		t.Run(name, func(t *testing.T) {
			r := b.request(t, testPod())
			r.Spec.Annotations["big"] = strings.Repeat("x", grow)
			ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errors.New("too long"))
			defer cancel()
			fds, before := countFDs(t), children(t)
			_, err := b.Start(ctx, r)
			require.EqualError(t, err, "failed to start pause: too long")
			require.Equal(t, fds, countFDs(t), "file descriptors leak")
			require.ElementsMatch(t, before, children(t))
		})
	}
}

// runInit runs podfsm-init as the daemon does, with a specification that is cut off.
func TestInitEndsWithTheDaemon(t *testing.T) {
	newTestbed(t) // fails without root
	for _, tc := range []struct{ name, spec, report string }{
		{"no word", "", "the daemon closed the socket"},
		{"half a specification", `{"ociVersion":"1.2.0","process":{`, "failed to parse the specification"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ours, theirs, err := socketPair()
			require.NoError(t, err)
			defer ours.Close()
			cmd := exec.Command(programs.init, protocol)
			cmd.ExtraFiles = []*os.File{theirs}
			require.NoError(t, cmd.Start())
			require.NoError(t, theirs.Close())
			if tc.spec != "" {
				_, _, err = ours.WriteMsgUnix([]byte{0}, unix.UnixRights(0), nil)
				require.NoError(t, err)
				_, err = ours.Write([]byte(tc.spec))
				require.NoError(t, err)
			}
			require.NoError(t, ours.CloseWrite())
			report, err := io.ReadAll(ours)
			require.NoError(t, err)
			require.ErrorContains(t, cmd.Wait(), "exit status 1")
			require.Contains(t, string(report), tc.report)
		})
	}
}
