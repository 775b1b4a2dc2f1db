package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

func cleanupsCommand() *cli.Command {
	return &cli.Command{
		Name:    "cleanups",
		Aliases: []string{"debts"},
		Usage:   "list, retry or write off pending cleanups: undos that have failed and will be tried again",
		Description: "A pending cleanup is tried again every few minutes until it succeeds. If its cause is gone, retry doesn't wait for that.\n" +
			"If its cause can't be removed, write-off gives it up.",
		HideHelpCommand: true,
		Flags:           []cli.Flag{outputFlag("json")},
		Commands:        []*cli.Command{listCleanupsCommand(), retryCommand(), writeOffCommand()},
		Action:          listCleanups,
	}
}

func listCleanupsCommand() *cli.Command {
	return &cli.Command{
		Name:            "list",
		Usage:           "list pending cleanups; the default",
		HideHelpCommand: true,
		Flags:           []cli.Flag{outputFlag("json")},
		Action:          listCleanups,
	}
}

func listCleanups(ctx context.Context, cmd *cli.Command) error {
	if err := noArguments(cmd); err != nil {
		return err
	}
	response, err := list(ctx, cmd, false)
	if err != nil {
		return err
	}
	response.Sandboxes = slices.DeleteFunc(response.Sandboxes, func(s *podfsmv1.Sandbox) bool { return len(s.GetDebts()) == 0 })
	if cmd.String("output") == "json" {
		return writeJSON(cmd.Root().Writer, response)
	}
	return writeDebts(cmd.Root().Writer, response.GetSandboxes(), time.Now())
}

// cleanupDescription says what retry and write-off have in common.
const cleanupDescription = `REF has to fit one sandbox with a pending cleanup. The exit status is 0 when nothing of it is pending any more,
2 when something is or may be, and 1 when the daemon did nothing. The command waits for 5 minutes unless --timeout
says otherwise. After that, the daemon goes on with what it has begun, and the exit status is 2.`

func retryCommand() *cli.Command {
	return &cli.Command{
		Name:            "retry",
		Usage:           "try a pending cleanup now",
		ArgsUsage:       "REF",
		Description:     "REF is a pod's namespace/name or name, a sandbox id or its beginning.\n\n" + cleanupDescription,
		HideHelpCommand: true,
		Action: func(ctx context.Context, cmd *cli.Command) error {
			ref, err := oneRef(cmd)
			if err != nil {
				return err
			}
			return changeCleanup(ctx, cmd, podfsmv1.SandboxesClient.RetryCleanup, &podfsmv1.RetryCleanupRequest{Ref: ref})
		},
	}
}

func writeOffCommand() *cli.Command {
	return &cli.Command{
		Name:      "write-off",
		Usage:     "give up a pending cleanup, or the DEL of one CNI plugin",
		ArgsUsage: "REF",
		Description: "REF is a pod's namespace/name, a sandbox id or at least its first 13 characters.\n" +
			"With --plugin, the DEL of that plugin alone is given up, without another try, if the last one failed. The rest of the\n" +
			"cleanup is tried again. With --all, the cleanup is tried once more, and each undo that had failed before and fails\n" +
			"again is given up. What it would have taken back stays on the node, as an address of an IPAM plugin or a rule of\n" +
			"iptables. podfsm leaks shows what podfsm can find of that.\n" +
			"What a process or a mount may still use is never freed: pause, the shim, a CNI plugin that still runs and the\n" +
			"snapshot are never given up. A reboot ends what uses them.\n\n" + cleanupDescription,
		HideHelpCommand: true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "plugin", Usage: "give up the DEL of the CNI plugin of this `TYPE`, or NETWORK/TYPE"},
			&cli.BoolFlag{Name: "all", Usage: "give up all that fails"},
			&cli.StringFlag{Name: "reason", Usage: "why, for the log, the timeline and the event", Required: true},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			ref, err := oneRef(cmd)
			if err != nil {
				return err
			}
			if cmd.Bool("all") == (cmd.String("plugin") != "") || cmd.Bool("all") && cmd.IsSet("plugin") {
				return errors.New("write-off takes either --plugin, with the plugin's type, or --all")
			}
			if strings.TrimSpace(cmd.String("reason")) == "" {
				return errors.New("write-off takes a reason: --reason says why the cleanup can't succeed")
			}
			return changeCleanup(ctx, cmd, podfsmv1.SandboxesClient.WriteOffCleanup,
				&podfsmv1.WriteOffCleanupRequest{Ref: ref, Plugin: cmd.String("plugin"), All: cmd.Bool("all"), Reason: cmd.String("reason")})
		},
	}
}

// pendingError says that a cleanup is still pending, or may be.
type pendingError struct{ error }

// changeCleanup has the daemon do something about a pending cleanup, and says
// what is left of that.
func changeCleanup[Request any](ctx context.Context, cmd *cli.Command, m method[Request, *podfsmv1.CleanupResponse], request Request) error {
	if !cmd.IsSet("timeout") {
		if err := cmd.Set("timeout", endTimeout.String()); err != nil {
			return err
		}
	}
	response, err := call(ctx, cmd, m, request)
	if errors.As(err, new(downError)) {
		return fmt.Errorf("%w\nonly the daemon can do that: start containerd-podfsm and try again", err)
	}
	if errors.As(err, new(timeoutError)) {
		return pendingError{fmt.Errorf("%w\nit may still be trying: podfsm cleanups shows what is pending", err)}
	}
	if err != nil {
		return err
	}
	s, w := response.GetSandbox(), cmd.Root().Writer
	if response.GetError() == "" {
		_, err := fmt.Fprintf(w, "%s: the cleanup is completed\n", nameOf(s))
		return err
	}
	if err := writeDebts(w, []*podfsmv1.Sandbox{s}, time.Now()); err != nil {
		return err
	}
	return pendingError{fmt.Errorf("the cleanup of %s is still pending", nameOf(s))}
}

// writeDebts has a line for each step that is owed.
func writeDebts(w io.Writer, sandboxes []*podfsmv1.Sandbox, now time.Time) error {
	var b bytes.Buffer
	t := newTable(&b, "SANDBOX", "POD", "STATE", "STEP", "SINCE", "TRIES", "NEXT TRY", "ERROR")
	for _, s := range sandboxes {
		for _, d := range s.GetDebts() {
			t.row(shorten(s.GetId()), podOf(s), stateOf(s), d.GetStep(), age(d.GetSince(), now),
				tries(d), nextTry(d, now), d.GetError())
		}
	}
	t.flush()
	_, err := w.Write(b.Bytes())
	return err
}
