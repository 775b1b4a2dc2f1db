package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v3"
	"golang.org/x/sync/errgroup"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/show"
	"github.com/podfsm/podfsm/states"
)

const (
	drainWait = 10 * time.Minute
	// drainPoll is the time between two looks at the sandboxes that are left.
	drainPoll = time.Second
	// endTimeout bounds the stop and removal of one sandbox. The daemon's own deadlines are
	// shorter, and their errors say more.
	endTimeout = 5 * time.Minute
	// endsAtOnce is how many sandboxes are ended at a time.
	endsAtOnce = 8
)

func drainCommand() *cli.Command {
	return &cli.Command{
		Name:  "drain",
		Usage: "refuse new pods and wait until no sandbox is left, before the node runs a containerd without podfsm",
		Description: "From the start of the drain the daemon refuses new pods of podfsm's handlers, also after a restart, until --cancel.\n" +
			"Running pods stay until the kubelet ends them (kubectl drain), or until --force does.\n" +
			"The exit status is 0 if no sandbox is left, and 2 if one is or may be left.",
		HideHelpCommand: true,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "force", Usage: "stop and remove all sandboxes, whose containers are killed without grace"},
			&cli.BoolFlag{Name: "check", Usage: "change nothing and don't wait: say whether the node can do without podfsm"},
			&cli.BoolFlag{Name: "cancel", Usage: "take new pods again"},
			&cli.BoolFlag{Name: "dry-run", Usage: "change nothing and don't wait: list the pods that a drain would wait for, or end with --force"},
			outputFlag("json"),
			&cli.DurationFlag{Name: "wait", Usage: "how long to wait until no sandbox is left", Value: drainWait},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := noArguments(cmd); err != nil {
				return err
			}
			force, check, cancel, dry := cmd.Bool("force"), cmd.Bool("check"), cmd.Bool("cancel"), cmd.Bool("dry-run")
			if force && check || force && cancel || check && cancel {
				return usagef("drain takes one of --force, --check and --cancel")
			}
			if dry && (check || cancel) {
				return usagef("drain takes --dry-run alone or with --force")
			}
			p := locate(ctx, cmd)
			if p.unread != nil { // the default directories may hold the ledger of another daemon
				return p.unread
			}
			if check {
				return checkDrained(ctx, cmd, p)
			}
			if dry {
				return planDrain(ctx, cmd)
			}
			if _, err := call(ctx, cmd, podfsmv1.SandboxesClient.Drain, &podfsmv1.DrainRequest{Cancel: cancel}); err != nil {
				return explainDrain(err)
			}
			w := progress(cmd)
			if cancel {
				fmt.Fprintln(w, "podfsm takes new pods again")
				return writeDrained(cmd, &podfsmv1.DrainOutput{})
			}
			fmt.Fprintln(w, "podfsm takes no new pods from now on, also after a restart of containerd (podfsm drain --cancel ends that)")
			return awaitDrained(ctx, cmd, force)
		},
	}
}

func explainDrain(err error) error {
	switch {
	case errors.As(err, new(downError)):
		return fmt.Errorf("%w\nonly the daemon can stop pods: start containerd-podfsm and try again", err)
	case errors.As(err, new(stockError)):
		return fmt.Errorf("%w\nonly a containerd with podfsm can drain, and stop podfsm's pods: run containerd-podfsm and try again", err)
	case errors.As(err, new(unavailableError)):
		return fmt.Errorf("%w\npodfsm drain --check says whether there are sandboxes on record", err)
	}
	return err
}

// progress is where a drain reports its progress: nowhere if its output is for a program.
func progress(cmd *cli.Command) io.Writer {
	if cmd.String("output") == "json" {
		return io.Discard
	}
	return cmd.Root().Writer
}

// writeDrained writes the result of a drain for a program.
func writeDrained(cmd *cli.Command, out *podfsmv1.DrainOutput) error {
	if cmd.String("output") != "json" {
		return nil
	}
	return writeJSON(cmd.Root().Writer, out)
}

// planDrain lists the sandboxes that a drain would wait for, or end.
func planDrain(ctx context.Context, cmd *cli.Command) error {
	response, err := call(ctx, cmd, podfsmv1.SandboxesClient.List, &podfsmv1.ListRequest{})
	if err != nil {
		return explainDrain(err)
	}
	left, would := response.GetSandboxes(), "wait for"
	if cmd.Bool("force") {
		would = "stop and remove"
	}
	w := progress(cmd)
	if len(left) == 0 {
		fmt.Fprintln(w, "a drain would end at once: podfsm has no sandboxes")
	} else {
		fmt.Fprintf(w, "a drain would take no new pods and %s %s:\n", would, count(left))
		if err := writeList(w, left, false, time.Now()); err != nil {
			return err
		}
	}
	return writeDrained(cmd, &podfsmv1.DrainOutput{DrainingSince: response.GetDrainingSince(), Left: left})
}

// undrainedError says that the node still needs podfsm.
type undrainedError struct{ error }

// awaitDrained waits until no sandbox is left, and reports each sandbox that goes. No new sandbox
// comes, since the daemon has begun the drain. With force, it ends each sandbox, and again after
// its state has changed.
func awaitDrained(ctx context.Context, cmd *cli.Command, force bool) error {
	w := progress(cmd)
	deadline := time.Now().Add(cmd.Duration("wait"))
	var before []*podfsmv1.Sandbox
	tried := map[string]string{}
	for first := true; ; first = false {
		response, err := call(ctx, cmd, podfsmv1.SandboxesClient.List, &podfsmv1.ListRequest{})
		if err != nil {
			return explainDrain(err)
		}
		left := response.GetSandboxes()
		tellGone(w, before, left)
		out := &podfsmv1.DrainOutput{DrainingSince: response.GetDrainingSince(), Left: left}
		switch {
		case response.GetDrainingSince() == nil:
			return errors.Join(writeDrained(cmd, out), undrainedError{errors.New("the drain was canceled: podfsm takes new pods")})
		case len(left) == 0:
			fmt.Fprintln(w, "drained: podfsm has no sandboxes")
			out.Drained = true
			return writeDrained(cmd, out)
		case first:
			fmt.Fprintf(w, "waiting for %s:\n", count(left))
			if err := writeList(w, left, false, time.Now()); err != nil {
				return err
			}
		case time.Now().After(deadline):
			return errors.Join(writeDrained(cmd, out), stillThere(w, left))
		}
		if force {
			endAll(ctx, cmd, left, tried)
		}
		before = left
		select {
		case <-time.After(drainPoll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// tellGone writes a line for each sandbox that has gone.
func tellGone(w io.Writer, before, now []*podfsmv1.Sandbox) {
	there := map[string]bool{}
	for _, s := range now {
		there[s.GetId()] = true
	}
	for _, s := range before {
		if !there[s.GetId()] {
			fmt.Fprintf(w, "gone: %s\n", nameOf(s))
		}
	}
}

// stillThere lists the sandboxes that a drain has left, and returns the error.
func stillThere(w io.Writer, left []*podfsmv1.Sandbox) error {
	fmt.Fprintln(w, "left:")
	if err := writeList(w, left, true, time.Now()); err != nil {
		return err
	}
	return undrainedError{fmt.Errorf("%s left, and new pods are still refused; let the kubelet end them (kubectl drain) or use --force%s", count(left), wayOut(left))}
}

// wayOut returns the remedy for sandboxes with a pending cleanup, as the end of an error text.
func wayOut(sandboxes []*podfsmv1.Sandbox) string {
	pending := 0
	for _, s := range sandboxes {
		if len(s.GetPendingCleanups()) > 0 {
			pending++
		}
	}
	if pending == 0 {
		return ""
	}
	return fmt.Sprintf("; %d have a pending cleanup: remove its cause and run `podfsm cleanups retry`, or give it up by `podfsm cleanups write-off`", pending)
}

func count(sandboxes []*podfsmv1.Sandbox) string {
	if len(sandboxes) == 1 {
		return "1 sandbox"
	}
	return fmt.Sprintf("%d sandboxes", len(sandboxes))
}

func nameOf(s *podfsmv1.Sandbox) string {
	return printable(shorten(s.GetId()) + " " + podOf(s))
}

// endAll stops and removes the sandboxes that are due, as the kubelet would, and reports those that
// fail.
func endAll(ctx context.Context, cmd *cli.Command, sandboxes []*podfsmv1.Sandbox, tried map[string]string) {
	var ends errgroup.Group
	ends.SetLimit(endsAtOnce)
	failures := make(chan string, len(sandboxes))
	for _, s := range sandboxes {
		if !due(s, tried) {
			continue
		}
		ends.Go(func() error {
			if err := end(ctx, cmd, s); err != nil {
				failures <- fmt.Sprintf("failed to end %s: %s", nameOf(s), printable(err.Error()))
			}
			return nil
		})
	}
	_ = ends.Wait() // the errors are in failures
	close(failures)
	for failure := range failures {
		complain(cmd.Root().ErrWriter, "%s", failure)
	}
}

// due reports whether a sandbox has to be ended: it was not tried yet, or its state has changed
// since the last try, for example by a write-off. tried has the state in which the last try left
// each sandbox, and "" until that state is seen.
func due(s *podfsmv1.Sandbox, tried map[string]string) bool {
	before, again := tried[s.GetId()]
	switch state := s.GetState(); {
	case !again:
		tried[s.GetId()] = ""
		return true
	case state == string(states.Stopping) || state == string(states.Removing) || state == string(states.RollingBack):
		return false // under way
	case before == "":
		tried[s.GetId()] = state
		return false
	case before != state:
		tried[s.GetId()] = ""
		return true
	default:
		return false
	}
}

func end(ctx context.Context, cmd *cli.Command, s *podfsmv1.Sandbox) error {
	if s.GetContainerdNamespace() != records.Namespace {
		return fmt.Errorf("the sandbox belongs to containerd's namespace %q, not to the kubelet; end it with the client that made it", s.GetContainerdNamespace())
	}
	d, err := connect(ctx, cmd)
	if err != nil {
		return err
	}
	defer d.conn.Close()
	d.timeout = endTimeout
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	client := runtime.NewRuntimeServiceClient(d.conn)
	_, err = client.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: s.GetId()})
	if err == nil {
		_, err = client.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: s.GetId()})
	}
	if err != nil {
		return d.explain(err)
	}
	return nil
}

// checkDrained returns an error unless a containerd without podfsm can take over: podfsm has no
// sandboxes and accepts none, and the configuration doesn't need podfsm.
func checkDrained(ctx context.Context, cmd *cli.Command, p place) error {
	response, err := call(ctx, cmd, podfsmv1.SandboxesClient.List, &podfsmv1.ListRequest{})
	takesPods := err == nil && response.GetDrainingSince() == nil
	if errors.As(err, new(downError)) || errors.As(err, new(stockError)) || errors.As(err, new(unavailableError)) {
		response, err = onRecord(ctx, p, err)
	}
	if err != nil {
		return err
	}
	w := progress(cmd)
	out := &podfsmv1.DrainOutput{DrainingSince: response.GetDrainingSince(), Left: response.GetSandboxes()}
	if left := response.GetSandboxes(); len(left) > 0 {
		if err := errors.Join(writeList(w, left, false, time.Now()), writeDrained(cmd, out)); err != nil {
			return err
		}
		return undrainedError{fmt.Errorf("podfsm has %s, which a containerd without podfsm can't stop; "+
			"have them ended while containerd-podfsm runs: podfsm drain, or podfsm drain --force%s", count(left), wayOut(left))}
	}
	if takesPods {
		if err := writeDrained(cmd, out); err != nil {
			return err
		}
		return undrainedError{errors.New("podfsm has no sandboxes, but takes new pods; end that first: podfsm drain")}
	}
	if err := checkStock(p.config); err != nil {
		return err
	}
	fmt.Fprintln(w, "drained: podfsm has no sandboxes")
	out.Drained = true
	return writeDrained(cmd, out)
}

// onRecord returns the sandboxes in the ledger. why is the error of the daemon, which has no
// podfsm, can't serve running pods, or is down. Without a ledger podfsm has never run here, and has no
// sandboxes, unless it runs with other directories.
func onRecord(ctx context.Context, p place, why error) (*podfsmv1.ListResponse, error) {
	saved, err := ledger.OpenReadOnly(p.rootLedger(), p.stateLedger())
	switch {
	case errdefs.IsNotFound(err) && errors.As(why, new(unavailableError)):
		return &podfsmv1.ListResponse{}, nil
	case errdefs.IsNotFound(err):
		return &podfsmv1.ListResponse{}, runsElsewhere(ctx, why)
	case err != nil:
		return nil, explainLedger(downError{why}, p, err)
	case saved.InUse:
		return nil, fmt.Errorf("%w\nbut %s", why, inUse(p.root))
	case len(saved.Damage) > 0:
		return nil, fmt.Errorf("%w\nand podfsm's ledger is damaged, sandboxes may be missing: %s: %s; run containerd-podfsm, which repairs the ledger",
			why, saved.Damage[0].File, saved.Damage[0].Reason)
	}
	views, err := records.Replay(saved.Sandboxes)
	if err != nil {
		return nil, err
	}
	return show.List(views), nil
}

// runsElsewhere returns an error if the daemon beside this program runs, although the daemon of the
// configuration does not (why).
func runsElsewhere(ctx context.Context, why error) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	beside := filepath.Join(filepath.Dir(self), "containerd-podfsm")
	pids, err := host.Pids()
	if err != nil {
		return err
	}
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	for _, pid := range pids {
		// A container chooses the paths of its programs.
		if ns, err := host.Readlink(ctx, pid, "ns/mnt"); err != nil || ns != own {
			continue
		}
		// After an upgrade, the file of a running daemon is deleted. A process that has ended has
		// no executable.
		if exe, err := host.Readlink(ctx, pid, "exe"); err == nil && strings.TrimSuffix(exe, " (deleted)") == beside {
			return fmt.Errorf("%w\nbut %s runs (process %d): name its socket by --address or in CONTAINERD_ADDRESS", why, beside, pid)
		}
	}
	return nil
}
