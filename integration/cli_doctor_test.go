package integration

import (
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// ailment is a defect of a node that a check of the doctor finds.
type ailment struct {
	name           string
	inflict        func(t *testing.T, n *harness.Node) (cure func())
	check, subject string
	status         string
	evidence       []string // parts of the text
	remedy         string   // a part of the text
	refused        string   // as in Finding.refused_pods
	stock          string   // the error of containerd's own handler; "" without one
}

// bound mounts the directory of network namespaces on itself.
func bound(flags uintptr) func(*testing.T, *harness.Node) func() {
	return func(t *testing.T, n *harness.Node) func() {
		dir := filepath.Join(n.Dir(), netNSDir)
		require.NoError(t, unix.Mount(dir, dir, "", unix.MS_BIND, ""))
		require.NoError(t, unix.Mount("", dir, "", flags, ""))
		return func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) }
	}
}

var ailments = []ailment{
	{
		name: "a runtime without idmapped mounts", inflict: replaced("bin/runc", forgetsIDMap, 0o755),
		check: "runtime", status: "fail", evidence: []string{"bin/runc", "no idmapped mounts"}, remedy: "install runc 1.2 or later", refused: "with a user namespace",
	},
	{
		name: "a runtime without the command features", inflict: replaced("bin/runc", knowsNoFeatures, 0o755),
		check: "runtime", status: "fail", evidence: []string{"exit status 1: unknown command"}, remedy: "install runc", refused: "with a user namespace",
	},
	{
		name: "no runtime", inflict: away("bin/runc"),
		check: "runtime", status: "fail", evidence: []string{"bin/runc", "no such file"}, remedy: "install the runtime", refused: "all",
	},
	{
		name: "a filesystem for snapshots that can't be mapped", inflict: covered("root/io.containerd.snapshotter.v1.overlayfs", "ramfs", ""),
		check: "overlay", subject: "idmap", status: "fail", evidence: []string{"io.containerd.snapshotter.v1.overlayfs", "invalid argument"}, remedy: "ext4, xfs or btrfs", refused: "with a user namespace",
	},
	{
		name: "a filesystem for snapshots without metacopy", inflict: covered("root/io.containerd.snapshotter.v1.overlayfs", "ramfs", ""),
		check: "overlay", subject: "metacopy", status: "warn", evidence: []string{"io.containerd.snapshotter.v1.overlayfs"}, remedy: "extended attributes",
	},
	{
		name: "a closed state directory", inflict: func(t *testing.T, n *harness.Node) func() {
			dir := filepath.Join(n.Dir(), "state")
			require.NoError(t, os.Chmod(dir, 0o700))
			return func() { require.NoError(t, os.Chmod(dir, 0o711)) }
		},
		check: "directories", status: "fail", evidence: []string{"/state has mode 0700"}, remedy: "chmod o+x ", refused: "with a user namespace",
		stock: "permission denied",
	},
	{
		name: "a directory of network namespaces that can't be written", inflict: bound(unix.MS_REMOUNT | unix.MS_BIND | unix.MS_RDONLY),
		check: "netns directory", status: "fail", evidence: []string{"read-only"}, remedy: "can be written", refused: "with a network of their own",
		stock: "read-only file system",
	},
	{
		name: "a private directory of network namespaces", inflict: bound(unix.MS_PRIVATE),
		check: "netns directory", status: "warn", evidence: []string{netNSDir, "private"}, remedy: "mount --make-shared",
	},
	{
		name: "a CNI plugin that is missing", inflict: away("cni/bin/portmap"),
		check: "networks", status: "fail", evidence: []string{`plugin "portmap"`, "failed to find"}, remedy: "cni/bin",
	},
	{
		name: "an IPAM plugin that is missing", inflict: away("cni/bin/host-local"),
		check: "networks", status: "fail", evidence: []string{`plugin "host-local"`, "failed to find"}, remedy: "cni/bin",
	},
	{
		name: "a CNI plugin that can't be executed", inflict: replaced("cni/bin/portmap", "#!/bin/sh", 0o644),
		check: "networks", status: "fail", evidence: []string{`plugin "portmap"`, "permission denied"}, remedy: "cni/bin",
	},
	{
		name: "a CNI plugin of long ago", inflict: replaced("cni/bin/portmap", "#!/bin/sh\n"+`echo '{"cniVersion": "0.2.0", "supportedVersions": ["0.1.0", "0.2.0"]}'`, 0o755),
		check: "networks", status: "fail", evidence: []string{`plugin "portmap"`, "speaks CNI 0.1.0, 0.2.0, not 1."}, remedy: "too old",
	},
	{
		name: "no CNI configuration", inflict: func(t *testing.T, n *harness.Node) func() {
			files, err := filepath.Glob(filepath.Join(n.CNIConfDir(), "*"))
			require.NoError(t, err)
			require.Len(t, files, 1)
			relative, err := filepath.Rel(n.Dir(), files[0])
			require.NoError(t, err)
			return away(relative)(t, n)
		},
		check: "networks", status: "fail", evidence: []string{"no CNI network is configured"}, remedy: "cni/net.d",
	},
	{
		name: "a CNI configuration that can't be read", inflict: func(t *testing.T, n *harness.Node) func() {
			file := filepath.Join(n.CNIConfDir(), "00-broken.conflist")
			require.NoError(t, os.WriteFile(file, []byte(`{"name": "broken`), 0o644))
			return func() { require.NoError(t, os.Remove(file)) }
		},
		check: "networks", status: "fail", evidence: []string{"00-broken.conflist"}, remedy: "that can be read",
	},
	{
		name: "a full filesystem", inflict: covered("state/"+pluginDir, "tmpfs", "size=512k"),
		check: "disk space", status: "fail", evidence: []string{"state/" + pluginDir, "512KiB free"}, remedy: "free some space",
	},
	{
		name: "a filesystem with little space", inflict: covered("state/"+pluginDir, "tmpfs", "size=8m"),
		check: "disk space", status: "warn", evidence: []string{"state/" + pluginDir, "8MiB free"}, remedy: "free some space",
	},
	{
		name: "a filesystem without inodes", inflict: covered("state/"+pluginDir, "tmpfs", "nr_inodes=9"),
		check: "disk space", status: "fail", evidence: []string{"and 8 inodes"}, remedy: "free some space",
	},
	{
		name: "a ledger whose file was deleted", inflict: away(ledgerLog),
		check: "ledger", status: "fail", evidence: []string{"ledger.log: no such file"}, remedy: "restart containerd",
	},
	{
		name: "a ledger that was damaged", inflict: func(t *testing.T, n *harness.Node) func() {
			require.NoError(t, n.Kill(t.Context()))
			damages[3].do(t, filepath.Join(n.Dir(), durableLog))
			require.NoError(t, n.Start(t.Context()))
			return func() { removeKept(t, n) }
		},
		check: "ledger", status: "warn", evidence: []string{"root/" + pluginDir + "/ledger.log.damaged-1: "}, remedy: "rm /",
	},
	{
		name: "a pending cleanup", inflict: func(t *testing.T, n *harness.Node) func() {
			pending := leavePending(t, n)
			return func() {
				require.NoError(t, n.Heal())
				retryNow(t, n, pending)
			}
		},
		check: "pending cleanups", status: "warn", evidence: []string{"sandboxes with a pending cleanup: 1"}, remedy: "podfsm cleanups",
	},
}

// TestDoctor breaks each thing that the doctor checks and that can break while containerd runs. The
// status changes, and pods that need the thing are refused with the remedy. After the repair they
// run.
func TestDoctor(t *testing.T) {
	n := harness.StartNode(t, harness.Config{Daemon: harness.TestDaemon})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)
	for _, f := range examine(t, n) {
		require.Contains(t, []string{"ok", "warn"}, f.GetStatus(), "%v", f)
	}
	require.Eventually(t, func() bool { return strings.Contains(n.Log(), "doctor: made ") }, waitFor, tick)
	require.Equal(t, 1, strings.Count(n.Log(), "doctor: "), "it is quiet when all is well")

	for _, a := range ailments {
		t.Run(a.name, func(t *testing.T) {
			if a.check == "netns directory" {
				defer bound(unix.MS_SHARED)(t, n)() // independent of the machine's mounts
			}
			require.Equal(t, "ok", findingOf(t, examine(t, n), a.check, a.subject).GetStatus())
			cure := sync.OnceFunc(a.inflict(t, n))
			defer cure()
			found := findAiling(t, examine(t, n), a)
			require.Contains(t, found.GetRemedy(), a.remedy)
			require.Equal(t, a.refused, found.GetRefusedPods())
			if a.status == "fail" {
				require.Contains(t, failedChecks(t, n), a.check)
			}
			if a.refused != "" {
				requireTurnedAway(t, n, found)
			}
			if a.stock != "" {
				require.ErrorContains(t, failRun(t, n, harness.StockHandler, n.PodConfig("stock")), a.stock)
			}
			if a.refused != "" && a.check != "overlay" && a.refused != "all" {
				require.NoError(t, runAndRemove(t, n, n.PodConfig("spared", harness.HostUsers(), harness.HostNetwork())))
			}
			cure()
			if a.refused != "" {
				require.NoError(t, runAndRemove(t, n, n.PodConfig("cured")))
			}
			require.Equal(t, "ok", findingOf(t, examine(t, n), a.check, a.subject).GetStatus())
			require.Empty(t, failedChecks(t, n))
		})
		n.RequireClean(t, before)
	}
	tries, err := filepath.Glob(filepath.Join(n.Dir(), "root/*/.podfsm-doctor-*"))
	require.NoError(t, err)
	require.Empty(t, tries)
}

// setting is a setting of containerd's configuration, and the status of the doctor about it.
type setting struct {
	name           string
	old, new       string // in config.toml; "" is its end
	check          string
	status         string
	says           string
	remedy         string
	refused        string
	withCapability string // the status if containerd has CAP_SYS_RESOURCE; "" is the same
}

const podfsmTable = "\n[plugins.'io.containerd.podsandbox.controller.v1.podfsm'."

var settings = []setting{
	{
		name: "a snapshotter without remap-ids", old: "sandboxer = 'podfsm'\n", new: "sandboxer = 'podfsm'\nsnapshotter = 'native'\n",
		check: "snapshotter", status: "fail", says: `"native" can't map ids`, remedy: `snapshotter = "overlayfs"`, refused: "with a user namespace",
	},
	{
		name: "the systemd driver without systemd", old: "SystemdCgroup = false", new: "SystemdCgroup = true",
		check: "cgroups", status: "fail", says: "systemd doesn't run here", remedy: "SystemdCgroup = false",
	},
	{
		name: "a runtime that isn't there", old: "/bin/runc'", new: "/bin/nowhere'",
		check: "runtime", status: "fail", says: "/bin/nowhere", remedy: "correct BinaryName", refused: "all",
	},
	{
		name: "another runtime, without the group of the kubelet's directories", old: "/bin/runc'", new: "/bin/bridge'",
		check: "supplementary groups", status: "warn", says: "/bin/bridge", remedy: "SupplementaryGroups=0",
	},
	{
		name: "scores that need a capability", old: "restrict_oom_score_adj = true", new: "restrict_oom_score_adj = false",
		check: "oom score", status: "fail", says: "CAP_SYS_RESOURCE", remedy: "restrict_oom_score_adj = true", withCapability: "ok",
	},
	{
		name: "no handler of podfsm's", old: "sandboxer = 'podfsm'", new: "sandboxer = 'podsandbox'",
		check: "handlers", status: "warn", says: "no runtime handler", remedy: `sandboxer = "podfsm"`,
	},
	{
		name: "a mode for a handler that isn't there", new: podfsmTable + "userns.nobody]\nmode = 'kubelet'\n",
		check: "podfsm", status: "fail", says: "userns.nobody", remedy: "restart containerd",
	},
	{
		name: "a pool of a user without ids", new: podfsmTable + "userns_pool]\nuser = 'podfsm-nobody'\n",
		check: "id pool", status: "fail", says: `"podfsm-nobody"`, remedy: "at least 65536 ids",
	},
}

// TestDoctorOfConfiguration starts containerd with configurations with which pods can't run. The
// daemon logs the problem by itself and refuses the pods, before podfsm doctor is run.
func TestDoctorOfConfiguration(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	file := filepath.Join(n.Dir(), "config.toml")
	original, err := os.ReadFile(file)
	require.NoError(t, err)
	for _, s := range settings {
		t.Run(s.name, func(t *testing.T) {
			require.Equal(t, "ok", findingOf(t, examine(t, n), s.check, "").GetStatus())
			changed := string(original) + s.new
			if s.old != "" {
				require.Contains(t, string(original), s.old)
				changed = strings.ReplaceAll(string(original), s.old, s.new)
			}
			require.NoError(t, os.WriteFile(file, []byte(changed), 0o644))
			logged := len(n.Log())
			require.NoError(t, n.Restart(t.Context()))
			if s.refused != "" {
				err := failRun(t, n, harness.PodfsmHandler, n.PodConfig("refused"))
				require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
				require.ErrorContains(t, err, s.remedy)
			}
			found := findingOf(t, examine(t, n), s.check, "")
			if s.withCapability != "" && hasSysResource(t) {
				require.Equal(t, s.withCapability, found.GetStatus())
				return
			}
			require.Equal(t, s.status, found.GetStatus(), "%v", found)
			require.Contains(t, found.GetEvidence(), s.says)
			require.Contains(t, found.GetRemedy(), s.remedy)
			require.Equal(t, s.refused, found.GetRefusedPods())
			var log string
			require.Eventually(t, func() bool {
				log = n.Log()[logged:]
				return strings.Contains(log, "doctor: made ")
			}, waitFor, tick)
			require.Equal(t, s.status == "fail", strings.Contains(log, "doctor: "+s.check), "failures are in the log")
		})
		require.NoError(t, os.WriteFile(file, original, 0o644))
		require.NoError(t, n.Restart(t.Context()))
	}
}

// hasSysResource reports whether processes of this machine have CAP_SYS_RESOURCE.
func hasSysResource(t *testing.T) bool {
	t.Helper()
	have, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, unix.CAP_SYS_RESOURCE, 0, 0, 0)
	require.NoError(t, err)
	return have == 1
}

// TestDoctorOffline examines a node whose daemon is down, by its configuration.
func TestDoctorOffline(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	require.NoError(t, n.Stop(t.Context()))
	config := []string{"--config", filepath.Join(n.Dir(), "config.toml")}
	found := examine(t, n, config...)
	for _, check := range []string{"runtime", "networks", "overlay", "directories", "ledger", "user namespaces", "handlers"} {
		require.Equal(t, "ok", findingOf(t, found, check, "").GetStatus(), "%v", found)
	}
	for _, check := range []string{"podfsm", "snapshotter", "supplementary groups"} {
		require.Equal(t, "containerd is down", findingOf(t, found, check, "").GetEvidence())
	}
	for _, a := range ailments {
		if a.check == "runtime" || a.check == "networks" || a.check == "directories" || a.check == "disk space" {
			t.Run(a.name, func(t *testing.T) {
				defer a.inflict(t, n)()
				require.Contains(t, findAiling(t, examine(t, n, config...), a).GetRemedy(), a.remedy)
			})
		}
	}

	// The limit is that of a new user namespace in which the doctor is root, because all processes
	// share the limit of the node.
	for _, tc := range []struct{ limit, evidence string }{
		{"0", "user.max_user_namespaces = 0"}, {"1", "failed to make one"},
	} {
		t.Run("user.max_user_namespaces = "+tc.limit, func(t *testing.T) {
			doctor := append([]string{n.CLI(), "--address", n.Socket(), "--root-dir", filepath.Join(n.Dir(), "root"), "--state-dir", filepath.Join(n.Dir(), "state"), "doctor", "-o", "json"}, config...)
			script := "echo " + tc.limit + ` >/proc/sys/user/max_user_namespaces && exec "$@"`
			if tc.limit == "1" {
				doctor = append([]string{"unshare", "--user", "--map-root-user"}, doctor...) // which takes the one
			}
			out, err := osexec.CommandContext(t.Context(), "unshare", append([]string{"--user", "--map-root-user", "sh", "-c", script, "sh"}, doctor...)...).Output()
			require.Error(t, err)
			var response podfsmv1.DoctorResponse
			require.NoError(t, protojson.Unmarshal(out, &response))
			found := findingOf(t, response.GetFindings(), "user namespaces", "")
			require.Equal(t, "fail", found.GetStatus(), "%v", found)
			require.Contains(t, found.GetEvidence(), tc.evidence)
			require.Contains(t, found.GetRemedy(), "sysctl -w user.max_user_namespaces=")
		})
	}
}

// findAiling returns the finding with the status and the evidence of an ailment.
func findAiling(t *testing.T, findings []*podfsmv1.Finding, a ailment) *podfsmv1.Finding {
	t.Helper()
	for _, f := range findings {
		matches := f.GetCheck() == a.check && (a.subject == "" || f.GetSubject() == a.subject) && f.GetStatus() == a.status
		for _, says := range a.evidence {
			matches = matches && strings.Contains(f.GetEvidence(), says)
		}
		if matches {
			return f
		}
	}
	require.Fail(t, "the doctor doesn't see it", "%v", findings)
	return nil
}

// requireTurnedAway requires that a pod with the missing need is refused, with the same text each
// time.
func requireTurnedAway(t *testing.T, n *harness.Node, found *podfsmv1.Finding) {
	t.Helper()
	var texts []string
	for range 2 {
		err := failRun(t, n, harness.PodfsmHandler, n.PodConfig("refused"))
		require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
		for _, says := range []string{"step allocate_ids", `"default/refused"`, found.GetCheck(), found.GetRemedy()} {
			require.ErrorContains(t, err, says)
		}
		texts = append(texts, err.Error())
	}
	require.Equal(t, texts[0], texts[1])
}
