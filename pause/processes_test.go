package pause

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/host"
)

func TestExits(t *testing.T) {
	for _, tc := range []struct {
		name string
		pod  Pod
		end  func(*testing.T, *testbed, Record)
		want uint32
	}{
		{name: "by itself, perhaps before it is watched", pod: prober("exit", "3"), want: 3},
		{name: "by itself with 0", pod: prober("exit", "0"), want: 0},
		{name: "by a signal that it handles", pod: testPod(), want: 0, end: func(t *testing.T, b *testbed, r Record) {
			listens(t, r.Pid)
			require.NoError(t, unix.Kill(r.Pid, unix.SIGTERM))
		}},
		{name: "killed", pod: testPod(), want: 137, end: func(t *testing.T, b *testbed, r Record) { require.NoError(t, unix.Kill(r.Pid, unix.SIGKILL)) }},
		{
			name: "ended", pod: testPod(), want: 137,
			end: func(t *testing.T, b *testbed, r Record) {
				for range 2 {
					exit, err := b.End(t.Context(), "sandbox")
					require.NoError(t, err)
					require.EqualValues(t, 137, exit.Status)
				}
			},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newTestbed(t)
			begun, fds, before := time.Now(), countFDs(t), children(t)
			r := b.request(t, tc.pod)
			record, err := b.Start(t.Context(), r)
			require.NoError(t, err)
			if tc.end != nil {
				tc.end(t, b, record)
			}
			got := b.exit(t)
			require.Equal(t, "sandbox", got.key)
			require.Equal(t, tc.want, got.exit.Status)
			require.WithinRange(t, got.exit.At, begun, time.Now())
			require.ElementsMatch(t, before, children(t), "it is reaped")
			require.NoDirExists(t, proc(record.Pid, ""))

			process, err := b.Process("sandbox")
			require.NoError(t, err, "it is known until it is forgotten")
			require.False(t, process.Alive())
			for range 2 {
				b.Forget("sandbox")
			}
			_, err = b.Process("sandbox")
			require.True(t, errdefs.IsNotFound(err), err)
			exit, err := b.End(t.Context(), "sandbox")
			require.NoError(t, err)
			require.EqualValues(t, UnknownStatus, exit.Status)
			require.Equal(t, fds, countFDs(t), "file descriptors leak")
			require.Empty(t, b.exits, "an exit is told once")
		})
	}
}

func TestEndIsBounded(t *testing.T) {
	b := newTestbed(t)
	r, record := b.start(t, testPod())
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("too long"))
	// A callback that takes its time holds up nobody who ends a pause.
	_, err := b.End(ctx, r.Key)
	if err != nil { // it may have ended already
		require.EqualError(t, err, fmt.Sprintf("pause, process %d, was killed and has not ended: too long", record.Pid))
	}
	require.EqualValues(t, 137, b.exit(t).exit.Status)
}

func TestForgetOfALivingPause(t *testing.T) {
	b := newTestbed(t)
	r, record := b.start(t, testPod())
	process, err := b.Process(r.Key)
	require.NoError(t, err)
	waited, fds := make(chan error, 1), countFDs(t)
	go func() { waited <- process.Wait(context.Background()) }()
	soon(t, func() bool { return countFDs(t) > fds }, "it doesn't wait") // with a descriptor of its own
	b.Forget(r.Key)
	require.DirExists(t, proc(record.Pid, ""), "it lives on")
	require.NoError(t, unix.Kill(record.Pid, unix.SIGKILL))
	require.NoError(t, <-waited)
	soon(t, func() bool { return unix.Kill(record.Pid, 0) == unix.ESRCH }, "it is not reaped")
	require.Empty(t, b.exits, "nobody is told")
}

func TestCloseLeavesProcesses(t *testing.T) {
	b := newTestbed(t)
	r, record := b.start(t, testPod())
	require.NoError(t, b.Close())
	b.exits <- told{}
	held, err := host.Open(record.Pid)
	require.NoError(t, err)
	defer held.Close()
	require.True(t, held.Alive())
	require.Len(t, b.Processes.exits.watching, 1)

	// As the next daemon, which is its parent here, too.
	next, err := NewProcesses(func(key string, exit Exit) { b.exits <- told{key, exit} })
	require.NoError(t, err)
	b.Processes = next
	for range 2 {
		lives, err := b.Adopt(t.Context(), r.Key, record)
		require.NoError(t, err)
		require.True(t, lives)
	}
	require.Equal(t, told{}, <-b.exits)
	require.NoError(t, held.Kill())
	require.NoError(t, held.Wait(t.Context()))
	_, err = unix.Wait4(record.Pid, nil, 0, nil)
	require.NoError(t, err)
	require.Equal(t, r.Key, b.exit(t).key)
}

// traceEnv makes this program trace the process that it names until its standard input ends, as a debugger on the node
// does that never waits.
const traceEnv = "PAUSE_TEST_TRACE"

func tracer() {
	runtime.LockOSThread()
	pid, err := strconv.Atoi(os.Getenv(traceEnv))
	if err == nil {
		err = unix.PtraceSeize(pid)
	}
	if err != nil {
		panic(err)
	}
	fmt.Println("traced")
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// trace traces a process until letGo is called.
func trace(t *testing.T, pid int) (letGo func()) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", traceEnv, pid), "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	letGo = sync.OnceFunc(func() {
		require.NoError(t, in.Close())
		require.NoError(t, cmd.Wait())
	})
	t.Cleanup(letGo)
	_, err = io.ReadFull(out, make([]byte, len("traced\n")))
	require.NoError(t, err)
	return letGo
}

// The kernel hands out a traced child that has ended only after its tracer. That holds up no other exit, and no end.
func TestTracedPause(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(*testbed, Record) error
		want uint32
	}{
		{"by itself", func(_ *testbed, r Record) error { return unix.Kill(r.Pid, unix.SIGKILL) }, UnknownStatus},
		{"ended", func(b *testbed, _ Record) error {
			_, err := b.End(context.Background(), "sandbox")
			return err
		}, 137},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newTestbed(t)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			r, record := b.start(t, testPod())
			other, _ := b.start(t, func() Pod { p := testPod(); p.ID = "other"; return p }())
			letGo := trace(t, record.Pid)
			require.NoError(t, tc.end(b, record))
			soon(t, func() bool { return status(t, record.Pid)["State"] == "Z (zombie)" }, "it doesn't end")

			exit, err := b.End(ctx, other.Key)
			require.NoError(t, err)
			require.EqualValues(t, 137, exit.Status)
			require.ElementsMatch(t, []string{r.Key, other.Key}, []string{b.exit(t).key, b.exit(t).key})
			exit, err = b.End(ctx, r.Key) // only now: the status of what podfsm kills is known
			require.NoError(t, err)
			require.Equal(t, tc.want, exit.Status)
			b.Forget(r.Key)
			require.Equal(t, "Z (zombie)", status(t, record.Pid)["State"], "the tracer has let go")
			letGo()
			soon(t, func() bool { return unix.Kill(record.Pid, 0) == unix.ESRCH }, "it is not reaped")
			require.Empty(t, b.exits, "an exit is told once")
		})
	}
}

// The daemon's end doesn't wait for a tracer.
func TestCloseWithATracedPause(t *testing.T) {
	b := newTestbed(t)
	_, record := b.start(t, testPod())
	letGo := trace(t, record.Pid)
	require.NoError(t, unix.Kill(record.Pid, unix.SIGKILL))
	require.EqualValues(t, UnknownStatus, b.exit(t).exit.Status)
	closed := make(chan error, 1)
	go func() { closed <- b.Close() }()
	select {
	case err := <-closed:
		require.NoError(t, err)
	case <-time.After(5 * time.Second):
		require.Fail(t, "Close waits for the tracer")
	}
	letGo()
	_, err := unix.Wait4(record.Pid, nil, 0, nil)
	require.NoError(t, err)
}

// A start that fails doesn't wait for a tracer of podfsm-init.
func TestTracedInit(t *testing.T) {
	b := newTestbed(t)
	r := b.request(t, testPod())
	letGo, pid := func() {}, 0
	r.Rootfs = func(userns *os.File) (*os.File, error) {
		all := children(t)
		var err error
		pid, err = strconv.Atoi(all[len(all)-1])
		require.NoError(t, err)
		letGo = trace(t, pid)
		return nil, errors.New("no root filesystem")
	}
	started := make(chan error, 1)
	go func() {
		_, err := b.Start(t.Context(), r)
		started <- err
	}()
	select {
	case err := <-started:
		require.ErrorContains(t, err, "no root filesystem")
	case <-time.After(5 * time.Second):
		require.Fail(t, "Start waits for the tracer")
	}
	letGo()
	soon(t, func() bool { return unix.Kill(pid, 0) == unix.ESRCH }, "it is not reaped")
}

// A pause that can't be watched doesn't stay.
func TestWatchFails(t *testing.T) {
	b := newTestbed(t)
	fds, before := countFDs(t), children(t)
	r := b.request(t, testPod())
	watch := b.Processes.exits
	b.Processes.exits = &exits{epoll: b.seccomp, done: make(chan struct{}), watching: map[int32]watched{}} // that is no epoll
	_, err := b.Start(t.Context(), r)
	require.ErrorContains(t, err, "failed to watch for the exit of pause")
	require.ElementsMatch(t, before, children(t))
	require.Empty(t, b.Processes.exits.watching)
	<-b.Processes.exits.done
	b.Processes.exits = watch
	_, err = b.Process(r.Key)
	require.True(t, errdefs.IsNotFound(err), err)
	require.Equal(t, fds, countFDs(t), "file descriptors leak")
}

// inode is that of a namespace, by its link in /proc.
func inode(t *testing.T, link string) uint64 {
	t.Helper()
	info, err := os.Stat(link)
	require.NoError(t, err)
	return info.Sys().(*syscall.Stat_t).Ino
}

func TestAdoptRefuses(t *testing.T) {
	b := newTestbed(t)
	_, record := b.start(t, testPod())
	_, gone := b.start(t, func() Pod { p := prober("exit", "0"); p.ID = "gone"; return p }())
	_ = b.exit(t)
	zombie := exec.Command("true")
	require.NoError(t, zombie.Start())
	soon(t, func() bool { return status(t, zombie.Process.Pid)["State"] == "Z (zombie)" }, "it doesn't end")
	stat, err := host.ReadStat(t.Context(), zombie.Process.Pid)
	require.NoError(t, err)
	fds := countFDs(t)
	for name, wrong := range map[string]Record{
		"another start time":        {Pid: record.Pid, StartTime: record.StartTime + 1},
		"another network namespace": {Pid: record.Pid, StartTime: record.StartTime, NetNS: inode(t, "/proc/self/ns/net")},
		"no start time":             {Pid: record.Pid},
		"ended":                     gone,
		"no pid":                    {},
		"a group":                   {Pid: -record.Pid, StartTime: record.StartTime},
		"zombie":                    {Pid: zombie.Process.Pid, StartTime: stat.StartTime},
	} {
		lives, err := b.Adopt(t.Context(), name, wrong)
		require.NoError(t, err, name)
		require.False(t, lives, name)
	}
	require.Equal(t, fds, countFDs(t), "file descriptors leak")

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	lives, err := b.Adopt(ctx, "unknown", record)
	require.ErrorIs(t, err, context.Canceled)
	require.False(t, lives)
	require.Equal(t, fds, countFDs(t), "file descriptors leak")
	require.NoError(t, zombie.Wait())
}

// The helper is an earlier daemon: it starts a pause, tells of it on its standard output, and ends.
const helperEnv = "PAUSE_TEST_HELPER"

type helperRequest struct {
	Init, Image, Cgroup string
	Files               Files
	Spec                *specs.Spec
}

func helper() {
	var r helperRequest
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	must(json.Unmarshal([]byte(os.Getenv(helperEnv)), &r))
	p, err := NewProcesses(func(string, Exit) {})
	must(err)
	must(p.Load(r.Init))
	filter, err := SeccompFilter()
	must(err)
	cgroup, err := host.PodCgroupOf(r.Cgroup, false, nil)
	must(err)
	record, err := p.Start(context.Background(), StartRequest{Key: "sandbox", Spec: r.Spec, Rootfs: rootfsOf(r.Files, "sandbox", r.Image), Seccomp: filter, Cgroup: cgroup})
	must(err)
	must(json.NewEncoder(os.Stdout).Encode(record))
}

// startElsewhere starts the pause of a pod that is nobody's child: it goes to this process, as to the host's init.
func (b *testbed) startElsewhere(t *testing.T, pod Pod) Record {
	t.Helper()
	require.NoError(t, unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
	t.Cleanup(func() { require.NoError(t, unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)) })
	r := b.request(t, pod)
	request, err := json.Marshal(helperRequest{Init: programs.init, Image: b.image, Cgroup: r.Spec.Linux.CgroupsPath, Files: b.files, Spec: r.Spec})
	require.NoError(t, err)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), helperEnv+"="+string(request), "GORACE=atexit_sleep_ms=0")
	var problems bytes.Buffer
	cmd.Stderr = &problems
	out, err := cmd.Output()
	require.NoError(t, err, problems.String())
	var record Record
	require.NoError(t, json.Unmarshal(out, &record))
	return record
}

func TestAdopt(t *testing.T) {
	for _, tc := range []struct {
		name   string
		signal unix.Signal
		reaped bool
		want   uint32
	}{
		{"it exits", unix.SIGTERM, true, 0},
		{"it is killed", unix.SIGKILL, true, 137},
		{"nobody reaps it", unix.SIGKILL, false, UnknownStatus},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newTestbed(t)
			record := b.startElsewhere(t, testPod())
			record.NetNS = inode(t, proc(record.Pid, "ns/net"))
			fds := countFDs(t)
			lives, err := b.Adopt(t.Context(), "sandbox", record)
			require.NoError(t, err)
			require.True(t, lives)
			process, err := b.Process("sandbox")
			require.NoError(t, err)
			require.Equal(t, record.Pid, process.Pid())

			listens(t, record.Pid)
			require.NoError(t, unix.Kill(record.Pid, tc.signal))
			if tc.reaped {
				_, err := unix.Wait4(record.Pid, nil, 0, nil)
				require.NoError(t, err)
			}
			want := tc.want
			if held, err := host.Open(os.Getpid()); err == nil {
				if _, err := held.ExitStatus(); !errors.Is(err, unix.ENODATA) {
					want = UnknownStatus // a kernel before 6.15
				}
				held.Close()
			}
			require.Equal(t, want, b.exit(t).exit.Status)
			if !tc.reaped {
				_, err := unix.Wait4(record.Pid, nil, 0, nil)
				require.NoError(t, err)
			}
			b.Forget("sandbox")
			require.Equal(t, fds, countFDs(t), "file descriptors leak")
		})
	}
}

func TestMany(t *testing.T) {
	b := newTestbed(t)
	fds, before := countFDs(t), children(t)
	const n = 200
	requests := make([]StartRequest, n)
	for i := range requests {
		pod := testPod()
		if i%2 == 0 {
			pod = inUserNS(pod)
		}
		pod.ID = fmt.Sprintf("sandbox%d", i)
		requests[i] = b.request(t, pod)
	}
	errs := make([]error, n)
	var all sync.WaitGroup
	slots := make(chan struct{}, 16)
	for i, r := range requests {
		all.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			record, err := b.Start(t.Context(), r)
			if err == nil && i%3 == 0 {
				err = unix.Kill(record.Pid, unix.SIGKILL)
			}
			if err == nil && i%3 == 1 {
				_, err = b.End(t.Context(), r.Key)
			}
			errs[i] = err
		})
	}
	all.Wait()
	require.NoError(t, errors.Join(errs...))
	for _, r := range requests {
		all.Go(func() {
			if _, err := b.End(t.Context(), r.Key); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	keys := map[string]bool{}
	for range n {
		keys[b.exit(t).key] = true
	}
	require.Len(t, keys, n)
	require.ElementsMatch(t, before, children(t))
	for _, r := range requests {
		b.Forget(r.Key)
	}
	require.Equal(t, fds, countFDs(t), "file descriptors leak")
	require.Empty(t, b.Processes.exits.watching)
}
