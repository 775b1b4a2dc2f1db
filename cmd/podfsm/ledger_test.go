package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/history"
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/netns"
	"github.com/podfsm/podfsm/records"
)

// daemonDirs are the directories of a daemon that is down, and its ledger.
type daemonDirs struct{ root, state, socket string }

func newDaemonDirs(t *testing.T) daemonDirs {
	dir := t.TempDir()
	return daemonDirs{filepath.Join(dir, "root"), filepath.Join(dir, "state"), filepath.Join(dir, "c.sock")}
}

// podfsm runs the command line tool against the daemon.
func (d daemonDirs) podfsm(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	return d.run(t, append([]string{"podfsm", "--address", d.socket, "--root", d.root, "--state", d.state}, args...)...)
}

func (daemonDirs) run(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, errOut bytes.Buffer
	err = run(t.Context(), args, &out, &errOut)
	return out.String(), errOut.String(), err
}

func (d daemonDirs) openLedger(t *testing.T) *journal.Ledger {
	t.Helper()
	l, err := journal.Open(filepath.Join(d.root, ledgerDir), filepath.Join(d.state, ledgerDir))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, l.Close()) })
	return l
}

// fill puts a pod on record whose DEL is owed, and one that is being made.
func fill(t *testing.T, l *journal.Ledger) {
	t.Helper()
	for id, name := range map[string]string{lostID: "owed", ready.GetId(): "half"} {
		spec, err := journal.Marshal(&records.Spec{
			Config:  &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: name, Namespace: "default", Uid: "u"}},
			Handler: "podfsm",
		})
		require.NoError(t, err)
		all := []*journal.Record{
			{Kind: journal.Begun, Data: spec},
			{Kind: journal.Intent, Step: "allocate_ids"},
			{Kind: journal.Done, Step: "allocate_ids", From: "New", Event: "allocate_ids", State: "IDsAllocated"},
			{Kind: journal.Intent, Step: "remap_snapshot"},
		}
		if name == "owed" {
			all = append(all,
				&journal.Record{Kind: journal.Moved, From: "IDsAllocated", Event: "roll_back", State: "RollingBack"},
				&journal.Record{Kind: journal.UndoIntent, Step: "remap_snapshot"},
				&journal.Record{Kind: journal.Owed, From: "RollingBack", Event: "owe_cleanup", State: "CleanupOwed", Goal: "RolledBack", Error: "no\nluck"})
		}
		for _, r := range all {
			r.Key = journal.Key{Namespace: "k8s.io", ID: id}
			require.NoError(t, l.Append(t.Context(), r))
		}
	}
}

func TestDaemonDown(t *testing.T) {
	d := newDaemonDirs(t)
	l := d.openLedger(t)
	fill(t, l)

	out, errOut, err := d.podfsm(t, "cleanups")
	require.NoError(t, err)
	require.Contains(t, errOut, "no socket at "+d.socket)
	require.Contains(t, errOut, "a daemon has the ledger in "+d.root+" open: it starts, hangs, or listens elsewhere; this is its ledger")
	require.Contains(t, out, "default/owed")
	_, _, err = d.podfsm(t, "leaks")
	require.ErrorContains(t, err, "but a daemon has the ledger in "+d.root+" open")
	require.NoError(t, l.Close())

	out, errOut, err = d.podfsm(t, "cleanups")
	require.NoError(t, err)
	require.Regexp(t, `^podfsm: no socket at .*\npodfsm: the daemon is down; this is its ledger, last written \S+ ago\n$`, errOut)
	require.Regexp(t, `(?m)^0011223344556 +default/owed +CleanupOwed->RolledBack +remap_snapshot +\S+ +- +- +no\\nluck$`, out)
	require.Regexp(t, `(?m)^0011223344556 +default/owed +CleanupOwed->RolledBack +allocate_ids +\S+ +- +- +waits for the others$`, out)
	require.NotContains(t, out, "default/half")

	out, _, err = d.podfsm(t, "ps", "-o", "json")
	require.NoError(t, err)
	require.Contains(t, out, `"state": "IDsAllocated"`)
	require.NotContains(t, out, "draining")

	require.NoError(t, os.WriteFile(filepath.Join(d.root, ledgerDir, records.DrainFile), nil, 0o600))
	_, errOut, err = d.podfsm(t, "ps")
	require.NoError(t, err)
	require.Regexp(t, `(?m)^podfsm: no new pods are taken since \d+s ago`, errOut)
	out, _, err = d.podfsm(t, "inspect", "half")
	require.NoError(t, err)
	require.Regexp(t, `remap_snapshot +running`, out)
	_, _, err = d.podfsm(t, "inspect", "nobody")
	require.ErrorContains(t, err, `no sandbox of podfsm matches "nobody"`)
}

// What has ended is found while the daemon is down, too; a history that can't be read is said to be so, and stops nothing else.
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
	out, _, err = d.podfsm(t, "timeline", "owed")
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

	out, _, err := d.podfsm(t, "leaks")
	require.EqualError(t, err, "2 things have leaked")
	require.Regexp(t, `^SANDBOX +KIND +NAME\nababababababa +files +(ab){32}\nababababababa +netns +\S+/podfsm-(ab){32}\n$`, out)

	_, _, err = d.podfsm(t, "leaks", "--fix")
	require.ErrorContains(t, err, "only the daemon knows what belongs to whom")
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
