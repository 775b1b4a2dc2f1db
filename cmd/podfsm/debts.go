package main

import (
	"bytes"
	"context"
	"io"
	"slices"
	"time"

	"github.com/urfave/cli/v3"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

func debtsCommand() *cli.Command {
	return &cli.Command{
		Name:            "debts",
		Usage:           "list what is owed: undos that have failed and will be tried again",
		HideHelpCommand: true,
		Flags:           []cli.Flag{outputFlag("json")},
		Action: func(ctx context.Context, cmd *cli.Command) error {
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
		},
	}
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
