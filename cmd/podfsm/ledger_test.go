package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/history"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/netns"
)

// daemonDirs has the directories and the ledger of a daemon that is down.
type daemonDirs struct{ root, state, socket string }

func newDaemonDirs(t *testing.T) daemonDirs {
	dir := t.TempDir()
	return daemonDirs{filepath.Join(dir, "root"), filepath.Join(dir, "state"), filepath.Join(dir, "c.sock")}
}

// podfsm runs the command line tool against the daemon.
func (d daemonDirs) podfsm(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	return d.run(t, append([]string{"podfsm", "--address", d.socket, "--root-dir", d.root, "--state-dir", d.state}, args...)...)
}

func (daemonDirs) run(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, errOut bytes.Buffer
	err = run(t.Context(), args, &out, &errOut)
	return out.String(), errOut.String(), err
}

func (d daemonDirs) openLedger(t *testing.T) *ledger.Ledger {
	t.Helper()
	l, err := ledger.Open(filepath.Join(d.root, ledgerDir), filepath.Join(d.state, ledgerDir))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, l.Close()) })
	return l
}

// fill records a pod with a pending DEL, and a pod that is being made.
func fill(t *testing.T, l *ledger.Ledger) {
	t.Helper()
	for id, name := range map[string]string{lostID: "pending", ready.GetId(): "half"} {
		spec, err := ledger.Marshal(&records.Spec{
			Config:  &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: name, Namespace: "default", Uid: "u"}},
			Handler: "podfsm",
		})
		require.NoError(t, err)
		all := []*ledger.Record{
			{Kind: ledger.Begun, Data: spec},
			{Kind: ledger.Intent, Step: "allocate_ids"},
			{Kind: ledger.Done, Step: "allocate_ids", From: "New", Event: "allocate_ids", State: "IDsAllocated"},
			{Kind: ledger.Intent, Step: "remap_snapshot"},
		}
		if name == "pending" {
			all = append(all,
				&ledger.Record{Kind: ledger.Moved, From: "IDsAllocated", Event: "roll_back", State: "RollingBack"},
				&ledger.Record{Kind: ledger.UndoIntent, Step: "remap_snapshot"},
				&ledger.Record{Kind: ledger.CleanupPending, From: "RollingBack", Event: "leave_cleanup_pending", State: "CleanupOwed", Goal: "RolledBack", Error: "no\nluck"})
		}
		for _, r := range all {
			r.Key = ledger.Key{Namespace: "k8s.io", ID: id}
			require.NoError(t, l.Append(t.Context(), r))
		}
	}
}

func TestCommandsWithoutDaemon(t *testing.T) {
	d := newDaemonDirs(t)
	l := d.openLedger(t)
	fill(t, l)

	out, errOut, err := d.podfsm(t, "cleanups")
	require.Equal(t, exitLeft, exitStatus(err))
	require.Contains(t, errOut, "no socket at "+d.socket)
	require.Contains(t, errOut, "a daemon has the ledger in "+d.root+" open: it starts, hangs, or listens elsewhere; this is its ledger")
	require.Contains(t, out, "default/pending")
	_, _, err = d.podfsm(t, "leaks")
	require.ErrorContains(t, err, "but a daemon has the ledger in "+d.root+" open")
	require.NoError(t, l.Close())

	out, errOut, err = d.podfsm(t, "cleanups")
	require.Equal(t, exitLeft, exitStatus(err))
	require.Regexp(t, `^podfsm: no socket at .*\npodfsm: the daemon is down; this is its ledger, last written \S+ ago\n$`, errOut)
	require.Regexp(t, `(?m)^0011223344556 +default/pending +CleanupOwed->RolledBack +remap_snapshot +\S+ +- +- +no\\nluck$`, out)
	require.Regexp(t, `(?m)^0011223344556 +default/pending +CleanupOwed->RolledBack +allocate_ids +\S+ +- +- +waits for the others$`, out)
	require.NotContains(t, out, "default/half")

	out, _, err = d.podfsm(t, "ps", "-o", "json")
	require.NoError(t, err)
	require.Contains(t, out, `"state": "IDsAllocated"`)
	require.NotContains(t, out, "draining")

	require.NoError(t, os.WriteFile(filepath.Join(d.root, ledgerDir, records.DrainFile), nil, 0o600))
	_, errOut, err = d.podfsm(t, "ps")
	require.NoError(t, err)
	require.Regexp(t, `(?m)^podfsm: no new pods are taken since \d+s ago`, errOut)
	out, _, err = d.podfsm(t, "describe", "half")
	require.NoError(t, err)
	require.Regexp(t, `remap_snapshot +running`, out)
	_, _, err = d.podfsm(t, "inspect", "nobody")
	require.ErrorContains(t, err, `no sandbox of podfsm matches "nobody"`)
	require.Equal(t, exitNotFound, exitStatus(err))
	out, errOut, err = d.podfsm(t, "status")
	require.Equal(t, exitNoDaemon, exitStatus(err))
	require.Contains(t, errOut, "the daemon is down; this is its ledger")
	require.Regexp(t, `(?m)^Sandboxes: +2: 1 IDsAllocated, 1 CleanupOwed$`, out)
}

// What podfsm says of texts of others on stderr controls no terminal.
func TestComplaintsAreSafeForATerminal(t *testing.T) {
	d := newDaemonDirs(t)
	l := d.openLedger(t)
	for id, namespace := range map[string]string{lostID: "\x1b[2J", ready.GetId(): "\u009b2J"} {
		spec, err := ledger.Marshal(&records.Spec{Config: &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: "web", Namespace: namespace, Uid: "u"}}})
		require.NoError(t, err)
		require.NoError(t, l.Append(t.Context(), &ledger.Record{Kind: ledger.Begun, Data: spec, Key: ledger.Key{Namespace: "k8s.io", ID: id}}))
	}
	require.NoError(t, l.Close())
	_, errOut, code := runProgram(t, "--address", d.socket, "--root-dir", d.root, "--state-dir", d.state, "inspect", "web")
	require.Equal(t, exitFailed, code)
	require.Contains(t, errOut, `"web" matches 2 sandboxes`)
	require.Contains(t, errOut, `\x1b[2J/web`)
	require.Contains(t, errOut, `\u009b2J/web`)
	require.NotRegexp(t, `[\x1b\x{9b}]`, errOut)
	require.Regexp(t, `\npodfsm: the daemon is down; .*\npodfsm: "web"`, errOut, "line breaks stay")

	// The path of a socket comes from a configuration.
	_, errOut, _ = runProgram(t, "--address", "/no\x1b[2J", "--root-dir", d.root, "--state-dir", d.state, "ps")
	require.Contains(t, errOut, `no socket at /no\x1b[2J`)

	var b bytes.Buffer
	require.NoError(t, writeJSON(&b, &podfsmv1.Sandbox{PodName: "\u009b2J\U000e0041"}))
	require.NoError(t, writeJSONLine(&b, &podfsmv1.Sandbox{PodName: "\u202e"}))
	require.NotRegexp(t, `[\x{9b}\x{202e}\x{e0041}]`, b.String())
}

// Ended sandboxes are found while the daemon is down, too. An unreadable history is reported, and
// stops nothing else.
func TestHistoryWhileTheDaemonIsDown(t *testing.T) {
	d := newDaemonDirs(t)
	l := d.openLedger(t)
	fill(t, l)
	require.NoError(t, l.Close())
	path := filepath.Join(d.root, ledgerDir, history.FileName)
	past, err := history.Open(path)
	require.NoError(t, err)
	require.NoError(t, past.Add(crashed))

	out, _, err := d.podfsm(t, "ps", "--all")
	require.NoError(t, err)
	require.Regexp(t, `(?m)^7c41d09e55aa0 +default/web +RolledBack .* attach_network$`, out)
	out, _, err = d.podfsm(t, "ps")
	require.NoError(t, err)
	require.NotContains(t, out, "default/web")
	for _, command := range []string{"inspect", "timeline", "graph"} {
		out, errOut, err := d.podfsm(t, command, "web")
		require.NoError(t, err)
		require.Contains(t, out, crashed.GetSandbox().GetId())
		require.Contains(t, errOut, "the daemon is down")
	}
	out, _, err = d.podfsm(t, "timeline", "pending")
	require.NoError(t, err)
	require.Regexp(t, `(?m)^undo remap_snapshot +\S+ +\S+ \[ *!+ *\]$`, out)
	require.Contains(t, out, `no\nluck`)

	require.NoError(t, os.Remove(path))
	require.NoError(t, os.Mkdir(path, 0o700))
	_, errOut, err := d.podfsm(t, "ps", "--all")
	require.NoError(t, err)
	require.Contains(t, errOut, "failed to read the history of sandboxes that have ended")
}

func TestLeaksWhileTheDaemonIsDown(t *testing.T) {
	d := newDaemonDirs(t)
	l := d.openLedger(t)
	fill(t, l)
	require.NoError(t, l.Close())
	unknown := strings.Repeat("ab", 32)
	below := func(parts ...string) string { return filepath.Join(append([]string{d.state, criDir}, parts...)...) }
	for _, dir := range []string{below("netns"), below("sandboxes", unknown), below("sandboxes", strings.Repeat("cd", 32))} {
		require.NoError(t, os.MkdirAll(dir, 0o755))
	}
	for _, name := range []string{"podfsm-" + unknown, "podfsm-" + lostID, "podfsm-foreign", "cni-1"} {
		require.NoError(t, os.WriteFile(below("netns", name), nil, 0o444))
	}
	pins, err := netns.Pins(below("netns"))
	require.NoError(t, err)
	require.Len(t, pins, 4)

	out, errOut, err := d.podfsm(t, "leaks")
	require.Contains(t, errOut, "podfsm: only network namespaces, CNI plugins and what belongs to their sandboxes were examined; start the daemon and run podfsm leaks again for the rest\n")
	require.EqualError(t, err, "2 things have leaked")
	require.Regexp(t, `^SANDBOX +KIND +NAME\nababababababa +files +(ab){32}\nababababababa +netns +\S+/podfsm-(ab){32}\n$`, out)

	_, _, err = d.podfsm(t, "leaks", "--fix")
	require.ErrorContains(t, err, "only the daemon knows all owners")
	require.False(t, exitStatus(err) == 2)
	require.FileExists(t, below("netns", "podfsm-"+unknown))
}

func TestNoLedger(t *testing.T) {
	d := newDaemonDirs(t)
	for _, command := range []string{"ps", "cleanups", "leaks"} {
		_, errOut, err := d.podfsm(t, command)
		require.ErrorContains(t, err, "there is no ledger in "+d.root+" and "+d.state+" either")
		require.Empty(t, errOut)
	}
}

func TestDamagedLedger(t *testing.T) {
	d := newDaemonDirs(t)
	l := d.openLedger(t)
	fill(t, l)
	require.NoError(t, l.Close())
	require.NoError(t, os.Truncate(filepath.Join(d.state, ledgerDir, "ledger.log"), 100))
	_, errOut, err := d.podfsm(t, "ps")
	require.NoError(t, err)
	require.Contains(t, errOut, "the ledger is damaged, sandboxes may be missing: "+d.state)
}
