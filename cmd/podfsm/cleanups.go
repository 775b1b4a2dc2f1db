package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

func cleanupsCommand() *cli.Command {
	return &cli.Command{
		Name:  "cleanups",
		Usage: "list, retry or write off pending cleanups: undos that failed and are retried",
		Description: "podfsm retries a pending cleanup every few minutes until it succeeds or is written off, by an operator or after a reboot.\n" +
			"If its cause is gone, retry doesn't wait for that. If its cause can't be removed, write-off gives it up.\n\n" + listedStatus,
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
		Description:     listedStatus,
		HideHelpCommand: true,
		Flags:           []cli.Flag{outputFlag("json")},
		Action:          listCleanups,
	}
}

// listedStatus explains the exit status of the list.
const listedStatus = "The exit status of the list is 0 if no cleanup is pending, and 2 if one is."

func listCleanups(ctx context.Context, cmd *cli.Command) error {
	if err := noArguments(cmd); err != nil {
		return err
	}
	response, err := list(ctx, cmd, false)
	if err != nil {
		return err
	}
	response.Sandboxes = slices.DeleteFunc(response.Sandboxes, func(s *podfsmv1.Sandbox) bool { return len(s.GetPendingCleanups()) == 0 })
	if cmd.String("output") == "json" {
		err = writeJSON(cmd.Root().Writer, response)
	} else {
		err = writeCleanups(cmd.Root().Writer, response.GetSandboxes(), time.Now())
	}
	if count := len(response.GetSandboxes()); err == nil && count > 0 {
		return pendingError{errors.New("sandboxes with a pending cleanup: " + strconv.Itoa(count))}
	}
	return err
}

// cleanupDescription is the common part of the descriptions of retry and write-off.
const cleanupDescription = `REF must match one sandbox with a pending cleanup. The exit status is 0 if the cleanup is completed, 2 if a part of
it is or may be pending, and another one if the daemon did nothing. The command waits for 5 minutes, or for --timeout. After
that, the daemon continues, and the exit status is 2.`

func retryCommand() *cli.Command {
	return &cli.Command{
		Name:            "retry",
		Usage:           "try a pending cleanup now",
		ArgsUsage:       "REF",
		ShellComplete:   completeRef,
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
		Name:          "write-off",
		Usage:         "give up a pending cleanup, or the DEL of one CNI plugin",
		ArgsUsage:     "REF",
		ShellComplete: completeRef,
		Description: "REF is a pod's namespace/name, a sandbox id or at least its first 13 characters.\n" +
			"With --plugin, podfsm gives up the DEL of that plugin without another try, if its last DEL failed, and tries the rest\n" +
			"of the cleanup again. With --all, podfsm tries the whole cleanup once more, and gives up each undo that failed before\n" +
			"and fails again.\n" +
			"What an undo did not remove stays on the node, such as an address of an IPAM plugin or an iptables rule. podfsm leaks\n" +
			"shows what podfsm can find of it.\n" +
			"podfsm never frees what a process or a mount may still use: it never gives up pause, the shim, a CNI plugin that\n" +
			"still runs, or the snapshot. A reboot ends what uses them.\n\n" + cleanupDescription,
		HideHelpCommand: true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "plugin", Usage: "give up the DEL of the CNI plugin of this `TYPE`, or NETWORK/TYPE"},
			&cli.BoolFlag{Name: "all", Usage: "give up all that fails"},
			&cli.StringFlag{Name: "reason", Usage: "why, for the log, the timeline and the event; required", Required: true},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			ref, err := oneRef(cmd)
			if err != nil {
				return err
			}
			if cmd.Bool("all") == (cmd.String("plugin") != "") || cmd.Bool("all") && cmd.IsSet("plugin") {
				return usagef("write-off takes either --plugin, with the plugin's type, or --all")
			}
			if strings.TrimSpace(cmd.String("reason")) == "" {
				return usagef("write-off takes a reason: --reason says why the cleanup can't succeed")
			}
			return changeCleanup(ctx, cmd, podfsmv1.SandboxesClient.WriteOffCleanup,
				&podfsmv1.WriteOffCleanupRequest{Ref: ref, Plugin: cmd.String("plugin"), All: cmd.Bool("all"), Reason: cmd.String("reason")})
		},
	}
}

// pendingError says that a cleanup is still pending, or may be.
type pendingError struct{ error }

// changeCleanup asks the daemon to retry or write off a pending cleanup, and says what is still
// pending.
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
	if err := writeCleanups(w, []*podfsmv1.Sandbox{s}, time.Now()); err != nil {
		return err
	}
	return pendingError{fmt.Errorf("the cleanup of %s is still pending", nameOf(s))}
}

// writeCleanups writes a line for each pending cleanup.
func writeCleanups(w io.Writer, sandboxes []*podfsmv1.Sandbox, now time.Time) error {
	var b bytes.Buffer
	t := newTable(&b, "SANDBOX", "POD", "STATE", "STEP", "SINCE", "TRIES", "NEXT TRY", "ERROR")
	for _, s := range sandboxes {
		for _, c := range s.GetPendingCleanups() {
			t.row(shorten(s.GetId()), podOf(s), stateOf(s), c.GetStep(), age(c.GetSince(), now),
				tries(c), nextTry(c, now), c.GetError())
		}
	}
	t.flush()
	_, err := w.Write(b.Bytes())
	return err
}
