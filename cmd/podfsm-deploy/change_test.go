package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	goruntime "runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// changeVariable has this program make a change in a directory, and be killed on the way.
const changeVariable = "PODFSM_DEPLOY_TEST_CHANGE"

func init() {
	if os.Getenv(changeVariable) != "" {
		goruntime.LockOSThread() // strace counts the system calls of one thread
	}
}

func TestMain(m *testing.M) {
	if dir := os.Getenv(changeVariable); dir != "" {
		if err := changeAll(&host{dir: dir, out: os.Stderr}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// node is the part of a node that a change works on.
type node struct {
	*testing.T
	*host
	said     bytes.Buffer
	restarts string // a file with a line for each
}

// answers are those of a containerd.
type answers struct{ podfsm, noCRI, notReady bool }

// containerd is a fake: it answers like the node's own one, and after one restart otherwise.
type containerd struct {
	introspection.UnimplementedIntrospectionServer
	runtime.UnimplementedRuntimeServiceServer
	*node
	before, changed answers
}

func (c *containerd) now() answers {
	if c.countRestarts() == 1 {
		return c.changed
	}
	return c.before
}

func (c *containerd) Plugins(context.Context, *introspection.PluginsRequest) (*introspection.PluginsResponse, error) {
	if !c.now().podfsm {
		return &introspection.PluginsResponse{}, nil
	}
	return &introspection.PluginsResponse{Plugins: []*introspection.Plugin{{Type: "io.containerd.podsandbox.controller.v1", ID: "podfsm"}}}, nil
}

func (c *containerd) Server(context.Context, *emptypb.Empty) (*introspection.ServerResponse, error) {
	return &introspection.ServerResponse{Pid: uint64(os.Getpid())}, nil
}

func (c *containerd) Status(context.Context, *runtime.StatusRequest) (*runtime.StatusResponse, error) {
	if c.now().noCRI {
		return nil, status.Error(codes.Unimplemented, "unknown service")
	}
	ready := &runtime.RuntimeCondition{Type: runtime.RuntimeReady, Status: !c.now().notReady}
	return &runtime.StatusResponse{Status: &runtime.RuntimeStatus{Conditions: []*runtime.RuntimeCondition{ready}}}, nil
}

// systemctlScript notes each restart.
const systemctlScript = `#!/bin/sh
[ "$1" != restart ] || echo restart >>"$(dirname "$0")/restarts"
`

func startNode(t *testing.T, before, changed answers) *node {
	t.Helper()
	n := &node{T: t}
	dir := t.TempDir()
	n.restarts = filepath.Join(dir, "restarts")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "systemctl"), []byte(systemctlScript), 0o755))
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	n.host = &host{dir: filepath.Join(dir, "deploy"), address: filepath.Join(dir, "socket"), out: &n.said, readyTimeout: time.Minute}
	serving, fake := grpc.NewServer(), &containerd{node: n, before: before, changed: changed}
	introspection.RegisterIntrospectionServer(serving, fake)
	runtime.RegisterRuntimeServiceServer(serving, fake)
	listener, err := net.Listen("unix", n.address)
	require.NoError(t, err)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = serving.Serve(listener) // until it is stopped
	}()
	t.Cleanup(func() {
		serving.Stop()
		<-served
	})
	n.makeFiles()
	return n
}

func (n *node) countRestarts() int {
	text, err := os.ReadFile(n.restarts)
	if !errors.Is(err, fs.ErrNotExist) {
		require.NoError(n, err)
	}
	return strings.Count(string(text), "restart\n")
}

// files are what a change finds: a file, a symlink, one that goes, and one that comes.
func files(dir string) (changed, link, gone, come string) {
	dir = filepath.Join(dir, "..", "etc")
	return filepath.Join(dir, "changed"), filepath.Join(dir, "link"), filepath.Join(dir, "gone"), filepath.Join(dir, "new", "come")
}

func (n *node) makeFiles() {
	changed, link, gone, come := files(n.dir)
	require.NoError(n, os.RemoveAll(filepath.Dir(changed)))
	require.NoError(n, os.MkdirAll(n.dir, 0o755))
	require.NoError(n, os.MkdirAll(filepath.Dir(come), 0o755))
	require.NoError(n, os.WriteFile(changed, []byte("before"), 0o640))
	require.NoError(n, os.Symlink("changed", link))
	require.NoError(n, os.WriteFile(gone, []byte("before"), 0o600))
}

// requireBefore sees that the files are as makeFiles has made them, and that nothing else is left.
func (n *node) requireBefore() {
	n.Helper()
	changed, link, gone, come := files(n.dir)
	for file, mode := range map[string]fs.FileMode{changed: 0o640, gone: 0o600} {
		text, err := os.ReadFile(file)
		require.NoError(n, err)
		require.Equal(n, "before", string(text))
		info, err := os.Stat(file)
		require.NoError(n, err)
		require.Equal(n, mode, info.Mode())
	}
	target, err := os.Readlink(link)
	require.NoError(n, err)
	require.Equal(n, "changed", target)
	for dir, left := range map[string]int{filepath.Dir(changed): 4, filepath.Dir(come): 0, n.dir: 0} {
		entries, err := os.ReadDir(dir)
		require.NoError(n, err)
		require.Len(n, entries, left)
	}
}

// change begins a change of the files.
func (n *node) change() *change {
	n.Helper()
	changed, link, gone, come := files(n.dir)
	c, err := n.begin([]string{changed, link, gone, come})
	require.NoError(n, err)
	return c
}

// applyAll changes the files.
func applyAll(dir string) error {
	changed, link, gone, come := files(dir)
	return errors.Join(writeFile(changed, []byte("after"), 0o644), writeFile(link, []byte("after"), 0o644), writeFile(come, []byte("after"), 0o644), remove(gone))
}

// changeAll changes the files and undoes that, since it fails in the end.
func changeAll(h *host) error {
	changed, link, gone, come := files(h.dir)
	c, err := h.begin([]string{changed, link, gone, come})
	if err != nil {
		return err
	}
	failure := errors.New("it fails")
	err = c.do(context.Background(), func() error { return errors.Join(applyAll(h.dir), failure) }, true)
	if err != nil && err.Error() == failure.Error() {
		return nil
	}
	return err
}

// Wherever a SIGKILL ends a change or its rollback, the next rollback brings all files back.
func TestKilledAtEachStep(t *testing.T) {
	n := startNode(t, answers{}, answers{})
	for _, call := range []string{"mkdirat", "linkat", "renameat", "unlinkat", "fsync"} {
		kills := 0
		for n.killedAt(call, kills+1) {
			kills++
			require.NoError(t, n.rollback(t.Context()))
			n.requireBefore()
		}
		require.Greater(t, kills, 3, call)
		n.requireBefore()
	}
	require.Zero(t, n.countRestarts(), "the change didn't restart containerd")
}

// killedAt makes a change that is killed at a system call, and returns false if the change ends before.
func (n *node) killedAt(call string, count int) bool {
	n.Helper()
	n.makeFiles()
	cmd := exec.CommandContext(n.Context(), "strace", "--follow-forks", "--seccomp-bpf", "-o", "/dev/null", "-e", fmt.Sprintf("inject=%s:signal=KILL:when=%d", call, count), os.Args[0])
	cmd.Env = append(os.Environ(), changeVariable+"="+n.dir)
	out, err := cmd.CombinedOutput()
	if err == nil {
		return false
	}
	require.Equal(n, "signal: killed", err.Error(), "%s", out)
	return true
}

// A power cut may keep any directory as it was until it is synced. So all are synced when a rollback becomes possible, and when it is none
// any more: the files may be on other filesystems than the list.
func TestPowerCutAtEitherEnd(t *testing.T) {
	n := startNode(t, answers{}, answers{})
	trace := filepath.Join(t.TempDir(), "trace")
	cmd := exec.CommandContext(t.Context(), "strace", "--follow-forks", "--decode-fds=path", "-s", "4096", "-o", trace,
		"-e", "trace=linkat,renameat,unlinkat,fsync", os.Args[0])
	cmd.Env = append(os.Environ(), changeVariable+"="+n.dir)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	text, err := os.ReadFile(trace)
	require.NoError(t, err)

	call := regexp.MustCompile(`(?m)^\d+ +(\w+)\((.*)\) += 0$`)
	path := regexp.MustCompile(`"([^"]+)"`)
	synced := regexp.MustCompile(`^\d+<(.+)>$`)
	list, ends := n.changeIn(nil).list(), 0
	changed := map[string]bool{} // directories that are not synced
	for _, c := range call.FindAllStringSubmatch(string(text), -1) {
		if c[1] == "fsync" {
			delete(changed, synced.FindStringSubmatch(c[2])[1])
			continue
		}
		paths := path.FindAllStringSubmatch(c[2], -1)
		to := paths[len(paths)-1][1]
		if to == list {
			require.Empty(t, changed, "%s", c[0])
			ends++
		}
		changed[filepath.Dir(to)] = true // each renaming stays in its directory
	}
	require.Equal(t, 2, ends, "%s", text)
}

// Others don't read a file that only its directory hides from them.
func TestFilesAreKeptInSecret(t *testing.T) {
	n := startNode(t, answers{}, answers{})
	info, err := os.Stat(n.change().dir)
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o700), info.Mode().Perm())
}

// A containerd that is not right is rolled back, at once unless time may help.
func TestContainerdIsNotRight(t *testing.T) {
	for name, tc := range map[string]struct {
		before, changed answers
		wantsPodfsm     bool
		timeout         time.Duration
		fails           string
	}{
		"another program":  {wantsPodfsm: true, timeout: time.Minute, fails: "containerd runs without podfsm"},
		"still podfsm":     {before: answers{podfsm: true}, changed: answers{podfsm: true}, timeout: time.Minute, fails: "containerd still runs with podfsm"},
		"no CRI":           {changed: answers{podfsm: true, noCRI: true}, wantsPodfsm: true, timeout: time.Minute, fails: "containerd has no CRI service"},
		"CRI is not ready": {changed: answers{podfsm: true, notReady: true}, wantsPodfsm: true, timeout: 5 * pollInterval / 2, fails: "containerd's runtime is not ready"},
	} {
		t.Run(name, func(t *testing.T) {
			n := startNode(t, tc.before, tc.changed)
			n.readyTimeout = tc.timeout
			start := time.Now()
			err := n.change().do(t.Context(), func() error { return applyAll(n.dir) }, tc.wantsPodfsm)
			require.ErrorContains(t, err, tc.fails)
			require.Less(t, time.Since(start), 30*time.Second)
			require.Equal(t, 2, n.countRestarts())
			require.Contains(t, n.said.String(), "rolled back: containerd is as it was")
			n.requireBefore()
		})
	}
}

// SIGTERM ends a switch by a rollback.
func TestTerminated(t *testing.T) {
	n := startNode(t, answers{}, answers{})
	ctx, cancel := context.WithCancel(t.Context())
	err := n.change().do(ctx, func() error { cancel(); return applyAll(n.dir) }, true)
	require.ErrorIs(t, err, context.Canceled)
	n.requireBefore()
}

// Where files can't have a second link, the rollback copies them.
func TestRollbackAcrossFilesystems(t *testing.T) {
	n := startNode(t, answers{}, answers{})
	n.mount(n.dir, "1m")
	require.NoError(t, changeAll(n.host))
	n.requireBefore()
}

// A rollback needs no space.
func TestFullDisk(t *testing.T) {
	n := startNode(t, answers{}, answers{})
	disk := t.TempDir()
	n.mount(disk, "64k")
	filler := filepath.Join(disk, "filler")
	n.dir = filepath.Join(disk, "deploy")
	n.makeFiles()
	err := n.change().do(t.Context(), func() error {
		return errors.Join(applyAll(n.dir), os.WriteFile(filler, make([]byte, 1<<20), 0o600))
	}, true)
	require.ErrorIs(t, err, unix.ENOSPC)
	n.requireBefore()
	_, err = os.Stat(filler)
	require.NoError(t, err)
}

// mount mounts an empty filesystem of a size.
func (n *node) mount(dir, size string) {
	n.Helper()
	require.NoError(n, os.MkdirAll(dir, 0o755))
	require.NoError(n, unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size))
	n.Cleanup(func() { require.NoError(n, unix.Unmount(dir, 0)) })
}
