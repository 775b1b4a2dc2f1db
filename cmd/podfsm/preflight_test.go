package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/services/introspection/v1"
	containerdversion "github.com/containerd/containerd/api/services/version/v1"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/doctor"
)

// installed puts a containerd-podfsm into PATH that dumps a configuration, or fails if there is an
// error.
func installed(t *testing.T, dump, failure string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "dump")
	require.NoError(t, os.WriteFile(file, []byte(dump), 0o644))
	script := "[ \"$1 $3 $4\" = '--config config dump' ] || exit 9\n"
	if failure != "" {
		script += "echo 'level=warning' >&2; echo '" + failure + "' >&2; exit 1\n"
	}
	installedScript(t, script+"exec cat "+file)
}

// installedScript puts a script into PATH as containerd-podfsm.
func installedScript(t *testing.T, script string) {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, daemonName), []byte("#!/bin/sh\n"+script+"\n"), 0o755))
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// dumped is the relevant part of containerd-podfsm config dump.
const dumped = `version = 4
root = '/var/lib/containerd'
state = '/run/containerd'
imports = ['/etc/containerd/conf.d/*.toml']
[plugins]
[plugins.'io.containerd.cri.v1.images']
snapshotter = 'overlayfs'
[plugins.'io.containerd.cri.v1.runtime'.containerd]
default_runtime_name = 'crun'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.crun]
runtime_type = 'io.containerd.runc.v2'
runtime_path = ''
pod_annotations = ['io.example/*']
container_annotations = []
privileged_without_host_devices = false
cgroup_writable = true
cni_max_conf_num = 0
sandboxer = 'podsandbox'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.crun.options]
BinaryName = '/usr/bin/crun'
IoGid = 0
Root = ''
NoNewKeyring = true
SystemdCgroup = false
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'
sandboxer = 'podsandbox'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
SystemdCgroup = true
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.bare]
runtime_type = 'io.containerd.runc.v2'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]
runtime_type = 'io.containerd.kata.v2'
[plugins.'io.containerd.server.v1.grpc']
address = '/no/socket'
`

// The handler copies the settings of the default handler, and omits what that omits.
func TestHandler(t *testing.T) {
	installed(t, dumped, "")
	out, err := podfsm(t, "handler")
	require.NoError(t, err)
	requireGolden(t, "handler.txt", []byte(out))
	out, err = podfsm(t, "handler", "--like", "runc")
	require.NoError(t, err)
	require.Contains(t, out, "SystemdCgroup = true")
	require.NotContains(t, out, "crun")
	_, err = podfsm(t, "handler", "--like", "nobody")
	require.EqualError(t, err, `failed to find runtime handler "nobody" in containerd's configuration; name a handler by --like: bare, crun, kata, runc`)
	_, err = podfsm(t, "handler", "now")
	require.ErrorContains(t, err, "takes no arguments")

	installed(t, "", "containerd: bad line 7")
	_, err = podfsm(t, "handler", "--config", "/x.toml")
	require.EqualError(t, err, `failed to read containerd's configuration "/x.toml": containerd: bad line 7`)
	t.Setenv("PATH", "/nowhere")
	_, err = podfsm(t, "handler")
	require.ErrorContains(t, err, "install podfsm's package")
}

// A hanging containerd-podfsm is killed at the timeout. The error of a silent one has its exit
// status.
func TestDumpThatFails(t *testing.T) {
	installedScript(t, "exec sleep 60")
	_, err := podfsm(t, "--timeout", "50ms", "handler")
	require.ErrorContains(t, err, "containerd-podfsm config dump within 50ms")
	installedScript(t, "exit 3")
	_, err = podfsm(t, "handler")
	require.ErrorContains(t, err, "exit status 3")
	installedScript(t, "kill -SEGV $$")
	_, err = podfsm(t, "handler")
	require.ErrorContains(t, err, "signal: segmentation fault")
}

// The handler is written atomically, and settings of an operator are not lost.
func TestHandlerIsWritten(t *testing.T) {
	installed(t, dumped, "")
	printed, err := podfsm(t, "handler")
	require.NoError(t, err)
	dir := filepath.Join(t.TempDir(), "conf.d") // which isn't there yet
	file := filepath.Join(dir, "podfsm.toml")
	write := func(like string) error {
		out, err := podfsm(t, "handler", "--like", like, "--write", file)
		require.Empty(t, out)
		return err
	}
	has := func(text string) {
		t.Helper()
		found, err := os.ReadFile(file)
		require.NoError(t, err)
		require.Equal(t, text, string(found))
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Len(t, entries, 1, "nothing else is left")
	}
	require.NoError(t, write(""))
	has(printed)
	info, err := os.Stat(file)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o644), info.Mode())

	shipped, err := os.ReadFile("../../deploy/conf.d/podfsm.toml")
	require.NoError(t, err)
	for _, like := range []string{"crun", "bare", "runc"} {
		require.NoError(t, os.WriteFile(file, shipped, 0o644))
		require.NoError(t, write(like), "the package's file is replaced by a handler like %s", like)
	}

	own := string(shipped) + "snapshotter = \"podfsm\"\n[plugins.'io.containerd.podsandbox.controller.v1.podfsm'.userns_pool]\nuser = 'pods'\n"
	own = strings.Replace(own, "sandboxer =", "cni_conf_dir = \"/etc/other\"\n  sandboxer =", 1)
	require.NoError(t, os.WriteFile(file, []byte(own), 0o600))
	require.EqualError(t, write(""), `failed to write "`+file+`": the file has settings that would be lost: `+
		"plugins.io.containerd.cri.v1.runtime.containerd.runtimes.podfsm.cni_conf_dir, "+
		"plugins.io.containerd.cri.v1.runtime.containerd.runtimes.podfsm.options.snapshotter, "+
		"plugins.io.containerd.podsandbox.controller.v1.podfsm.userns_pool.user; "+
		"move them to another file in its directory, or edit the file to have what podfsm handler prints")
	has(own)

	installed(t, "", "containerd: bad line 7")
	require.ErrorContains(t, write(""), "bad line 7")
	has(own)
	installed(t, dumped, "")
	require.NoError(t, os.WriteFile(file, []byte("version = 3 3"), 0o600))
	require.ErrorContains(t, write(""), "correct the file, or move it away")
	has("version = 3 3")
}

// Without a running containerd, preflight reads the files. A missing podfsm handler is assumed to
// be like the default one.
func TestPreflightOfFiles(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "config.toml")
	preflight := func() (string, string, error) {
		var out, errOut bytes.Buffer
		err := run(t.Context(), []string{"podfsm", "--root-dir", dir, "--state-dir", dir, "doctor", "--preflight", "--config", config}, &out, &errOut)
		return strings.Join(strings.Fields(out.String()), " "), errOut.String(), err // as it isn't wrapped
	}
	require.NoError(t, os.WriteFile(config, []byte("version = 2\nimports = [\"/other/*.toml\"]\n"), 0o644))
	installed(t, dumped, "")
	out, errOut, err := preflight()
	require.Equal(t, 2, exitStatus(err))
	require.Contains(t, errOut, "podfsm: no socket at /no/socket", "the socket is that of the files")
	require.Contains(t, errOut, "containerd is down; what only it knows is unknown")
	for _, row := range []string{
		"unknown containerd containerd is down, so its version isn't known",
		"fail configuration " + config + " (version 2) imports /other/*.toml, and no runtime handler there has sandboxer",
		`imports = ["/other/*.toml", "` + dir + `/conf.d/*.toml"]`,
		`ok cgroup driver podfsm: SystemdCgroup = false and runtime io.containerd.runc.v2 /usr/bin/crun, as for the node's handler "crun"`,
		"ok handlers podfsm (not configured yet, users by kubelet)",
		"fail directories ",
		"pods that podfsm would refuse: with a user namespace",
		"ok tmpfs ",
		"ok ledger no ledger yet",
		"After the switch, podfsm's pods would: on the node's users and network: not run until this is fixed: configuration",
	} {
		require.Contains(t, out, row)
	}
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, left, 1, "the doctor removes what it made")

	installed(t, "", "containerd: bad line 7")
	out, _, err = preflight()
	require.Equal(t, 2, exitStatus(err))
	require.Regexp(t, `fail configuration \S+ can't read `+config+`: containerd: bad line 7`, out)
	require.Contains(t, out, "unknown runtime containerd's configuration isn't known -> see the check configuration")
}

// A kind of pods names exactly the findings that refuse it.
func TestKindsOfPods(t *testing.T) {
	finding := func(check string, status doctor.Status, stops doctor.Pods) *podfsmv1.Finding {
		return &podfsmv1.Finding{Check: check, Subject: "podfsm", Status: string(status), RefusedPods: string(stops)}
	}
	const run = "run"
	put := func(checks string) string { return "not run until this is fixed: " + checks }
	for _, test := range []struct {
		findings []*podfsmv1.Finding
		want     []string // by kind
	}{
		{nil, []string{run, run, run, run}},
		{[]*podfsmv1.Finding{finding("kernel", doctor.Warn, doctor.NoPods), finding("runtime", doctor.Unknown, doctor.NoPods)}, []string{run, run, run, run}},
		{[]*podfsmv1.Finding{finding("networks", doctor.Fail, doctor.NoPods)}, slices.Repeat([]string{put("networks podfsm")}, 4)},
		{[]*podfsmv1.Finding{finding("runtime", doctor.Fail, doctor.AllPods)}, slices.Repeat([]string{put("runtime podfsm")}, 4)},
		{[]*podfsmv1.Finding{finding("pidfd", doctor.Fail, doctor.NetworkPods)}, []string{run, put("pidfd podfsm"), put("pidfd podfsm"), put("pidfd podfsm")}},
		{[]*podfsmv1.Finding{finding("overlay", doctor.Fail, doctor.UserNSPods), finding("tmpfs", doctor.Warn, doctor.TmpfsPods)},
			[]string{run, run, put("overlay podfsm"), put("overlay podfsm, tmpfs podfsm")}},
	} {
		var out bytes.Buffer
		require.NoError(t, writeKinds(&out, test.findings))
		want := "\nAfter the switch, podfsm's pods would:\n"
		for i, kind := range podKinds {
			want += "  " + kind.name + ": " + test.want[i] + "\n"
		}
		require.Equal(t, want, out.String())
	}
}

func TestFlagValue(t *testing.T) {
	for _, args := range [][]string{
		{"--config", "/x"}, {"-c", "/x"}, {"--config=/x"}, {"-config", "/x"}, {"--log-level", "debug", "-c=/x", "--config", "/y"},
	} {
		require.Equal(t, "/x", flagValue(args, "config", "c"), "%q", args)
	}
	for _, args := range [][]string{nil, {"--config"}, {"config", "/x"}, {"--configs", "/x"}} {
		require.Empty(t, flagValue(args, "config", "c"), "%q", args)
	}
}

// containerd 1.7 and 2 report their configuration in the same form.
func TestReadRunning(t *testing.T) {
	config := `{"containerd": {"defaultRuntimeName": "runc", "runtimes": {
		"runc": {"runtimeType": "io.containerd.runc.v2", "options": {"SystemdCgroup": true, "BinaryName": ""}}, "kata": {"options": null}}},
		"rootDir": "/data/containerd/io.containerd.grpc.v1.cri"}`
	running, err := readRunning(&runtime.StatusResponse{Info: map[string]string{"config": config}})
	require.NoError(t, err)
	require.Equal(t, &doctor.Running{Root: "/data/containerd", SystemdCgroup: map[string]bool{"runc": true, "kata": false}}, running)
	_, err = readRunning(&runtime.StatusResponse{})
	require.ErrorContains(t, err, "configuration in the status of containerd's CRI service")
}

// The arguments and the PATH are those with which the process was started.
func TestReadProcess(t *testing.T) {
	args, path, err := readProcess(t.Context(), os.Getpid())
	require.NoError(t, err)
	require.Equal(t, os.Args[1:], args)
	require.NotEmpty(t, path)
	_, _, err = readProcess(t.Context(), 1<<30)
	require.ErrorContains(t, err, "command line")
}

// hidden is a stock containerd whose process can not be examined.
type hidden struct {
	introspection.UnimplementedIntrospectionServer
	containerdversion.UnimplementedVersionServer
}

func (hidden) Version(context.Context, *emptypb.Empty) (*containerdversion.VersionResponse, error) {
	return &containerdversion.VersionResponse{Version: "v2.4.2"}, nil
}

func (hidden) Plugins(context.Context, *introspection.PluginsRequest) (*introspection.PluginsResponse, error) {
	return &introspection.PluginsResponse{}, nil
}

func (hidden) Server(context.Context, *emptypb.Empty) (*introspection.ServerResponse, error) {
	return &introspection.ServerResponse{Pid: 1 << 30}, nil
}

// If the command line of containerd is not readable, the rest is examined.
func TestPreflightWithoutTheProcess(t *testing.T) {
	address := serveAll(t, func(server *grpc.Server) {
		introspection.RegisterIntrospectionServer(server, hidden{})
		containerdversion.RegisterVersionServer(server, hidden{})
	})
	dir := t.TempDir()
	config := filepath.Join(dir, "config.toml")
	require.NoError(t, os.WriteFile(config, []byte("version = 3\n"), 0o644))
	installed(t, dumped, "")
	out, err := podfsm(t, "--address", address, "--root-dir", dir, "--state-dir", dir, "doctor", "--preflight", "--config", config)
	require.Equal(t, 2, exitStatus(err), "%v", err)
	out = strings.Join(strings.Fields(out), " ") // as it isn't wrapped
	require.Contains(t, out, "containerd containerd v2.4.2 runs")
	require.Contains(t, out, "unknown service failed to read containerd's command line: ")
}
