package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	server "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/plugins"
	containerd "github.com/containerd/containerd/v2/version"
	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v3"
	"golang.org/x/sync/errgroup"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/states"
)

const (
	drainWait = 10 * time.Minute
	// drainPoll is between two looks at what is left.
	drainPoll = time.Second
	// endTimeout bounds the stop and the removal of one sandbox. The daemon's own
	// deadlines, which say more, are shorter.
	endTimeout = 5 * time.Minute
	// endsAtOnce is how many sandboxes are ended at the same time.
	endsAtOnce = 8
)

func drainCommand() *cli.Command {
	return &cli.Command{
		Name:  "drain",
		Usage: "take no new pods and wait until there are none, for going back to a containerd without podfsm",
		Description: "From the start of the drain the daemon refuses new pods of podfsm's handlers, also after a restart, until --cancel.\n" +
			"Pods that there are run on until the kubelet ends them (kubectl drain), or until --force does.\n" +
			"The exit status is 0 when no sandbox is left, 2 when there are some or can be, and 1 when that could not be found out.\n" +
			"Where the daemon listens and has its directories is read from --config, unless flags say so.",
		HideHelpCommand: true,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "force", Usage: "stop and remove all sandboxes, whose containers are killed without grace"},
			&cli.BoolFlag{Name: "check", Usage: "change nothing and don't wait: say whether the node can do without podfsm"},
			&cli.BoolFlag{Name: "cancel", Usage: "take new pods again"},
			&cli.DurationFlag{Name: "wait", Usage: "how long to wait until no sandbox is left", Value: drainWait},
			configFlag("containerd's configuration"),
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := noArguments(cmd); err != nil {
				return err
			}
			force, check, cancel := cmd.Bool("force"), cmd.Bool("check"), cmd.Bool("cancel")
			if force && check || force && cancel || check && cancel {
				return errors.New("drain takes one of --force, --check and --cancel")
			}
			config, err := findDaemon(ctx, cmd)
			if err != nil {
				return err
			}
			if check {
				return checkDrained(ctx, cmd, config)
			}
			if _, err := call(ctx, cmd, podfsmv1.SandboxesClient.Drain, &podfsmv1.DrainRequest{Cancel: cancel}); err != nil {
				return explainDrain(err)
			}
			w := cmd.Root().Writer
			if cancel {
				_, err := fmt.Fprintln(w, "podfsm takes new pods again")
				return err
			}
			fmt.Fprintln(w, "podfsm takes no new pods from now on, also after a restart of containerd (podfsm drain --cancel ends that)")
			return awaitDrained(ctx, cmd, force)
		},
	}
}

// findDaemon sets the flags that say where the daemon is, as far as they aren't
// set, to what its configuration says, and returns that. Without one, they are
// the defaults.
func findDaemon(ctx context.Context, cmd *cli.Command) (*server.Config, error) {
	path := cmd.String("config")
	config := &server.Config{Version: containerd.ConfigVersion, Root: cmd.String("root"), State: cmd.String("state")}
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) && !cmd.IsSet("config") {
		return config, nil
	}
	if err := server.LoadConfig(ctx, path, config); err != nil {
		return nil, fmt.Errorf("failed to read containerd's configuration %s, to find the daemon (or give --address, --root and --state, and --config=%s): %w",
			path, os.DevNull, err)
	}
	says := map[string]string{"root": config.Root, "state": config.State}
	if socket, ok := config.Plugins[string(plugins.ServerPlugin)+".grpc"].(map[string]any); ok {
		says["address"], _ = socket["address"].(string)
	}
	for flag, value := range says {
		if value != "" && !cmd.IsSet(flag) {
			if err := cmd.Set(flag, value); err != nil {
				return nil, err
			}
		}
	}
	return config, nil
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

// undrainedError says that the node can't do without podfsm yet.
type undrainedError struct{ error }

// awaitDrained waits until no sandbox is left, and tells of each that goes: since
// the daemon has begun the drain, none comes. With force it ends each of them,
// and again when its state has changed since.
func awaitDrained(ctx context.Context, cmd *cli.Command, force bool) error {
	w := cmd.Root().Writer
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
		switch {
		case response.GetDrainingSince() == nil:
			return undrainedError{errors.New("somebody has ended the drain: podfsm takes new pods")}
		case len(left) == 0:
			_, err := fmt.Fprintln(w, "drained: podfsm has no sandboxes")
			return err
		case first:
			fmt.Fprintf(w, "waiting for %s:\n", count(left))
			if err := writeList(w, left, false, false, time.Now()); err != nil {
				return err
			}
		case time.Now().After(deadline):
			return stillThere(w, left)
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

// tellGone has a line for each sandbox that is not there any more.
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

// stillThere lists what a drain has not come to the end of.
func stillThere(w io.Writer, left []*podfsmv1.Sandbox) error {
	fmt.Fprintln(w, "left:")
	if err := writeList(w, left, false, true, time.Now()); err != nil {
		return err
	}
	return undrainedError{fmt.Errorf("%s left, and new pods are still refused; let the kubelet end them (kubectl drain) or use --force%s", count(left), wayOut(left))}
}

// wayOut is how those of the sandboxes come to an end that have a pending
// cleanup, as the end of an error's text.
func wayOut(sandboxes []*podfsmv1.Sandbox) string {
	pending := 0
	for _, s := range sandboxes {
		if len(s.GetDebts()) > 0 {
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

// endAll stops and removes the sandboxes that are due, as the kubelet would, and
// tells of those that can't be.
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
	_ = ends.Wait() // their errors are among the failures
	close(failures)
	for failure := range failures {
		fmt.Fprintf(cmd.Root().ErrWriter, "podfsm: %s\n", failure)
	}
}

// due says whether a sandbox has to be ended that wasn't tried, or has come to
// another state since: its cleanup was written off meanwhile. tried has the
// state that the last try led to, "" until that is seen.
func due(s *podfsmv1.Sandbox, tried map[string]string) bool {
	before, again := tried[s.GetId()]
	switch state := s.GetState(); {
	case !again:
		tried[s.GetId()] = ""
		return true
	case state == string(states.Stopping) || state == string(states.Removing) || state == string(states.RollingBack):
		return false // it is on its way
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
		return fmt.Errorf("it is in containerd's namespace %q, so it isn't the kubelet's; who made it has to end it", s.GetContainerdNamespace())
	}
	d, err := connect(cmd)
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

// checkDrained is an error unless a containerd without podfsm can take over:
// podfsm has no sandboxes, and will have none, and nothing else needs it.
func checkDrained(ctx context.Context, cmd *cli.Command, config *server.Config) error {
	response, err := call(ctx, cmd, podfsmv1.SandboxesClient.List, &podfsmv1.ListRequest{})
	takesPods := err == nil && response.GetDrainingSince() == nil
	if errors.As(err, new(downError)) || errors.As(err, new(stockError)) || errors.As(err, new(unavailableError)) {
		response, err = onRecord(ctx, cmd, err)
	}
	if err != nil {
		return err
	}
	w := cmd.Root().Writer
	if left := response.GetSandboxes(); len(left) > 0 {
		var table bytes.Buffer
		if err := writeList(&table, left, false, false, time.Now()); err != nil {
			return err
		}
		fmt.Fprint(w, table.String())
		return undrainedError{fmt.Errorf("podfsm has %s, which a containerd without podfsm can't stop; "+
			"have them ended while containerd-podfsm runs: podfsm drain, or podfsm drain --force%s", count(left), wayOut(left))}
	}
	if takesPods {
		return undrainedError{errors.New("podfsm has no sandboxes, but takes new pods; end that first: podfsm drain")}
	}
	if err := checkStock(config); err != nil {
		return err
	}
	_, err = fmt.Fprintln(w, "drained: podfsm has no sandboxes")
	return err
}

// onRecord is what the ledger has on record while no daemon with podfsm runs, or
// one that runs no pods, which why says. Without a ledger podfsm has never run,
// and has nothing, unless it runs elsewhere.
func onRecord(ctx context.Context, cmd *cli.Command, why error) (*podfsmv1.ListResponse, error) {
	root, state := cmd.String("root"), cmd.String("state")
	saved, err := journal.OpenReadOnly(filepath.Join(root, ledgerDir), filepath.Join(state, ledgerDir))
	switch {
	case errdefs.IsNotFound(err) && errors.As(why, new(unavailableError)):
		return &podfsmv1.ListResponse{}, nil
	case errdefs.IsNotFound(err):
		return &podfsmv1.ListResponse{}, runsElsewhere(ctx, why)
	case err != nil:
		return nil, explainLedger(downError{why}, root, state, err)
	case saved.InUse:
		return nil, fmt.Errorf("%w\nbut %s", why, inUse(root))
	case len(saved.Damage) > 0:
		return nil, fmt.Errorf("%w\nand podfsm's ledger is damaged, sandboxes may be missing: %s: %s; run containerd-podfsm, which puts that right",
			why, saved.Damage[0].File, saved.Damage[0].Reason)
	}
	views, err := records.Replay(saved.Sandboxes)
	if err != nil {
		return nil, err
	}
	return records.List(views), nil
}

// runsElsewhere is an error when the daemon that is installed beside this program
// runs, although why says that it isn't where its configuration says.
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
	for _, pid := range pids {
		// An upgrade leaves a daemon whose file is deleted. A process that has ended is none.
		if exe, err := host.Readlink(ctx, pid, "exe"); err == nil && strings.TrimSuffix(exe, " (deleted)") == beside {
			return fmt.Errorf("%w\nbut %s runs (process %d): name its socket by --address or in CONTAINERD_ADDRESS", why, beside, pid)
		}
	}
	return nil
}
