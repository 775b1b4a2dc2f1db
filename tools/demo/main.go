// Command demo runs pods on its own containerd-podfsm, with real runc and CNI plugins, and shows
// what happens. It leaves nothing behind.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/integration/traces"
)

// spanTimeout bounds the wait for the daemon's spans.
const spanTimeout = 10 * time.Second

func main() {
	handler := flag.String("handler", harness.PodfsmHandler, "the runtime handler of the pods")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := run(ctx, *handler); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, handler string) (err error) {
	if err := harness.Sweep(ctx); err != nil {
		return err
	}
	title("A containerd with podfsm")
	n, err := harness.NewNode(ctx, harness.Config{Traces: true})
	if err != nil {
		return err
	}
	defer func() {
		title("The end")
		err = errors.Join(err, n.Close(context.WithoutCancel(ctx)))
		if err == nil {
			show("containerd is stopped, %s is gone", n.Dir())
		}
	}()
	d := demo{Node: n, handler: handler}
	show("process %d, socket %s", n.Pid(), n.Socket())
	before, err := n.WarmUp(ctx, handler)
	if err != nil {
		return err
	}
	show("a first pod has come and gone, so that the bridge is there")

	if err := d.userNSPod(ctx); err != nil {
		return err
	}
	if err := d.clean(ctx, before); err != nil {
		return err
	}
	if err := d.failingPod(ctx); err != nil {
		return err
	}
	return d.clean(ctx, before)
}

type demo struct {
	*harness.Node
	handler string
}

func (d demo) userNSPod(ctx context.Context) error {
	title("A pod in its own user namespace, run over CRI")
	run, traceID := traces.NewContext(ctx)
	pod, err := d.RunPod(run, d.handler, d.PodConfig("web"))
	if err != nil {
		return err
	}
	c, err := pod.StartContainer(ctx, "busybox")
	if err != nil {
		return err
	}
	ip, err := pod.IP(ctx)
	if err != nil {
		return err
	}
	show("pod %s, IP %s", pod.ID, ip)
	for _, command := range []string{
		"cat /proc/self/uid_map",
		"ip -o -4 address show eth0",
		"ping -c 1 -W 5 " + harness.Gateway,
	} {
		out, err := c.Exec(ctx, strings.Fields(command)...)
		if err != nil {
			return err
		}
		show("$ %s\n%s", command, strings.TrimRight(out, "\n"))
	}
	if err := d.namespaces(ctx, pod); err != nil {
		return err
	}
	if err := d.history(ctx, pod.ID, traceID, "podfsm.sandbox.run"); err != nil {
		return err
	}
	return pod.StopAndRemove(ctx)
}

// namespaces shows where the network namespace of the pod is pinned, and that the user namespace of
// the pod owns it.
func (d demo) namespaces(ctx context.Context, pod *harness.Pod) error {
	resp, err := d.Sandboxes().Inspect(ctx, &podfsmv1.InspectRequest{Ref: pod.ID})
	if err != nil {
		return err
	}
	pinned := resp.GetSandbox().GetNetnsPath()
	ns, err := os.Open(pinned)
	if err != nil {
		return err
	}
	defer ns.Close()
	owner, err := unix.IoctlRetInt(int(ns.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		return fmt.Errorf("failed to get the owner of %q: %w", pinned, err)
	}
	defer unix.Close(owner)

	title("Its namespaces")
	show("network, pinned at %s\n  %s", pinned, identity("net", fmt.Sprintf("/proc/self/fd/%d", ns.Fd())))
	show("its owner\n  %s", identity("user", fmt.Sprintf("/proc/self/fd/%d", owner)))
	show("user namespace of pause, process %d\n  %s", resp.GetSandbox().GetPid(), identity("user", fmt.Sprintf("/proc/%d/ns/user", resp.GetSandbox().GetPid())))
	show("user namespace of the host\n  %s", identity("user", "/proc/self/ns/user"))
	return nil
}

// identity names a namespace as the links in /proc/PID/ns do.
func identity(kind, path string) string {
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%s:[%d]", kind, stat.Ino)
}

func (d demo) failingPod(ctx context.Context) error {
	title("A pod whose CNI chain ends in a plugin that is missing")
	if err := d.SetChain(ctx, append(d.DefaultChain(), harness.Plugin{"type": "missing"})...); err != nil {
		return err
	}
	run, traceID := traces.NewContext(ctx)
	if _, err := d.RunPod(run, d.handler, d.PodConfig("broken")); err == nil {
		return errors.New("the pod runs, but should have failed")
	} else {
		show("RunPodSandbox: %v", err)
	}
	return d.history(ctx, "default/broken", traceID, "podfsm.sandbox.run", "podfsm.sandbox.rollback")
}

// history shows the timeline of a sandbox by podfsm's CLI, and podfsm's spans.
func (d demo) history(ctx context.Context, ref, traceID string, spans ...string) error {
	title("Its timeline")
	cli := exec.CommandContext(ctx, d.CLI(), "--address", d.Socket(), "timeline", ref)
	cli.Stdout, cli.Stderr = os.Stdout, os.Stderr
	if err := cli.Run(); err != nil {
		return fmt.Errorf("failed to run %q: %w", cli, err)
	}

	title("Its trace")
	ctx, cancel := context.WithTimeout(ctx, spanTimeout)
	defer cancel()
	arrived, err := d.Traces.WaitFor(ctx, traceID, traces.Finished(spans...))
	if err != nil {
		return err
	}
	fmt.Print(traces.Render(ofPodfsm(arrived), essential))
	return nil
}

func (d demo) clean(ctx context.Context, before harness.Census) error {
	title("What is left of it")
	if err := d.WaitClean(ctx, before); err != nil {
		return err
	}
	show("nothing: mounts, links, addresses, rules, snapshots, containers, leases,\nshims, cgroups, files and ledger entries are as before")
	return nil
}

// ofPodfsm returns the spans without those of containerd itself.
func ofPodfsm(spans []traces.Span) []traces.Span {
	var of []traces.Span
	for _, s := range spans {
		if strings.HasPrefix(s.Scope, "github.com/podfsm/") {
			of = append(of, s)
		}
	}
	return of
}

// essential removes all attributes except for the name of a CNI plugin.
func essential(key, value string) (string, bool) {
	return value, key == "status" || key == "podfsm.cni.plugin"
}

func title(text string) { fmt.Printf("\n== %s\n", text) }

func show(format string, args ...any) { fmt.Printf(format+"\n", args...) }
