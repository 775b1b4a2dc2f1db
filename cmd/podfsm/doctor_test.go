package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/doctor"
	"github.com/podfsm/podfsm/userns"
)

var examination = &podfsmv1.DoctorResponse{Findings: []*podfsmv1.Finding{
	{Check: "kernel", Status: "ok", Evidence: "Linux 6.18.44"},
	{
		Check: "runtime", Subject: "podfsm, podfsm-auto", Status: "fail", RefusedPods: "with a user namespace",
		Evidence: "/usr/local/sbin/runc features: no idmapped mounts",
		Remedy:   "install runc 1.2 or later, or another runtime with these features",
	},
	{
		Check: "disk space", Status: "warn", Remedy: "free some space there before it is full",
		Evidence: "/var/lib/containerd/io.containerd.podsandbox.controller.v1.podfsm has 12MiB free and 400 inodes",
	},
	{Check: "networks", Status: "unknown", Evidence: "a name\x1b[2J of a network", Remedy: "start containerd"},
}}

func (fakeSandboxes) Doctor(context.Context, *podfsmv1.DoctorRequest) (*podfsmv1.DoctorResponse, error) {
	return examination, nil
}

func TestDoctorOutput(t *testing.T) {
	address := serve(t, fakeSandboxes{})
	out, err := podfsm(t, "--address", address, "doctor")
	require.EqualError(t, err, "1 check has failed")
	require.Equal(t, 2, exitStatus(err))
	requireGolden(t, "doctor.txt", []byte(out))
	for line := range strings.Lines(out) {
		if !strings.Contains(line, "/var/lib/containerd/") { // a path is never broken
			require.LessOrEqual(t, len([]rune(line)), pageWidth+1)
		}
	}
	out, err = podfsm(t, "--address", address, "doctor", "-o", "json")
	require.Equal(t, 2, exitStatus(err))
	requireGolden(t, "doctor.json", []byte(out))
	_, err = podfsm(t, "--address", address, "doctor", "now")
	require.ErrorContains(t, err, "takes no arguments")
	require.Equal(t, exitUsage, exitStatus(err))
	_, err = podfsm(t, "--address", serve(t, nil), "doctor")
	require.ErrorContains(t, err, "a containerd without podfsm")
	require.Equal(t, exitNoDaemon, exitStatus(err))

	require.NoError(t, failures(examination.GetFindings()[2:]), "warnings don't fail")
}

// Without a daemon, the doctor checks what it can see itself, and the rest is unknown.
func TestDoctorWithoutDaemon(t *testing.T) {
	dir := t.TempDir()
	var out, errOut bytes.Buffer
	args := []string{"podfsm", "--address", filepath.Join(dir, "no.sock"), "--root-dir", dir, "--state-dir", dir, "doctor", "--config", filepath.Join(dir, "config.toml")}
	err := run(t.Context(), args, &out, &errOut)
	require.EqualError(t, err, "1 check has failed", "users can't traverse the directory of a test")
	require.Contains(t, errOut.String(), "the daemon is down; what only it knows is unknown")
	require.Contains(t, errOut.String(), "config.toml: no such file or directory; what depends on it is unknown")
	for _, row := range []string{
		`(?m)^ok +kernel +Linux \d`,
		`(?m)^ok +user namespaces +user.max_user_namespaces = \d+`,
		`(?m)^ok +overlay +idmap: overlayfs`,
		`(?m)^fail +directories `,
		`(?m)^unknown +runtime +containerd's configuration isn't known$`,
		`(?m)^ok +ledger +no ledger yet`,
	} {
		require.Regexp(t, row, out.String())
	}
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left, "the doctor removes what it made")
}

// The daemon's configuration is read with containerd's defaults.
func TestReadConfig(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "config.toml")
	snapshots := filepath.Join(dir, "io.containerd.snapshotter.v1.overlayfs")
	require.NoError(t, os.Mkdir(snapshots, 0o700))
	read := func(text string) (*doctor.Config, error) {
		require.NoError(t, os.WriteFile(path, []byte(text), 0o644))
		return readConfig(t.Context(), path, dir, dir)
	}
	overlayfs := doctor.Snapshotter{Name: "overlayfs", Loaded: true, Root: snapshots, RemapIDs: true}

	config, err := read(`version = 4
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.podfsm]
runtime_type = "io.containerd.runc.v2"
sandboxer = "podfsm"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.other]
runtime_type = "io.containerd.runc.v2"
`)
	require.NoError(t, err)
	require.Equal(t, &doctor.Config{CgroupDriver: "cgroupfs", NetNSDir: "/var/run/netns", Handlers: []doctor.Handler{{
		Name: "podfsm", Shim: "io.containerd.runc.v2", Binary: "runc", Snapshotter: overlayfs, Mode: userns.ModeKubelet,
		Network: cni.Config{BinDirs: []string{"/opt/cni/bin"}, ConfDir: "/etc/cni/net.d", MaxConfNum: 1},
	}}}, config)

	config, err = read(`version = 3
[plugins.'io.containerd.cri.v1.images']
snapshotter = "nowhere"
[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
cni = {bin_dirs = ["/a", "/b"], conf_dir = "/c", max_conf_num = 2}
[plugins.'io.containerd.cri.v1.runtime'.containerd]
default_runtime_name = "a"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.a]
runtime_type = "io.containerd.runc.v2"
sandboxer = "podfsm"
options = {BinaryName = "crun", SystemdCgroup = true}
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.b]
runtime_type = "io.containerd.kata.v2"
runtime_path = "/opt/kata"
sandboxer = "podfsm"
snapshotter = "overlayfs"
cni_conf_dir = "/d"
[plugins.'io.containerd.podsandbox.controller.v1.podfsm']
init_path = "/opt/podfsm-init"
[plugins.'io.containerd.podsandbox.controller.v1.podfsm'.userns.b]
mode = "auto"
[plugins.'io.containerd.podsandbox.controller.v1.podfsm'.userns_pool]
user = "pods"
`)
	require.NoError(t, err)
	require.Equal(t, &doctor.Config{
		InitPath: "/opt/podfsm-init", CgroupDriver: "systemd", NetNSDir: filepath.Join(dir, criDir, "netns"), RestrictOOMScoreAdj: true,
		Pool: true, PoolUser: "pods",
		Handlers: []doctor.Handler{
			{
				Name: "a", Default: true, Shim: "io.containerd.runc.v2", Binary: "crun", SystemdCgroup: true, Mode: userns.ModeKubelet,
				Snapshotter: doctor.Snapshotter{Name: "nowhere"},
				Network:     cni.Config{BinDirs: []string{"/a", "/b"}, ConfDir: "/c", MaxConfNum: 2},
			},
			{
				Name: "b", Shim: "/opt/kata", Snapshotter: overlayfs, Mode: userns.ModeAuto,
				Network: cni.Config{BinDirs: []string{"/a", "/b"}, ConfDir: "/d", MaxConfNum: 2},
			},
		},
	}, config)

	// The cgroup driver that containerd reports to the kubelet, by its default handler.
	for text, want := range map[string]string{
		``: "cgroupfs", // containerd's own handler
		"runc]\noptions = {SystemdCgroup = true}":                                            "systemd",
		"runc]\nruntime_type = \"io.containerd.runc.v2\"\noptions = {SystemdCgroup = true}":  "systemd",
		"runc]\nruntime_type = \"io.containerd.runc.v2\"\noptions = {SystemdCgroup = false}": "cgroupfs",
		"runc]\nruntime_type = \"io.containerd.kata.v2\"\noptions = {SystemdCgroup = true}":  "",
		"other]\nruntime_type = \"io.containerd.runc.v2\"":                                   "cgroupfs",
	} {
		if text != "" {
			text = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes." + text
		}
		config, err := read("version = 4\n" + text)
		require.NoError(t, err)
		require.Equal(t, want, config.CgroupDriver, text)
	}
	config, err = read(`version = 4
[plugins.'io.containerd.cri.v1.runtime'.containerd]
default_runtime_name = "bare"
runtimes = {bare = {runtime_type = "io.containerd.runc.v2"}}
`)
	require.NoError(t, err)
	require.Empty(t, config.CgroupDriver, "containerd detects the driver of the node")

	_, err = read("version = 2\n")
	require.ErrorContains(t, err, "version 2")
	_, err = read("version = 4\n[plugins.'io.containerd.cri.v1.runtime']\ncni = 3\n")
	require.ErrorContains(t, err, "io.containerd.cri.v1.runtime")
	_, err = read("version")
	require.ErrorContains(t, err, "failed to read containerd's configuration")
}
