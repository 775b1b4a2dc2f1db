package cni

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestCheckCallsPlugins(t *testing.T) {
	p := newPlugins(t)
	p.script("first", good("10.1.2.3"))
	p.script("second", good("10.1.2.4"))
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0",
		`{"type":"first","capabilities":{"bandwidth":true}}`, `{"type":"second"}`))
	require.True(t, errdefs.IsFailedPrecondition(r.driver.Check(t.Context(), r.attachment, nil)), "the pod isn't attached")
	require.NoError(t, r.add(t.Context()))
	r.calls()
	before := r.phases()
	require.NoError(t, r.driver.Check(t.Context(), r.attachment, nil))
	require.Equal(t, []string{"CHECK first eth0", "CHECK second eth0"}, r.calls())
	require.Equal(t, before, r.phases(), "CHECK changes nothing")
	request := r.stdin("first", "CHECK")
	require.Equal(t, "10.1.2.4/24", request["prevResult"].(map[string]any)["ips"].([]any)[0].(map[string]any)["address"], "the last plugin's result")
	require.NotEmpty(t, request["runtimeConfig"])
	require.Contains(t, r.read("first.CHECK.env"), "CNI_NETNS="+r.attachment.NetNSPath)

	p.script("first", `echo '{"code":100,"msg":"the route is gone"}'; exit 1`)
	err := r.driver.Check(t.Context(), r.attachment, nil)
	require.EqualError(t, err, `plugin type="first" name="net" failed (check): the route is gone`)
	require.Equal(t, []string{"CHECK first eth0"}, r.calls())

	p.script("first", `echo '{"code":999,"msg":"CNI CHECK method is not implemented"}'; exit 1`)
	require.NoError(t, r.driver.Check(t.Context(), r.attachment, nil), "the error says nothing about the pod")
	require.Equal(t, []string{"CHECK first eth0", "CHECK second eth0"}, r.calls())

	p.script("first", `echo '{"code":11,"msg":"DaemonDown","details":"unable to connect to Cilium agent"}'; exit 1`)
	require.NoError(t, r.driver.Check(t.Context(), r.attachment, nil), "try again later says nothing about the pod, either")
	require.Equal(t, []string{"CHECK first eth0", "CHECK second eth0"}, r.calls())

	p.script("first", good("10.1.2.3"))
	require.NoError(t, r.del(t.Context()))
	require.True(t, errdefs.IsFailedPrecondition(r.driver.Check(t.Context(), r.attachment, nil)))
}

func TestCheckLeavesOut(t *testing.T) {
	p := newPlugins(t)
	p.script("first", good("10.1.2.3"))
	for name, conflist := range map[string]string{
		"before 0.4.0": `{"name":"net","cniVersion":"0.3.1","plugins":[{"type":"first"}]}`,
		"disableCheck": `{"name":"net","cniVersion":"1.0.0","disableCheck":true,"plugins":[{"type":"first"}]}`,
	} {
		t.Run(name, func(t *testing.T) {
			networks, err := Load(Config{ConfDir: confDir(t, map[string]string{"net.conflist": conflist})})
			require.NoError(t, err)
			r := newRig(t, p, Config{}, networks...)
			require.NoError(t, r.add(t.Context()))
			r.calls()
			require.NoError(t, r.driver.Check(t.Context(), r.attachment, nil))
			require.Empty(t, r.calls())
		})
	}
}

// statusRig is a network whose second plugin says that it isn't ready while a file is there.
func statusRig(t *testing.T, version string) (p *plugins, ask func(*Driver) error) {
	p = newPlugins(t)
	p.script("first", "exit 0")
	p.script("second", `[ -e $dir/unready ] || exit 0
echo '{"code":50,"msg":"the agent is starting"}'; exit 1`)
	networks := []Network{network(t, "net", version, `{"type":"first"}`, `{"type":"second"}`)}
	return p, func(d *Driver) error { return d.Status(t.Context(), Config{BinDirs: []string{p.dir}}, networks) }
}

func TestStatus(t *testing.T) {
	p, ask := statusRig(t, "1.1.0")
	d := newDriver(t, Options{})
	require.NoError(t, ask(d))
	require.Equal(t, []string{"STATUS first ", "STATUS second"}, p.calls())
	require.Equal(t, map[string]any{"type": "second", "name": "net", "cniVersion": "1.1.0"}, p.stdin("second", "STATUS"))
	require.NoError(t, os.WriteFile(filepath.Join(p.dir, "unready"), nil, 0o600))
	require.NoError(t, ask(d), "an answer counts for a while")
	require.Empty(t, p.calls())

	d = newDriver(t, Options{})
	for range 2 {
		err := ask(d)
		require.EqualError(t, err, `CNI network "net" accepts no pods now: plugin type="second" name="net" failed (status): the agent is starting: unavailable`)
		require.True(t, errdefs.IsUnavailable(err))
	}
	require.Len(t, p.calls(), 2, "a failure counts for a while, too")

	// An expired answer is dropped, and the plugins are asked again.
	for key, known := range d.answers.known {
		known.at = known.at.Add(-statusAge)
		d.answers.known[key], d.answers.known["of another"] = known, known
	}
	require.NoError(t, os.Remove(filepath.Join(p.dir, "unready")))
	require.NoError(t, ask(d))
	require.Len(t, p.calls(), 2)
	require.Len(t, d.answers.known, 1)

	require.NoError(t, os.Remove(filepath.Join(p.dir, "first")))
	require.True(t, errdefs.IsFailedPrecondition(ask(newDriver(t, Options{}))), "a plugin is missing")
}

func TestStatusIsNotAskedBefore11(t *testing.T) {
	p, ask := statusRig(t, "1.0.0")
	require.NoError(t, os.WriteFile(filepath.Join(p.dir, "unready"), nil, 0o600))
	require.NoError(t, ask(newDriver(t, Options{})))
	require.Empty(t, p.calls())
}

func TestStatusIsAskedOnce(t *testing.T) {
	p, ask := statusRig(t, "1.1.0")
	d := newDriver(t, Options{})
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			if err := ask(d); err != nil {
				t.Error(err)
			}
		})
	}
	callers.Wait()
	require.Len(t, p.calls(), 2)
}

// A caller that gives up returns at once, and the other callers get the answer.
func TestStatusCallerGoes(t *testing.T) {
	p := newPlugins(t)
	for _, fifo := range []string{"started", "go"} {
		require.NoError(t, unix.Mkfifo(filepath.Join(p.dir, fifo), 0o600))
	}
	p.script("slow", "echo > $dir/started; cat $dir/go > /dev/null")
	d, networks := newDriver(t, Options{}), []Network{network(t, "net", "1.1.0", `{"type":"slow"}`)}
	ask := func(ctx context.Context) <-chan error {
		answer := make(chan error, 1)
		go func() { answer <- d.Status(ctx, Config{BinDirs: []string{p.dir}}, networks) }()
		return answer
	}
	ctx, cancel := context.WithCancel(t.Context())
	goes, stays := ask(ctx), ask(t.Context())
	_, err := os.ReadFile(filepath.Join(p.dir, "started"))
	require.NoError(t, err)
	cancel()
	require.ErrorIs(t, <-goes, context.Canceled)
	require.NoError(t, os.WriteFile(filepath.Join(p.dir, "go"), nil, 0))
	require.NoError(t, <-stays)
	require.Equal(t, []string{"STATUS slow"}, p.calls())
}

func TestGCOfANetwork(t *testing.T) {
	p := newPlugins(t)
	p.script("first", `echo '{"code":100,"msg":"the disk is full"}'; exit 1`)
	p.script("second", "exit 0")
	config := Config{BinDirs: []string{p.dir}}
	d := newDriver(t, Options{})
	networks := []Network{network(t, "net", "1.1.0", `{"type":"first"}`, `{"type":"second"}`)}
	require.True(t, networks[0].Collected())

	err := d.GC(t.Context(), config, networks[0], []Attached{{ContainerID: "c1", IfName: "eth0"}})
	require.EqualError(t, err, `plugin type="first" name="net" failed (gc): the disk is full`)
	require.Equal(t, []string{"GC first ", "GC second"}, p.calls(), "all plugins run")
	valid := []any{map[string]any{"containerID": "c1", "ifname": "eth0"}}
	require.Equal(t, map[string]any{
		"type": "second", "name": "net", "cniVersion": "1.1.0", "cni.dev/valid-attachments": valid, "cni.dev/attachments": valid,
	}, p.stdin("second", "GC"))

	require.Error(t, d.GC(t.Context(), config, networks[0], nil))
	require.Equal(t, []any{}, p.stdin("second", "GC")["cni.dev/valid-attachments"], "nothing is valid")
	p.calls()

	for _, conflist := range []string{
		`{"name":"net","cniVersion":"1.0.0","plugins":[{"type":"first"}]}`,
		`{"name":"net","cniVersion":"1.1.0","disableGC":true,"plugins":[{"type":"first"}]}`,
	} {
		networks, err := Load(Config{ConfDir: confDir(t, map[string]string{"net.conflist": conflist})})
		require.NoError(t, err)
		require.False(t, networks[0].Collected())
		require.NoError(t, d.GC(t.Context(), config, networks[0], nil))
		require.Empty(t, p.calls())
	}
}

// An IPAM plugin gets the configuration of the plugin that names it, as for ADD.
func TestGCOfAddresses(t *testing.T) {
	p := newPlugins(t)
	p.script("first", "exit 0")
	p.script("addresses", "exit 0")
	net := network(t, "net", "1.1.0", `{"type":"first","ipam":{"type":"addresses","ranges":[]}}`)
	require.NoError(t, newDriver(t, Options{}).GC(t.Context(), Config{BinDirs: []string{p.dir}}, net, []Attached{{ContainerID: "c1", IfName: "eth0"}}))
	require.Equal(t, []string{"GC first ", "GC addresses"}, p.calls())
	require.Equal(t, p.stdin("first", "GC"), p.stdin("addresses", "GC"))
}

// The GC of a killed daemon must not run beside the pods of the next daemon.
func TestEndGC(t *testing.T) {
	p := newPlugins(t)
	fifo := filepath.Join(p.dir, "started")
	require.NoError(t, unix.Mkfifo(fifo, 0o600))
	p.script("hang", "echo > $dir/started; exec sleep 600")
	d := newDriver(t, Options{})
	networks := network(t, "net", "1.1.0", `{"type":"hang"}`)
	done := make(chan error)
	go func() {
		done <- d.GC(context.Background(), Config{BinDirs: []string{p.dir}}, networks, nil)
	}()
	_, err := os.ReadFile(fifo)
	require.NoError(t, err)
	require.Equal(t, []string{"-.0.0.GC.1"}, groupNames(t))
	left, err := Leftovers(d.groups)
	require.NoError(t, err)
	require.Empty(t, left, "GC belongs to no sandbox")
	require.NoError(t, newDriver(t, Options{}).EndGC(t.Context()))
	require.ErrorContains(t, <-done, "killed")
	require.Empty(t, groupNames(t))
}

func TestCached(t *testing.T) {
	dir := t.TempDir()
	none, err := cachedIn(dir)
	require.NoError(t, err)
	require.Empty(t, none)
	require.NoError(t, os.Mkdir(filepath.Join(dir, "results"), 0o700))
	for file, content := range map[string]string{
		"net-c1-eth0": `{"kind":"cniCacheV1","containerId":"c1","networkName":"net","ifName":"eth0","config":""}`,
		"net-c2-eth1": `{"kind":"cniCacheV1","containerId":"c2","networkName":"net","ifName":"eth1","config":""}`,
		"oth-c3-eth0": `{"kind":"cniCacheV1","containerId":"c3","networkName":"oth","ifName":"eth0","config":""}`,
		"net-c4-eth0": `{"kind":`,
	} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "results", file), []byte(content), 0o600))
	}
	cached, err := cachedIn(dir)
	require.NoError(t, err)
	require.Equal(t, map[string][]Attached{
		"net": {{ContainerID: "c1", IfName: "eth0"}, {ContainerID: "c2", IfName: "eth1"}},
		"oth": {{ContainerID: "c3", IfName: "eth0"}},
	}, cached)
}

// A child of a plugin has its own session and holds the pipes of the plugin. At the deadline, both
// are killed.
func TestAddDeadlineLeavesNothing(t *testing.T) {
	r, started := hangRig(t, `if [ $CNI_COMMAND = DEL ]; then
	kill -0 $(cat $dir/child) 2> /dev/null && [ $(ps -o state= -p $(cat $dir/child)) != Z ] && echo alive > $dir/seen
	exit 0
fi
setsid sh -c 'echo $$ > $0; echo > $1; sleep 600' $dir/child $dir/started &
echo $$ > $dir/parent
wait; sleep 600`)
	r.driver = newDriver(t, Options{AddTimeout: time.Second, PipeTimeout: 100 * time.Millisecond})
	errs := make(chan error)
	go func() { errs <- r.add(t.Context()) }()
	started()
	require.True(t, errdefs.IsDeadlineExceeded(<-errs))
	requireDead(t, r.pid("parent"))
	requireDead(t, r.pid("child"))
	require.NoError(t, r.del(t.Context()))
	require.NoFileExists(t, filepath.Join(r.dir, "seen"), "DEL never runs beside it")
	require.True(t, r.attachment.Settled())
}
