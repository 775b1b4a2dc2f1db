package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/log"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/internal/roottest"
)

const (
	isolatedEnv = "CNI_TEST_ISOLATED"
	pluginsEnv  = "CNI_TEST_PLUGINS" // the directory for real plugins
)

// TestMain runs the tests in their own network and mount namespaces, which take bridges, routes,
// iptables rules and mounts with them.
func TestMain(m *testing.M) {
	if os.Geteuid() != 0 || os.Getenv(isolatedEnv) != "" {
		_ = log.SetLevel("error") // what plugins write to stderr is logged
		goleak.VerifyTestMain(m)
		return
	}
	code, err := runIsolated()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

func runIsolated() (int, error) {
	// The new namespace has no network to download modules.
	if err := compilePlugins(); err != nil {
		return 1, err
	}
	dir, err := os.MkdirTemp("", "cni-plugins-*")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), isolatedEnv+"=1", pluginsEnv+"="+dir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	runtime.LockOSThread() // Pdeathsig is about the thread
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		return 1, err
	}
	return cmd.ProcessState.ExitCode(), nil
}

// newNetNS pins a new network namespace to a path.
func newNetNS(t *testing.T) string {
	t.Helper()
	roottest.Require(t)
	path := filepath.Join(t.TempDir(), "netns")
	require.NoError(t, os.WriteFile(path, nil, 0o444))
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
		}
		done <- err
	}()
	require.NoError(t, <-done)
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
	return path
}

// plugins is a directory of fake CNI plugins: shell scripts that log their calls and keep their input and environment.
type plugins struct {
	t   *testing.T
	dir string
}

func newPlugins(t *testing.T) *plugins {
	t.Helper()
	return &plugins{t, t.TempDir()}
}

// script adds a plugin. The body runs after the call was logged, with $dir the directory and $name the plugin's name.
func (p *plugins) script(name, body string) {
	p.t.Helper()
	head := fmt.Sprintf(`#!/bin/sh
dir=%s name=%s
echo "$CNI_COMMAND $name $CNI_IFNAME" >> $dir/calls
cat > $dir/$name.$CNI_COMMAND.stdin
env > $dir/$name.$CNI_COMMAND.env
`, p.dir, name)
	require.NoError(p.t, os.WriteFile(filepath.Join(p.dir, name), []byte(head+body), 0o755))
}

// good is the body of a plugin that gives eth0 an address.
func good(ip string) string {
	return `[ $CNI_COMMAND = ADD ] || exit 0
printf '{"cniVersion":"1.0.0","interfaces":[{"name":"%s"}],"ips":[{"address":"` + ip + `/24","interface":0}]}' $CNI_IFNAME
`
}

// calls returns the plugins' calls so far, and forgets them.
func (p *plugins) calls() []string {
	p.t.Helper()
	file := filepath.Join(p.dir, "calls")
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	require.NoError(p.t, err)
	require.NoError(p.t, os.Remove(file))
	return strings.Split(strings.TrimSpace(string(data)), "\n")
}

// read returns a file that a plugin has written.
func (p *plugins) read(name string) string {
	p.t.Helper()
	data, err := os.ReadFile(filepath.Join(p.dir, name))
	require.NoError(p.t, err)
	return strings.TrimSpace(string(data))
}

// stdin returns the configuration that a plugin got.
func (p *plugins) stdin(name, command string) map[string]any {
	p.t.Helper()
	var conf map[string]any
	require.NoError(p.t, json.Unmarshal([]byte(p.read(name+"."+command+".stdin")), &conf))
	return conf
}

// network makes the configuration of a network from those of its plugins.
func network(t *testing.T, name, version string, confs ...string) Network {
	t.Helper()
	data := fmt.Sprintf(`{"name":%q,"cniVersion":%q,"plugins":[%s]}`, name, version, strings.Join(confs, ","))
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "net.conflist"), []byte(data), 0o644))
	networks, err := Load(Config{ConfDir: dir})
	require.NoError(t, err)
	return networks[0]
}

// inNetNS runs f in a network namespace.
func inNetNS(t *testing.T, path string, f func() error) {
	t.Helper()
	require.NoError(t, ns.WithNetNSPath(path, func(ns.NetNS) error { return f() }))
}

// newDriver returns a driver. All drivers of this test process share its groups, as if the daemon
// was restarted.
func newDriver(t *testing.T, o Options) *Driver {
	t.Helper()
	o.Groups = testGroups(t)
	return NewDriver(o)
}

// testGroups returns groups that are removed with all their processes at the end of the test.
func testGroups(t *testing.T) host.Groups {
	t.Helper()
	roottest.Require(t)
	groups, err := host.GroupsBelow(fmt.Sprintf("podfsm-cni-test-%d", os.Getpid()))
	require.NoError(t, err)
	t.Cleanup(func() {
		names, err := groups.Names()
		require.NoError(t, err)
		for _, name := range names {
			group, err := groups.Get(name)
			require.NoError(t, err)
			require.NoError(t, endGroup(context.Background(), group))
		}
	})
	return groups
}

// groupNames returns the names of all groups.
func groupNames(t *testing.T) []string {
	t.Helper()
	names, err := testGroups(t).Names()
	require.NoError(t, err)
	return names
}
