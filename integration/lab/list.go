package main

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"time"
)

func scenarios(o options) []scenario {
	tests := cmp.Or(o.tests, strings.Join(everywhere, "|"))
	return []scenario{
		{name: "smoke", on: debian13, smoke: true, do: smoke},
		{name: "smoke-arm64", on: debian13arm, do: smoke},
		{name: "life-systemd", on: debian13, do: life("systemd")},
		{name: "life-cgroupfs", on: debian13, do: life("cgroupfs")},
		{name: "life-systemd-v1", on: debian13, options: v1, do: life("systemd")},
		{name: "life-cgroupfs-v1", on: debian13, options: v1, do: life("cgroupfs")},
		{name: "life-debian12-systemd", on: debian12, do: life("systemd")},
		{name: "life-debian12-cgroupfs", on: debian12, do: life("cgroupfs")},
		// The driver of the kubelet is systemd, and the runtime handlers are not configured for it.
		{name: "slices-without-systemd", on: debian13, do: steps(node("cgroupfs"), pods("slices", "TestRun|TestRunStock|TestStillRun"), kill,
			pods("slices", "TestStillRun|TestRemoveAll"))},
		{name: "tests-systemd", on: debian13, do: integrationTests(tests, "systemd")},
		{name: "tests-cgroupfs", on: debian13, do: integrationTests(tests, "cgroupfs")},
		// Plugins that need a full kernel, and the current crun of Debian.
		{name: "plugins", on: debian13, do: integrationTests("TestChains|TestOtherHandlers", "cgroupfs")},
		{name: "conformance", on: debian13, critest: true, do: conformance},
		{name: "cluster", on: debian13, cluster: true, do: clusterTests("systemd", o.tests)},
		// From stock containerd by the chart, and back.
		{name: "deploy", on: debian13, cluster: true, do: steps(stock("systemd"), command(deployScript))},
		{name: "reboot", on: debian13, do: again(reboot)},
		{name: "power-cut", on: debian13, do: again(cut)},
		{name: "power-cuts", on: debian13, rounds: o.rounds, do: steps(node("systemd"), repeat(o.rounds, churnAndCut(1), afterCut))},
		{name: "power-cuts-upgrade", on: debian13, rounds: o.rounds, do: steps(node("systemd"), repeat(o.rounds, churnAndCut(1, upgrades), pods("systemd", "TestNoneReady"), command(repair), afterCut))},
		{name: "power-cut-full-disk", on: debian13, do: steps(node("systemd"), pods("systemd", "TestRun"), command(fill), churnAndCut(0),
			command(look), command(empty), afterCut, pods("systemd", "TestRun"), pods("systemd", "TestRemoveAll"))},
	}
}

var smoke = steps(node("systemd"), pods("systemd", "TestRun"), kill, pods("systemd", "TestStillRun|TestExitsAfterAKill|TestRemoveAll"),
	reconfigure("cgroupfs"), pods("cgroupfs", "TestRun"), cut, pods("cgroupfs", "TestNoneReady|TestRemoveAll"))

// life is the whole life of a node with podfsm. Pods of containerd's own handler run through all of
// it.
func life(driver string) step {
	return steps(stock(driver), pods(driver, "TestRunStock"),
		install(driver), pods(driver, "TestStillRun|TestRun|TestTmpfsVolumes"),
		kill, pods(driver, "TestStillRun"),
		command("systemctl restart containerd"), pods(driver, "TestStillRun"),
		command("systemctl stop containerd; systemctl start containerd"), pods(driver, "TestStillRun"),
		command(upgrade), pods(driver, "TestStillRun|TestExitsAfterAKill"),
		command(refuseRemoval), command(drain), command(purge), pods(driver, "TestStockStillRuns|TestRemoveAll"))
}

// The upgrade and the removal of podfsm, as in docs/howto.
const (
	upgrade       = "dpkg --install /lab/upgrade/*.deb; systemctl restart containerd; podfsm --version | grep 0.0.1-lab"
	refuseRemoval = "if apt-get purge --yes podfsm; then exit 1; fi; podfsm ps"
	drain         = "podfsm drain --force"
	purge         = `apt-get purge --yes podfsm
systemctl restart containerd
systemctl show --property ExecStart containerd | grep -q path=/usr/local/bin/containerd
[ -z "$(ls -d {/var/lib,/run}/containerd/*podfsm* 2>/dev/null | grep -v snapshotter)" ]`
)

// again runs pods, restarts the machine, and runs pods after that.
func again(start step) step {
	return steps(node("systemd"), pods("systemd", "TestRun"), start, afterCut, pods("systemd", "TestRun"), pods("systemd", "TestRemoveAll"))
}

// afterCut checks what must be true after every start of the machine, whatever was running when the
// power was cut.
var afterCut = pods("systemd", "TestNoneReady|TestRemoveAll")

const (
	// upgrades installs the package repeatedly. After a power cut, dpkg has to be continued, or the
	// package has to be installed again if dpkg was unpacking it.
	upgrades = "while dpkg --install /lab/upgrade/*.deb && systemctl restart containerd; do dpkg --install /lab/package/*.deb; systemctl restart containerd; done"
	repair   = "dpkg --configure --pending || true; dpkg --audit; dpkg --install /lab/upgrade/*.deb; systemctl restart containerd"
	// look is what an operator learns of a node with a full disk, whether containerd serves or not.
	look = `systemctl is-active containerd || true
podfsm ps --all || [ $? = 3 ]
found=$(podfsm doctor) || [ $? = 2 ]
echo "$found"
grep -q '^fail *disk' <<<"$found"`
	// fill fills the root filesystem completely, including the blocks reserved for root.
	fill = "fallocate --length $(($(stat --file-system --format '%f * %S' /))) /filler || true; cat /dev/zero >>/filler || true"
	// empty frees space, as an operator does when containerd doesn't start.
	empty = "rm /filler; systemctl reset-failed containerd; systemctl restart containerd"
)

// v1 makes systemd 257 mount the hierarchies of cgroup v1.
const v1 = "SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1 systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=1"

// everywhere selects the integration tests that run on the machines.
var everywhere = []string{
	"TestContainersLikeStock", "TestUserNSPod", "TestUserNSPodsAreApart", "TestFailureOfEachStep", "TestRestart", "TestNetworks",
	"TestUserModes", "TestUserModesOverRestart", "TestIsolation", "TestLeaks", "TestDrainWhilePodsCome", "TestStatsLikeStock", "TestPodKinds",
	"TestPauseKilled", "TestShimKilled", "TestAnswersLikeStock", "TestKillMatrix", "TestCgroupParentsLikeStock",
}

// step is a part of a scenario.
type step func(ctx context.Context, m *machine, log io.Writer) error

func steps(all ...step) step {
	return func(ctx context.Context, m *machine, log io.Writer) error {
		for _, do := range all {
			if err := do(ctx, m, log); err != nil {
				return err
			}
		}
		return nil
	}
}

func repeat(rounds int, all ...step) step {
	return func(ctx context.Context, m *machine, log io.Writer) error {
		for round := range rounds {
			progress("    round %d of %d", round+1, rounds)
			if err := steps(all...)(ctx, m, log); err != nil {
				return fmt.Errorf("round %d: %w", round+1, err)
			}
		}
		return nil
	}
}

// environment returns the environment of the tests on a machine.
func environment(driver string) string {
	return fmt.Sprintf("export HOME=/root TMPDIR=/var/tmp PODFSM_PREBUILT=/lab PODFSM_PATIENCE=10 PODFSM_CGROUPS=%s\n", driver)
}

// integrationTests runs tests of ./integration.
func integrationTests(pattern, driver string) step {
	return command("aa-enabled\n" + environment(driver) + "cd /lab/integration\n" +
		"/lab/.build/bin/integration.test -test.v -test.timeout 100m -test.run '^(" + pattern + ")$'")
}

// conformance runs critest against stock and podfsm, with two specs at a time on each side, which
// is the limit of two slow processors.
var conformance = command(environment("systemd") + "cd /lab\n.build/bin/conformance -parallel 2")

// clusterTests runs the tests of ./integration/cluster that match.
func clusterTests(driver, pattern string) step {
	return command(environment(driver) + "/lab/.build/kubernetes/cluster.test -test.v -test.timeout 110m -test.run '" + pattern + "'")
}

// pods runs tests of ./node.
func pods(driver, pattern string) step {
	return command(environment(driver) + "/lab/.build/bin/node.test -test.v -test.timeout 20m -test.run '^(" + pattern + ")$'")
}

func command(script string) step {
	return func(ctx context.Context, m *machine, log io.Writer) error { return m.run(ctx, log, script) }
}

//go:embed stock.sh
var stockScript string

//go:embed deploy.sh
var deployScript string

//go:embed install.sh
var installScript string

func stock(driver string) step   { return command("set -- " + driver + "\n" + stockScript) }
func install(driver string) step { return command("set -- " + driver + "\n" + installScript) }
func node(driver string) step    { return steps(stock(driver), install(driver)) }

// reconfigure switches all handlers to the other cgroup driver.
func reconfigure(driver string) step {
	return command(fmt.Sprintf("sed -i 's/SystemdCgroup = .*/SystemdCgroup = %t/' /etc/containerd/config.toml /etc/containerd/conf.d/*.toml\n"+
		"systemctl restart containerd", driver == "systemd"))
}

// kill kills the daemon, and waits until systemd has started another.
var kill = command(`before=$(systemctl show --property MainPID containerd)
systemctl kill --signal KILL --kill-whom main containerd
until [ "$(systemctl show --property MainPID containerd)" != "$before" ] && systemctl --quiet is-active containerd; do sleep 1; done`)

func boot(ctx context.Context, m *machine, _ io.Writer) error     { return m.boot(ctx) }
func shutDown(ctx context.Context, m *machine, _ io.Writer) error { return m.shutDown(ctx) }

// cut cuts the power and boots again.
func cut(ctx context.Context, m *machine, _ io.Writer) error {
	progress("    power cut")
	m.cut()
	return m.boot(ctx)
}

func reboot(ctx context.Context, m *machine, _ io.Writer) error {
	begun := time.Now()
	if err := m.shutDown(ctx); err != nil {
		return err
	}
	progress("    shut down in %.0f s", time.Since(begun).Seconds())
	return m.boot(ctx)
}

// churnPatience bounds the wait for the first pods of a churn: an upgrade restarts containerd at
// the same time, and the machines are slow.
const churnPatience = 5 * time.Minute

// churnAndCut cuts the power while pods are started and removed, after a number of them have run,
// and while scripts run.
func churnAndCut(atLeast int64, scripts ...string) step {
	return func(ctx context.Context, m *machine, log io.Writer) error {
		churn := &churned{out: log, missing: atLeast, enough: make(chan struct{})}
		all := []func() error{func() error { return pods("systemd", "TestChurnUntilPowerCut")(ctx, m, churn) }}
		for _, script := range scripts {
			all = append(all, func() error { return m.run(ctx, log, script) })
		}
		ended := make(chan error, len(all))
		for _, do := range all {
			go func() { ended <- do() }()
		}
		begun, moment := time.Now(), 10*time.Second+rand.N(30*time.Second)
		if err := churn.until(ended, moment); err != nil {
			return err // the churn and the scripts end with the machine, after a look at it
		}
		m.cut() // ends the churn and the scripts
		for range all {
			<-ended
		}
		progress("    power cut after %.0f s of churn, with %d pods", time.Since(begun).Seconds(), churn.pods)
		return m.boot(ctx)
	}
}

// until waits until enough pods have run and some more time, unless the churn ends before.
func (c *churned) until(ended <-chan error, moment time.Duration) error {
	if c.missing > 0 {
		select {
		case err := <-ended:
			return errors.Join(errors.New("the churn has ended"), err)
		case <-c.enough:
		case <-time.After(churnPatience):
			return errors.New("the churn has run too few pods")
		}
	}
	select {
	case err := <-ended:
		return errors.Join(errors.New("the churn has ended"), err)
	case <-time.After(moment):
		return nil
	}
}

// churned counts the pods of TestChurnUntilPowerCut in its output.
type churned struct {
	out     io.Writer
	missing int64         // how many pods have to run
	enough  chan struct{} // closed when they have run
	pods    int64         // read it only after the end of the churn
}

func (c *churned) Write(p []byte) (int, error) {
	before := c.pods
	c.pods += int64(bytes.Count(p, []byte("churn: runs")))
	if before < c.missing && c.pods >= c.missing {
		close(c.enough)
	}
	return c.out.Write(p)
}
