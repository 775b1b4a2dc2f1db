package cni

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/host"
)

// hangs is the body of a plugin that hangs, with a child that hangs, too, and holds the plugin's
// pipes. A fifo tells when both hang.
const hangs = `[ $CNI_COMMAND = ADD ] || exit 0
sh -c 'echo $$ > $0; echo > $1; sleep 600' $dir/child $dir/started &
echo $$ > $dir/parent
wait`

// hangRig returns a rig with a plugin that hangs. started waits until the plugin hangs.
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

// pid returns a pid that a plugin has written to a file.
func (p *plugins) pid(name string) int {
	pid, err := strconv.Atoi(p.read(name))
	require.NoError(p.t, err)
	return pid
}

func requireAlive(t *testing.T, pid int) {
	t.Helper()
	stat, err := host.ReadStat(t.Context(), pid)
	require.NoError(t, err)
	require.NotContains(t, "ZX", string(stat.State), "process %d has ended", pid)
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
	require.Equal(t, []string{"0.0 adding", "0.0 adding!"}, r.phases(), "the outcome is recorded after the cancellation")
	require.NoError(t, r.del(t.Context()))
	require.True(t, r.attachment.Settled())
}

func TestAddDeadline(t *testing.T) {
	p := newPlugins(t)
	p.script("hang", "sleep 600")
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"hang"}`))
	r.driver = newDriver(t, Options{AddTimeout: time.Second})
	err := r.add(t.Context())
	require.EqualError(t, err, `plugin type="hang" name="net" failed (add): killed: no answer within 1s: context deadline exceeded`)
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

	impatient := newDriver(t, Options{DelTimeout: 100 * time.Millisecond})
	err := impatient.Del(t.Context(), r.attachment, r.record)
	require.True(t, errdefs.IsDeadlineExceeded(err))
	require.ErrorContains(t, err, `plugin type="first" name="net" failed (delete): failed to find plugin`)

	p.script("first", good("10.1.2.3"))
	require.NoError(t, os.WriteFile(filepath.Join(p.dir, "healed"), nil, 0o600))
	require.NoError(t, r.del(t.Context()))
	require.True(t, r.attachment.Settled())
}

// A process that a successful plugin leaves running is a daemon and lives on, however it was
// forked. It loses the pipes of the plugin, and nothing waits for them.
func TestLeftBehind(t *testing.T) {
	for _, tc := range []struct{ name, start string }{
		{"with pipes", `sh -c 'echo $$ > $0; echo > $1; exec sleep 600' $dir/child $dir/started &`},
		{"without pipes", `sh -c 'echo $$ > $0; echo > $1; exec sleep 600' $dir/child $dir/started <&- >&- 2>&- &`},
		{"in a session", `setsid sh -c 'echo $$ > $0; echo > $1; exec sleep 600' $dir/child $dir/started &`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r, started := hangRig(t, "[ $CNI_COMMAND = ADD ] || exit 0\n"+tc.start+"\ncat $dir/go > /dev/null\n"+good("10.1.2.3"))
			require.NoError(t, unix.Mkfifo(filepath.Join(r.dir, "go"), 0o600))
			errs := make(chan error)
			go func() { errs <- r.add(t.Context()) }()
			started()
			require.NoError(t, os.WriteFile(filepath.Join(r.dir, "go"), nil, 0)) // the plugin ends only now
			require.NoError(t, <-errs)
			child := r.pid("child")
			requireAlive(t, child)
			require.Equal(t, []string{"0.0 adding", "0.0 added"}, r.phases())

			// The daemon outlives its pod, also after a restart. Its group is removed when the
			// daemon has ended.
			group := sandboxID + ".0.0.ADD.1"
			require.Equal(t, []string{group}, groupNames(t))
			left, err := Leftovers(r.driver.groups)
			require.NoError(t, err)
			require.Empty(t, left)
			require.NoError(t, End(t.Context(), r.driver.groups, sandboxID, 0))
			require.NoError(t, newDriver(t, Options{}).Del(t.Context(), r.attachment, r.record))
			requireAlive(t, child)
			require.Equal(t, []string{group}, groupNames(t))
			require.NoError(t, unix.Kill(child, unix.SIGKILL))
			require.Eventually(t, func() bool {
				return End(t.Context(), r.driver.groups, "another", 0) == nil && len(groupNames(t)) == 0
			}, 5*time.Second, time.Millisecond)
		})
	}
}

// podfsm was killed after the record of an ADD's success, and before the mark of its group.
func TestLeftBehindUnnoted(t *testing.T) {
	for _, tc := range []struct {
		phase Phase
		lives bool
	}{{Added, true}, {Adding, false}} {
		r, _ := hangRig(t, good("10.1.2.3"))
		require.NoError(t, r.add(t.Context()))
		r.attachment.Plugins[0].Phase = tc.phase
		group, err := makeGroup(r.driver.groups, run{sandboxID, 0, 0, "ADD"})
		require.NoError(t, err)
		cmd := exec.Command("sleep", "600")
		startIn(t, group, cmd)
		left, err := Leftovers(r.driver.groups)
		require.NoError(t, err)
		require.Equal(t, []Left{{sandboxID, group.Dir()}}, left)
		require.NoError(t, newDriver(t, Options{}).Del(t.Context(), r.attachment, r.record))
		if tc.lives {
			requireAlive(t, cmd.Process.Pid)
			require.NoError(t, cmd.Process.Kill())
			require.NoError(t, group.Wait(t.Context()))
			require.NoError(t, End(t.Context(), r.driver.groups, sandboxID, 0))
		}
		requireDead(t, cmd.Process.Pid)
		require.Empty(t, groupNames(t))
	}
}

// A process of a failed plugin is killed, even if it has left the session and closed the pipes.
func TestFailureLeavesNothing(t *testing.T) {
	r, _ := hangRig(t, `[ $CNI_COMMAND = ADD ] || exit 0
mkfifo $dir/ready
setsid sh -c 'setsid sh -c "echo \$\$ > $0; echo > $1; exec sleep 600" $0 $1 & exit' $dir/child $dir/ready <&- >&- 2>&- &
cat $dir/ready > /dev/null; exit 1`)
	require.Error(t, r.add(t.Context()))
	requireDead(t, r.pid("child"))
	require.Empty(t, groupNames(t))
}

// A plugin that can't be killed delays ADD and DEL no longer than the deadline, and no DEL is
// started beside it. A frozen cgroup stands for a process that hangs in the kernel.
func TestPluginThatCannotBeKilled(t *testing.T) {
	const freezer = "/sys/fs/cgroup/freezer"
	if _, err := os.Stat(freezer + "/tasks"); err != nil {
		t.Skip("needs the freezer of cgroup v1")
	}
	usual := killTimeout
	killTimeout = 2 * time.Second
	t.Cleanup(func() { killTimeout = usual })
	r, _ := hangRig(t, "")
	dir := filepath.Join(freezer, fmt.Sprintf("podfsm-cni-test-%d", os.Getpid()))
	require.NoError(t, os.Mkdir(dir, 0o755))
	thaw := func() error { return os.WriteFile(filepath.Join(dir, "freezer.state"), []byte("THAWED"), 0) }
	t.Cleanup(func() {
		require.NoError(t, thaw())
		require.Eventually(t, func() bool { return os.Remove(dir) == nil }, 5*time.Second, time.Millisecond)
	})
	r.script("hang", "[ $CNI_COMMAND = ADD ] || exit 0\necho $$ > $dir/child\necho $$ > "+dir+"/cgroup.procs\necho FROZEN > "+dir+"/freezer.state")
	r.driver = newDriver(t, Options{AddTimeout: 2 * time.Second, PipeTimeout: 100 * time.Millisecond})
	began := time.Now()
	err := r.add(t.Context())
	require.ErrorContains(t, err, "no answer within 2s")
	require.ErrorContains(t, err, fmt.Sprintf("processes [%d] of cgroup", r.pid("child")))
	r.calls()
	err = r.del(t.Context())
	require.ErrorContains(t, err, "don't end")
	require.ErrorAs(t, err, new(*RunningError))
	_, err = r.attachment.WriteOff(t.Context(), "hang", "gone", r.record)
	require.True(t, errdefs.IsNotFound(err), "its ADD may still run")
	require.Less(t, time.Since(began), 5*killTimeout)
	require.Empty(t, r.calls(), "no DEL was started")
	left, err := Leftovers(r.driver.groups)
	require.NoError(t, err)
	require.Len(t, left, 1)
	require.NoError(t, thaw())
	require.NoError(t, r.del(t.Context()))
	require.True(t, r.attachment.Settled())
	requireDead(t, r.pid("child"))
	require.Empty(t, groupNames(t))
}

// What an earlier process has left of a sandbox's plugins is killed; what belongs to other
// sandboxes is not.
func TestEnd(t *testing.T) {
	groups := testGroups(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	start := func(r run, script string) (pid int) {
		group, err := makeGroup(groups, r)
		require.NoError(t, err)
		cmd := exec.Command("sh", "-c", script)
		startIn(t, group, cmd)
		return cmd.Process.Pid
	}
	const forever = "sleep 600"
	check, again := start(run{sandboxID, 0, 0, "CHECK"}, forever), start(run{sandboxID, 0, 0, "CHECK"}, forever)
	hanging := start(run{sandboxID, 0, 0, "ADD"}, forever)
	other := start(run{sandboxID + ".1", 0, 0, "ADD"}, forever)
	added, deleted := filepath.Join(t.TempDir(), "added"), filepath.Join(t.TempDir(), "deleted")
	adding := start(run{sandboxID, 0, 1, "ADD"}, "sleep 0.3; : > "+added)
	deleting := start(run{sandboxID, 0, 1, "DEL"}, "sleep 0.3; : > "+deleted)
	require.NoError(t, End(ctx, groups, sandboxID, time.Minute))
	for _, pid := range []int{check, again, hanging, adding, deleting} {
		requireDead(t, pid)
	}
	require.FileExists(t, added, "the ADD ended by itself")
	require.FileExists(t, deleted, "the DEL ended by itself")
	requireAlive(t, other)

	hanging = start(run{sandboxID, 0, 1, "DEL"}, forever)
	require.NoError(t, End(ctx, groups, sandboxID, time.Millisecond))
	requireDead(t, hanging)
	require.Equal(t, []string{sandboxID + ".1.0.0.ADD.1"}, groupNames(t))
	require.NoError(t, End(ctx, groups, "nobody", time.Minute))
	requireAlive(t, other)
	require.NoError(t, End(ctx, groups, sandboxID+".1", time.Minute))
	require.Empty(t, groupNames(t))
}

func TestParseRun(t *testing.T) {
	t.Parallel()
	for _, r := range []run{{"s", 0, 1, "ADD"}, {"s.0.0.ADD.1", 2, 3, "DEL"}, {noSandbox, 0, 0, "GC"}} {
		parsed, ok := parseRun(r.name(7))
		require.True(t, ok)
		require.Equal(t, r, parsed)
	}
	for _, name := range []string{"", "s", "s.0.0.ADD", ".0.0.ADD.1", "s.x.0.ADD.1", "s.0.x.ADD.1", "s.0.0..1", "s.0.0.ADD.x"} {
		_, ok := parseRun(name)
		require.False(t, ok, name)
	}
}

// A process that holds the configuration doesn't delay the driver either. The plugin has not read
// the configuration, which is larger than a pipe's buffer.
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

// Where nothing reaps orphans, as below a containerd that is pid 1, killed members of a group stay
// zombies.
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

	// This process has to reap the plugin's child.
	for {
		var status unix.WaitStatus
		if _, err := unix.Wait4(-1, &status, 0, nil); err == unix.ECHILD {
			return
		}
	}
}
