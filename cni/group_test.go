package cni

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// hangs is the body of a plugin that hangs, with a child that hangs too and holds the plugin's pipes. A fifo tells when both do.
const hangs = `[ $CNI_COMMAND = ADD ] || exit 0
sh -c 'echo $$ > $0; echo > $1; sleep 600' $dir/child $dir/started &
echo $$ > $dir/parent
wait`

// hangRig has a plugin that hangs, and tells when it does.
func hangRig(t *testing.T, body string) (r *rig, started func()) {
	p := newPlugins(t)
	fifo := filepath.Join(p.dir, "started")
	require.NoError(t, unix.Mkfifo(fifo, 0o600))
	p.script("hang", body)
	return newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"hang"}`)), func() {
		_, err := os.ReadFile(fifo)
		require.NoError(t, err)
	}
}

// pid is one that a plugin has written down.
func (p *plugins) pid(name string) int {
	pid, err := strconv.Atoi(p.read(name))
	require.NoError(p.t, err)
	return pid
}

func requireDead(t *testing.T, pid int) {
	t.Helper()
	if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil {
		require.Contains(t, string(stat), ") Z ", "process %d lives", pid)
	}
}

func TestCancelKillsGroup(t *testing.T) {
	r, started := hangRig(t, hangs)
	ctx, cancel := context.WithCancelCause(t.Context())
	errs := make(chan error)
	go func() { errs <- r.add(ctx) }()
	started()
	cancel(fmt.Errorf("the node is going down: %w", context.Canceled))
	err := <-errs

	require.EqualError(t, err, `plugin type="hang" name="net" failed (add): killed: the node is going down: context canceled`)
	require.True(t, errdefs.IsCanceled(err))
	requireDead(t, r.pid("parent"))
	requireDead(t, r.pid("child"))
	require.Equal(t, []string{"0.0 adding", "0.0 adding!"}, r.phases(), "what has happened is recorded after the cancel too")
	require.NoError(t, r.del(t.Context()))
	require.True(t, r.attachment.Settled())
}

func TestAddDeadline(t *testing.T) {
	p := newPlugins(t)
	p.script("hang", "sleep 600")
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"hang"}`))
	r.driver = NewDriver(Options{AddTimeout: 100 * time.Millisecond})
	err := r.add(t.Context())
	require.EqualError(t, err, `plugin type="hang" name="net" failed (add): killed: no answer within 100ms: context deadline exceeded`)
	require.True(t, errdefs.IsDeadlineExceeded(err))
}

func TestDelDeadline(t *testing.T) {
	p := newPlugins(t)
	p.script("first", good("10.1.2.3"))
	p.script("hang", `[ $CNI_COMMAND = DEL ] && [ ! -e $dir/healed ] && sleep 600
`+good("10.1.2.3"))
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"first"}`, `{"type":"hang"}`))
	require.NoError(t, r.add(t.Context()))
	require.NoError(t, os.Remove(filepath.Join(p.dir, "first"))) // whose DEL would be under the short deadline too

	impatient := NewDriver(Options{DelTimeout: 100 * time.Millisecond})
	err := impatient.Del(t.Context(), r.attachment, r.record)
	require.True(t, errdefs.IsDeadlineExceeded(err))
	require.ErrorContains(t, err, `plugin type="first" name="net" failed (delete): failed to find plugin`)

	p.script("first", good("10.1.2.3"))
	require.NoError(t, os.WriteFile(filepath.Join(p.dir, "healed"), nil, 0o600))
	require.NoError(t, r.del(t.Context()))
	require.True(t, r.attachment.Settled())
}

// The plugin has answered and ended, but left a process behind that holds its pipes: it is not waited for, nor left alive.
func TestLeftBehindInGroup(t *testing.T) {
	r, started := hangRig(t, `[ $CNI_COMMAND = ADD ] || exit 0
sh -c 'echo $$ > $0; echo > $1; sleep 600' $dir/child $dir/started &
`+good("10.1.2.3"))
	errs := make(chan error)
	go func() { errs <- r.add(t.Context()) }()
	started()
	require.NoError(t, <-errs)
	requireDead(t, r.pid("child"))
	require.Equal(t, []string{"0.0 adding", "0.0 added"}, r.phases())
}

// A process without the pipes doesn't even delay it.
func TestLeftBehindWithoutPipes(t *testing.T) {
	r, started := hangRig(t, `[ $CNI_COMMAND = ADD ] || exit 0
sh -c 'echo $$ > $0; echo > $1; sleep 600' $dir/child $dir/started <&- >&- 2>&- &
cat $dir/go > /dev/null
`+good("10.1.2.3"))
	require.NoError(t, unix.Mkfifo(filepath.Join(r.dir, "go"), 0o600))
	r.driver = NewDriver(Options{PipeTimeout: time.Hour})
	errs := make(chan error)
	go func() { errs <- r.add(t.Context()) }()
	started()
	require.NoError(t, os.WriteFile(filepath.Join(r.dir, "go"), nil, 0)) // the plugin ends only now
	require.NoError(t, <-errs)
	requireDead(t, r.pid("child"))
}

// A daemon with a session of its own is not the plugin any more: it lives on, but keeps nobody waiting.
func TestLeftBehindInSession(t *testing.T) {
	r, started := hangRig(t, `[ $CNI_COMMAND = ADD ] || exit 0
setsid sh -c 'echo $$ > $0; echo > $1; exec sleep 600' $dir/child $dir/started &
cat $dir/go > /dev/null
`+good("10.1.2.3"))
	require.NoError(t, unix.Mkfifo(filepath.Join(r.dir, "go"), 0o600))
	errs := make(chan error)
	go func() { errs <- r.add(t.Context()) }()
	started()
	require.NoError(t, os.WriteFile(filepath.Join(r.dir, "go"), nil, 0))
	require.NoError(t, <-errs)
	require.NoError(t, unix.Kill(r.pid("child"), unix.SIGKILL))
}

// Nor does one that holds the configuration, which the plugin has not read and which is more than a pipe takes.
func TestLeftBehindWithStdin(t *testing.T) {
	r, started := hangRig(t, "")
	script := "#!/bin/sh\n[ $CNI_COMMAND = ADD ] || exit 0\nexec 3<&0\n" +
		"setsid sh -c 'echo $$ > $0; echo > $1; exec sleep 600' " + r.dir + "/child " + r.dir + "/started <&3 >&- 2>&- &\n" +
		"cat " + r.dir + "/go > /dev/null\n" + good("10.1.2.3")
	require.NoError(t, os.WriteFile(filepath.Join(r.dir, "hang"), []byte(script), 0o755))
	require.NoError(t, unix.Mkfifo(filepath.Join(r.dir, "go"), 0o600))
	r.attachment.Networks = []Network{network(t, "net", "1.0.0", `{"type":"hang","x":"`+strings.Repeat("x", 200<<10)+`"}`)}
	r.attachment.Networks[0].IfName = "eth0"
	errs := make(chan error)
	go func() { errs <- r.add(t.Context()) }()
	started()
	require.NoError(t, os.WriteFile(filepath.Join(r.dir, "go"), nil, 0))
	require.NoError(t, <-errs)
	require.NoError(t, unix.Kill(r.pid("child"), unix.SIGKILL))
}

// Where nobody reaps orphans, as below a containerd that is pid 1, killed members of a group stay zombies.
func TestZombieInGroup(t *testing.T) {
	require.NoError(t, unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
	t.Cleanup(func() { require.NoError(t, unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)) })
	r, started := hangRig(t, hangs)
	ctx, cancel := context.WithCancel(t.Context())
	errs := make(chan error)
	go func() { errs <- r.add(ctx) }()
	started()
	cancel()
	require.ErrorIs(t, <-errs, context.Canceled)
	requireDead(t, r.pid("child"))

	// Ours to reap, with what else it has left.
	for {
		var status unix.WaitStatus
		if _, err := unix.Wait4(-1, &status, 0, nil); err == unix.ECHILD {
			return
		}
	}
}

func TestGroupLives(t *testing.T) {
	require.True(t, memberLives("/proc/self/stat", unix.Getpgrp()))
	require.False(t, memberLives("/proc/self/stat", unix.Getpgrp()+1))
	require.False(t, memberLives("/proc/self/absent", unix.Getpgrp()))
	// A name with spaces and parentheses.
	stat := filepath.Join(t.TempDir(), "stat")
	for state, lives := range map[string]bool{"S": true, "D": true, "Z": false, "X": false} {
		require.NoError(t, os.WriteFile(stat, []byte("7 (a) Z 1 2) "+state+" 1 42 7 0"), 0o600))
		require.Equal(t, lives, memberLives(stat, 42))
	}
	// A process whose pid is the number: it can't be a member of a group that others had.
	require.False(t, groupLives(os.Getpid()))
}
