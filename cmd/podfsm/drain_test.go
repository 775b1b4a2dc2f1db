package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

// drained is a daemon with sandboxes. They end by the CRI, unless the test says otherwise.
type drained struct {
	podfsmv1.UnimplementedSandboxesServer

	mu        sync.Mutex
	since     *timestamppb.Timestamp
	sandboxes []*podfsmv1.Sandbox
	stopped   []string
	refuses   string // the id of the one that doesn't end
	looked    func(d *drained)
	looks     int // for looked
}

func (d *drained) List(context.Context, *podfsmv1.ListRequest) (*podfsmv1.ListResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	response := &podfsmv1.ListResponse{Sandboxes: slices.Clone(d.sandboxes), DrainingSince: d.since}
	if d.looked != nil {
		d.looked(d)
	}
	return response, nil
}

func (d *drained) Drain(_ context.Context, r *podfsmv1.DrainRequest) (*podfsmv1.DrainResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.since = timestamppb.Now()
	if r.GetCancel() {
		d.since = nil
	}
	return &podfsmv1.DrainResponse{}, nil
}

// kubeletsEnd is the part of the CRI by which a drain ends sandboxes.
type kubeletsEnd struct {
	runtime.UnimplementedRuntimeServiceServer
	*drained
}

func (d *drained) cri() runtime.RuntimeServiceServer { return kubeletsEnd{drained: d} }

func (d kubeletsEnd) StopPodSandbox(_ context.Context, r *runtime.StopPodSandboxRequest) (*runtime.StopPodSandboxResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stopped = append(d.stopped, r.GetPodSandboxId())
	if r.GetPodSandboxId() == d.refuses {
		return nil, status.Error(codes.FailedPrecondition, "no\nluck")
	}
	return &runtime.StopPodSandboxResponse{}, nil
}

func (d kubeletsEnd) RemovePodSandbox(_ context.Context, r *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sandboxes = slices.DeleteFunc(d.sandboxes, func(s *podfsmv1.Sandbox) bool { return s.GetId() == r.GetPodSandboxId() })
	return &runtime.RemovePodSandboxResponse{}, nil
}

// drain runs the command with a containerd configuration that names the daemon's socket.
func drain(t *testing.T, address string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	return drainWith(t, "", address, args...)
}

// drainWith is drain with more configuration.
func drainWith(t *testing.T, more, address string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	dir := t.TempDir()
	config := filepath.Join(dir, "config.toml")
	text := fmt.Sprintf("version = 4\nroot = '%s/root'\nstate = '%[1]s/state'\n[plugins.'io.containerd.server.v1.grpc']\naddress = '%[2]s'\n%[3]s", dir, address, more)
	require.NoError(t, os.WriteFile(config, []byte(text), 0o600))
	return daemonDirs{}.run(t, append([]string{"podfsm", "drain", "--config", config}, args...)...)
}

func TestDrain(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name           string
		daemon         *drained
		args           []string
		status         int // that the command ends with
		stdout, stderr string
		stopped        []string
	}{
		{
			name:   "the kubelet ends them",
			daemon: &drained{sandboxes: []*podfsmv1.Sandbox{ready}, looked: func(d *drained) { d.sandboxes = nil }},
			stdout: `(?s)^podfsm takes no new pods.*waiting for 1 sandbox:\n.*default/web +Ready.*\ngone: 3b1f0c9a7e5d4 default/web\ndrained: podfsm has no sandboxes\n$`,
		},
		{
			name:   "there are none",
			daemon: &drained{looked: func(d *drained) { d.sandboxes = []*podfsmv1.Sandbox{ready} }}, // who looks twice finds one
			stdout: `ends that\)\ndrained: podfsm has no sandboxes\n$`,
		},
		{
			name:    "they are ended",
			daemon:  &drained{sandboxes: []*podfsmv1.Sandbox{ready}},
			args:    []string{"--force"},
			stdout:  `gone: 3b1f0c9a7e5d4 default/web\ndrained: `,
			stopped: []string{ready.GetId()},
		},
		{
			name:    "one can't be ended",
			daemon:  &drained{sandboxes: []*podfsmv1.Sandbox{ready}, refuses: ready.GetId()},
			args:    []string{"--force", "--wait=2s"},
			status:  2,
			stdout:  `left:\n.*\n.*default/web`,
			stderr:  `^podfsm: failed to end 3b1f0c9a7e5d4 default/web: no\\nluck\n$`,
			stopped: []string{ready.GetId()},
		},
		{
			name: "one that could not be ended is written off",
			daemon: &drained{sandboxes: []*podfsmv1.Sandbox{ready}, refuses: ready.GetId(), looked: func(d *drained) {
				if d.looks++; d.looks == 2 {
					d.refuses, d.sandboxes = "", []*podfsmv1.Sandbox{{Id: ready.GetId(), ContainerdNamespace: ready.GetContainerdNamespace(), State: "Stopped"}}
				}
			}},
			args:    []string{"--force", "--wait=10s"},
			stdout:  `\ndrained: `,
			stderr:  `^podfsm: failed to end 3b1f0c9a7e5d4 default/web: no\\nluck\n$`,
			stopped: []string{ready.GetId(), ready.GetId()},
		},
		{
			name:   "the drain was canceled",
			daemon: &drained{sandboxes: []*podfsmv1.Sandbox{ready}, looked: func(d *drained) { d.since = nil }},
			status: 2,
			stdout: `^podfsm takes no new pods`,
		},
		{name: "cancel", daemon: &drained{since: timestamppb.Now()}, args: []string{"--cancel"}, stdout: `^podfsm takes new pods again\n$`},
		{name: "check while pods are taken", daemon: &drained{}, args: []string{"--check"}, status: 2},
		{name: "check", daemon: &drained{since: timestamppb.Now()}, args: []string{"--check"}, stdout: `^drained: podfsm has no sandboxes\n$`},
		{
			name: "check while pods live", args: []string{"--check"}, status: 2, stdout: `default/web +Ready`,
			daemon: &drained{since: timestamppb.Now(), sandboxes: []*podfsmv1.Sandbox{ready}},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			out, errOut, err := drain(t, serve(t, tc.daemon), tc.args...)
			if tc.status == 0 {
				require.NoError(t, err)
			} else {
				require.Equal(t, tc.status, exitStatus(err), "%v", err)
			}
			require.Regexp(t, tc.stdout, out)
			require.Regexp(t, tc.stderr, errOut)
			require.Equal(t, tc.stopped, tc.daemon.stopped)
		})
	}
}

// ps and status report a drain.
func TestPsWhileDraining(t *testing.T) {
	address := serve(t, &drained{sandboxes: []*podfsmv1.Sandbox{ready}, since: timestamppb.New(time.Now().Add(-time.Hour))})
	out, errOut, err := daemonDirs{}.run(t, "podfsm", "--address", address, "ps")
	require.NoError(t, err)
	require.Contains(t, out, "default/web")
	require.Equal(t, "podfsm: no new pods are taken since 60m ago (podfsm drain --cancel ends that)\n", errOut)

	out, errOut, err = daemonDirs{}.run(t, "podfsm", "--address", address, "ps", "-o", "json")
	require.NoError(t, err)
	require.Contains(t, out, `"drainingSince"`)
	require.Empty(t, errOut)
}

func TestDrainWithoutTheDaemon(t *testing.T) {
	for name, address := range map[string]string{"stock": serve(t, nil), "down": filepath.Join(t.TempDir(), "c.sock")} {
		t.Run(name, func(t *testing.T) {
			_, _, err := drain(t, address, "--force")
			require.ErrorContains(t, err, "containerd-podfsm and try again")
			require.Equal(t, exitNoDaemon, exitStatus(err))

			out, _, err := drain(t, address, "--check")
			require.NoError(t, err, "podfsm has never run")
			require.Equal(t, "drained: podfsm has no sandboxes\n", out)

			d := newDaemonDirs(t)
			l := d.openLedger(t)
			_, _, err = d.run(t, "podfsm", "--address", address, "--root-dir", d.root, "--state-dir", d.state, "drain", "--check")
			require.ErrorContains(t, err, "a daemon has the ledger")
			fill(t, l)
			require.NoError(t, l.Close())
			out, _, err = d.run(t, "podfsm", "--address", address, "--root-dir", d.root, "--state-dir", d.state, "drain", "--check")
			require.ErrorContains(t, err, "podfsm has 2 sandboxes, which a containerd without podfsm can't stop")
			require.Equal(t, 2, exitStatus(err))
			require.Regexp(t, `default/pending +CleanupOwed`, out)

			require.NoError(t, os.Truncate(filepath.Join(d.state, ledgerDir, "ledger.log"), 100))
			_, _, err = d.run(t, "podfsm", "--address", address, "--root-dir", d.root, "--state-dir", d.state, "drain", "--check")
			require.ErrorContains(t, err, "damaged")
			require.Equal(t, exitNoDaemon, exitStatus(err))
		})
	}
}

// degraded is a daemon whose podfsm can't serve running pods.
type degraded struct{ *drained }

func (degraded) List(context.Context, *podfsmv1.ListRequest) (*podfsmv1.ListResponse, error) {
	return nil, status.Error(codes.Unavailable, "podfsm is degraded: failed to open the ledger")
}

// For such a daemon, drain --check reads the ledger.
func TestDrainOfADegradedDaemon(t *testing.T) {
	d := newDaemonDirs(t)
	d.socket = serve(t, degraded{&drained{}})
	_, _, err := d.podfsm(t, "drain")
	require.ErrorContains(t, err, "failed to open the ledger")
	require.ErrorContains(t, err, "podfsm drain --check")
	_, _, err = d.podfsm(t, "drain", "--check")
	require.NoError(t, err)
	l := d.openLedger(t)
	_, _, err = d.podfsm(t, "drain", "--check")
	require.ErrorContains(t, err, "failed to open the ledger")
	require.ErrorContains(t, err, "a daemon has the ledger")
	fill(t, l)
	require.NoError(t, l.Close())
	_, _, err = d.podfsm(t, "drain", "--check")
	require.ErrorContains(t, err, "podfsm has 2 sandboxes")
}

// startBeside starts a program with the daemon's path, beside this one, in new namespaces.
func startBeside(t *testing.T, namespaces uintptr) (daemon string, pid int) {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	daemon = filepath.Join(filepath.Dir(self), "containerd-podfsm")
	program, err := os.ReadFile("/bin/sleep")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(daemon, program, 0o700))
	running := exec.Command(daemon, "infinity")
	running.SysProcAttr = &syscall.SysProcAttr{Unshareflags: namespaces}
	require.NoError(t, running.Start())
	t.Cleanup(func() {
		require.NoError(t, running.Process.Kill())
		_ = running.Wait() // it was killed
		require.NoError(t, os.RemoveAll(daemon))
	})
	return daemon, running.Process.Pid
}

// Without a ledger, drain --check still finds a running daemon.
func TestDrainOfADaemonElsewhere(t *testing.T) {
	daemon, pid := startBeside(t, 0)
	d := newDaemonDirs(t)
	d.socket = serve(t, degraded{&drained{}})
	_, _, err := d.podfsm(t, "drain", "--check")
	require.NoError(t, err, "the running daemon is the one that answered")
	for range 2 {
		_, _, err = newDaemonDirs(t).podfsm(t, "drain", "--check")
		require.ErrorContains(t, err, fmt.Sprintf("%s runs (process %d)", daemon, pid))
		require.Equal(t, exitNoDaemon, exitStatus(err))
		require.NoError(t, os.RemoveAll(daemon), "an upgrade removes the file of the running daemon")
	}
}

// A container chooses the paths of its programs, also one that is a node itself.
func TestDrainWhileAContainerLooksLikeADaemon(t *testing.T) {
	startBeside(t, syscall.CLONE_NEWNS)
	_, _, err := newDaemonDirs(t).podfsm(t, "drain", "--check")
	require.NoError(t, err)
}

// drain --check refuses while containerd needs podfsm to serve other pods.
func TestDrainChecksTheConfiguration(t *testing.T) {
	t.Parallel()
	const cri, runtimes = "[plugins.'io.containerd.cri.v1.runtime'.containerd", "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes"
	ours := runtimes + ".ours]\nsandboxer = 'podfsm'\nsnapshotter = 'podfsm'\n"
	for name, tc := range map[string]struct{ config, said string }{
		"a handler of podfsm's":                 {ours, ""},
		"another default handler":               {ours + cri + "]\ndefault_runtime_name = 'runc'", ""},
		"another snapshotter":                   {"[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'overlayfs'", ""},
		"the default snapshotter":               {"[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'podfsm'", "change snapshotter in [plugins.'io.containerd.cri.v1.images']"},
		"the snapshotter of another handler":    {ours + runtimes + ".runc]\nsnapshotter = 'podfsm'", "change snapshotter in " + runtimes + ".runc]"},
		"the default handler":                   {ours + cri + "]\ndefault_runtime_name = 'ours'", "change default_runtime_name in " + cri + "]"},
		"the snapshotter of version 2":          {"[plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = 'podfsm'", "change snapshotter in [plugins.'io.containerd.grpc.v1.cri'.containerd]"},
		"a configuration that can't be decoded": {"[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 7", "failed to read the section io.containerd.cri.v1.images"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, _, err := drainWith(t, tc.config, filepath.Join(t.TempDir(), "c.sock"), "--check")
			if tc.said == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, tc.said)
		})
	}
}

func TestDrainRefuses(t *testing.T) {
	for want, args := range map[string][]string{
		"takes no arguments":                              {"all"},
		"takes one of --force":                            {"--force", "--check"},
		`failed to read containerd's configuration "/no"`: {"--config=/no"},
	} {
		_, _, err := daemonDirs{}.run(t, append([]string{"podfsm", "drain"}, args...)...)
		require.ErrorContains(t, err, want)
	}
	start := time.Now()
	_, _, err := drain(t, serve(t, &drained{sandboxes: []*podfsmv1.Sandbox{ready}}), "--wait=0s")
	require.ErrorContains(t, err, "1 sandbox left")
	require.Less(t, time.Since(start), 20*time.Second)
}
