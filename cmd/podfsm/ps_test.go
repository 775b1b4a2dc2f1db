package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

func TestPsSelectsAndSorts(t *testing.T) {
	other := proto.CloneOf(ready)
	other.Id, other.PodNamespace, other.PodName, other.CreatedAt = "0a", "kube-system", "dns", at(-1)
	stopped := proto.CloneOf(ready)
	stopped.Id, stopped.PodName, stopped.State, stopped.CreatedAt = "0b", "old", "NotReady", at(-2)
	address := serve(t, fakeSandboxes{list: func() []*podfsmv1.Sandbox { return []*podfsmv1.Sandbox{ready, pending, starting, other, stopped} }})
	for want, args := range map[string][]string{
		"ff00ff00ff00ff00 0b 9d 0a READY": {},
		"0b 0a READY ff00ff00ff00ff00 9d": {"--sort-by", "age"},
		"ff00ff00ff00ff00 0a 0b 9d READY": {"--sort-by", "name"},
		"ff00ff00ff00ff00 0b 9d READY 0a": {"--sort-by=namespace"},
		"ff00ff00ff00ff00 9d 0b 0a READY": {"--sort-by=state"},
		"0a":                              {"-n", "kube-system"},
		"0b READY":                        {"-n", "default", "--state", "ready", "--state", "NotReady"},
		"":                                {"-n", "nowhere"},
	} {
		out, err := podfsm(t, append([]string{"--address", address, "ps", "-q"}, args...)...)
		require.NoError(t, err)
		require.Equal(t, want, strings.Join(strings.Fields(strings.ReplaceAll(out, ready.GetId(), "READY")), " "), "%q", args)
	}
	out, err := podfsm(t, "--address", address, "ps", "--no-headers", "-n", "kube-system")
	require.NoError(t, err)
	require.Regexp(t, `^0a +kube-system/dns +Ready .*\n$`, out)
}

// terminal is a terminal whose output can be read.
func terminal(t *testing.T) (tty *os.File, read func() string) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	require.NoError(t, err)
	t.Cleanup(func() { master.Close() })
	require.NoError(t, unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	require.NoError(t, err)
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	t.Cleanup(func() { tty.Close() })
	return tty, func() string {
		text := make([]byte, 4096)
		n, err := master.Read(text)
		require.NoError(t, err)
		return string(text[:n])
	}
}

func TestColourOnATerminal(t *testing.T) {
	address := serve(t, fakeSandboxes{})
	tty, read := terminal(t)
	t.Setenv("TERM", "xterm")
	t.Setenv("NO_COLOR", "")
	require.NoError(t, run(t.Context(), []string{"podfsm", "--address", address, "ps"}, tty, os.Stderr))
	require.Regexp(t, `\x1b\[31mff00ff00ff00f .*\x1b\[0m`, read())
	t.Setenv("NO_COLOR", "1")
	require.NoError(t, run(t.Context(), []string{"podfsm", "--address", address, "ps"}, tty, os.Stderr))
	require.NotContains(t, read(), "\x1b")
}

// Every command finds the daemon and its directories by containerd's configuration, unless flags
// name them.
func TestDiscovery(t *testing.T) {
	d := newDaemonDirs(t)
	fill(t, d.openLedger(t))
	config := filepath.Join(t.TempDir(), "config.toml")
	write := func(address string) {
		text := fmt.Sprintf("version = 4\nroot = '%s'\nstate = '%s'\n[plugins.'io.containerd.server.v1.grpc']\naddress = '%s'\n", d.root, d.state, address)
		require.NoError(t, os.WriteFile(config, []byte(text), 0o600))
	}
	address := serve(t, fakeSandboxes{status: faring, leaks: func(*podfsmv1.LeaksRequest) *podfsmv1.LeaksResponse { return &podfsmv1.LeaksResponse{} }})
	write(address)
	for _, command := range [][]string{{"ps"}, {"cleanups"}, {"cleanups", "list"}, {"leaks"}, {"status"}, {"version"}, {"drain", "--dry-run"}} {
		for _, args := range [][]string{slices.Concat([]string{"--config", config}, command), slices.Concat(command, []string{"--config", config})} {
			_, errOut, err := d.run(t, append([]string{"podfsm"}, args...)...)
			require.NotEqual(t, exitNoDaemon, exitStatus(err), "%q: %v", args, err)
			require.Empty(t, errOut, "%q", args)
		}
	}
	write(d.socket) // nothing listens there
	out, errOut, err := d.run(t, "podfsm", "--config", config, "ps")
	require.NoError(t, err)
	require.Contains(t, out, "default/pending")
	require.Contains(t, errOut, "no socket at "+d.socket)
	out, _, err = d.run(t, "podfsm", "--config", config, "--address", address, "ps")
	require.NoError(t, err)
	require.Contains(t, out, "default/web")

	require.NoError(t, os.WriteFile(config, []byte("version"), 0o600))
	out, _, err = d.run(t, "podfsm", "--config", config, "--address", address, "ps")
	require.NoError(t, err, "the flags replace the configuration")
	require.Contains(t, out, "default/web")
	_, _, err = d.run(t, "podfsm", "--config", config, "--address", d.socket, "--root-dir", t.TempDir(), "ps")
	require.ErrorContains(t, err, fmt.Sprintf("failed to read containerd's configuration %q", config))
	require.Equal(t, exitNoDaemon, exitStatus(err))
}

func TestLeaksOfSomeSandboxes(t *testing.T) {
	var asked *podfsmv1.LeaksRequest
	address := serve(t, fakeSandboxes{leaks: func(r *podfsmv1.LeaksRequest) *podfsmv1.LeaksResponse {
		asked = r
		return &podfsmv1.LeaksResponse{}
	}})
	out, err := podfsm(t, "--address", address, "leaks", "--fix", lostID, ready.GetId()[:13])
	require.NoError(t, err)
	require.Equal(t, "No leaks found\n", out)
	require.True(t, proto.Equal(&podfsmv1.LeaksRequest{Fix: true, Sandboxes: []string{lostID, ready.GetId()[:13]}}, asked))
}

// A retry leaves CleanupOwed and enters it again. What counts for the operator is the first failure.
func TestSinceOfAPendingCleanup(t *testing.T) {
	retried := proto.CloneOf(pending)
	retried.Since = at(5 * time.Minute)
	retried.PendingCleanups[1].Since = at(2 * time.Second)
	require.Equal(t, at(time.Second).AsTime(), sinceOf(retried).AsTime())
	require.Equal(t, "5m11s", listing{}.cells(retried, now)[3])
	require.Negative(t, orders["since"](retried, starting))
	retried.PendingCleanups = nil
	require.Equal(t, "12s", listing{}.cells(retried, now)[3])
}

func TestTimelineJSON(t *testing.T) {
	var b bytes.Buffer
	require.NoError(t, writeJSON(&b, timelineOutput(&timeline{InspectResponse: crashed}, now)))
	requireGolden(t, "timeline.json", b.Bytes())
	address := serveTimelines(t)
	out, err := podfsm(t, "--address", address, "timeline", "-o", "json", crashed.GetSandbox().GetId())
	require.NoError(t, err)
	require.Contains(t, out, `"title": "Creation and rollback"`)
	require.Contains(t, out, `"outcome": "undo failed"`)
}

func TestDrainPlan(t *testing.T) {
	d := &drained{sandboxes: []*podfsmv1.Sandbox{ready}}
	address := serve(t, d)
	out, _, err := drain(t, address, "--dry-run")
	require.NoError(t, err)
	require.Regexp(t, `^a drain would take no new pods and wait for 1 sandbox:\n.*\n.*default/web +Ready`, out)
	out, _, err = drain(t, address, "--dry-run", "--force")
	require.NoError(t, err)
	require.Contains(t, out, "stop and remove 1 sandbox")
	require.Nil(t, d.since, "a dry run changes nothing")
	require.Empty(t, d.stopped)

	out, _, err = drain(t, address, "--check", "-o", "json")
	require.Equal(t, exitLeft, exitStatus(err))
	requireGolden(t, "drain.json", []byte(out))
	out, _, err = drain(t, address, "--force", "-o", "json")
	require.NoError(t, err)
	require.Regexp(t, `^{\n  "drained": true,\n  "drainingSince": "\S+",\n  "left": \[\]\n}\n$`, out)
}
