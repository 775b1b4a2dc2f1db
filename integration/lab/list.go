package main

import (
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
		{name: "smoke", smoke: true, do: steps(install("systemd"), pods("systemd", "TestRun"), kill, pods("systemd", "TestStillRun|TestExits|TestRemoveAll"),
			reconfigure("cgroupfs"), pods("cgroupfs", "TestRun"), cut, pods("cgroupfs", "TestNoneReady|TestRemoveAll"))},
		{name: "tests-cgroupfs", do: integrationTests(tests, "cgroupfs")},
		{name: "tests-systemd", do: integrationTests(tests, "systemd")},
		{name: "restarts-systemd", do: restarts("systemd")},
		{name: "restarts-cgroupfs", do: restarts("cgroupfs")},
		{name: "restarts-systemd-v1", options: v1, do: restarts("systemd")},
		{name: "restarts-cgroupfs-v1", options: v1, do: restarts("cgroupfs")},
		// The kubelet's driver is systemd, and nobody has told the runtime handlers.
		{name: "slices-without-systemd", do: steps(install("cgroupfs"), pods("slices", "TestRun|TestStillRun"), kill, pods("slices", "TestStillRun|TestRemoveAll"))},
		{name: "reboot", do: steps(install("systemd"), pods("systemd", "TestRun"), reboot, pods("systemd", "TestNoneReady|TestRemoveAll"),
			pods("systemd", "TestRun"), pods("systemd", "TestRemoveAll"))},
		{name: "power-cut", do: steps(install("systemd"), pods("systemd", "TestRun"), cut, pods("systemd", "TestNoneReady|TestRemoveAll"),
			pods("systemd", "TestRun"), pods("systemd", "TestRemoveAll"))},
		{name: "power-cuts", do: steps(install("systemd"), repeat(o.rounds, churnAndCut("systemd"), pods("systemd", "TestNoneReady|TestRemoveAll")))},
	}
}

// v1 has systemd 257 mount the hierarchies of cgroup v1, as before it was told not to.
const v1 = "SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1 systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=1"

// everywhere are the integration tests that run on the machines.
var everywhere = []string{
	"TestContainersLikeStock", "TestUserNSPod", "TestUserNSPodsAreApart", "TestFailureOfEachStep", "TestRestart", "TestNetworks",
	"TestUserModes", "TestUserModesOverRestart", "TestIsolation", "TestLeaks", "TestDrainWhilePodsCome", "TestStatsLikeStock", "TestPodKinds",
	"TestPauseKilled", "TestShimKilled", "TestAnswersLikeStock",
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

func restarts(driver string) step {
	return steps(install(driver), pods(driver, "TestRun|TestStillRun"), kill, pods(driver, "TestStillRun"),
		command("systemctl restart containerd"), pods(driver, "TestStillRun"),
		command("systemctl stop containerd; systemctl start containerd"), pods(driver, "TestStillRun|TestExits|TestRemoveAll"))
}

// environment is that of the tests on a machine.
func environment(driver string) string {
	return fmt.Sprintf("export HOME=/root TMPDIR=/var/tmp CI=1 PODFSM_PREBUILT=/lab PODFSM_PATIENCE=10 PODFSM_CGROUPS=%s\n", driver)
}

// integrationTests runs tests of ./integration.
func integrationTests(pattern, driver string) step {
	return command(environment(driver) + "cd /lab/integration\n" +
		"/lab/.build/bin/integration.test -test.v -test.timeout 100m -test.run '^(" + pattern + ")$'")
}

// pods runs tests of ./node.
func pods(driver, pattern string) step {
	return command(environment(driver) + "/lab/.build/bin/node.test -test.v -test.timeout 20m -test.run '^(" + pattern + ")$'")
}

func command(script string) step {
	return func(ctx context.Context, m *machine, log io.Writer) error { return m.run(ctx, log, script) }
}

//go:embed install.sh
var installScript string

func install(driver string) step { return command("set -- " + driver + "\n" + installScript) }

// reconfigure has all handlers use the other driver.
func reconfigure(driver string) step {
	return command(fmt.Sprintf("sed -i 's/SystemdCgroup = .*/SystemdCgroup = %t/' /etc/containerd/config.toml /etc/containerd/conf.d/*.toml\n"+
		"systemctl restart containerd", driver == "systemd"))
}

// kill kills the daemon, and returns when systemd has started another.
var kill = command(`before=$(systemctl show --property MainPID containerd)
systemctl kill --signal KILL --kill-whom main containerd
until [ "$(systemctl show --property MainPID containerd)" != "$before" ] && systemctl --quiet is-active containerd; do sleep 1; done`)

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

// churnAndCut cuts the power while pods come and go.
func churnAndCut(driver string) step {
	return func(ctx context.Context, m *machine, log io.Writer) error {
		churn, stop := context.WithCancel(ctx)
		defer stop()
		ended := make(chan error, 1)
		go func() { ended <- pods(driver, "TestChurn")(churn, m, log) }()
		after := 20*time.Second + rand.N(30*time.Second)
		select {
		case err := <-ended:
			return errors.Join(errors.New("the churn has ended"), err)
		case <-time.After(after):
		}
		m.cut()
		<-ended
		progress("    power cut after %.0f s of churn", after.Seconds())
		return m.boot(ctx)
	}
}
