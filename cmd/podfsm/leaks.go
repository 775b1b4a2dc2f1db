package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/urfave/cli/v3"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

// leaksTimeout is the default timeout of leaks: the daemon examines the whole node twice, and waits
// for killed processes.
const leaksTimeout = 3 * time.Minute

func leaksCommand() *cli.Command {
	return &cli.Command{
		Name:      "leaks",
		Usage:     "list or remove leaks: what is on the node and belongs to no known sandbox",
		ArgsUsage: "[SANDBOX...]",
		Description: "With SANDBOX, an id or at least its first 13 characters, podfsm lists or removes only the leaks of that sandbox.\n" +
			"The exit status is 0 if no leak is left, and 2 if one is.\n" +
			"podfsm waits for 3 minutes, or for --timeout: the daemon looks at the whole node, twice.\n" +
			"While the daemon is down, podfsm finds only network namespaces, CNI plugins, and what belongs to their sandboxes.",
		HideHelpCommand: true,
		Flags: []cli.Flag{
			outputFlag("json"),
			&cli.BoolFlag{Name: "fix", Usage: "have the daemon remove the leaks"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			fix := cmd.Bool("fix")
			response, err := findLeaks(ctx, cmd, fix)
			if err != nil {
				return err
			}
			if cmd.String("output") == "json" {
				err = writeJSON(cmd.Root().Writer, response)
			} else {
				err = writeLeaks(cmd.Root().Writer, response, fix)
			}
			if err != nil {
				return err
			}
			return remaining(response)
		},
	}
}

// findLeaks asks the daemon, or looks for leaks itself while the daemon is down.
func findLeaks(ctx context.Context, cmd *cli.Command, fix bool) (*podfsmv1.LeaksResponse, error) {
	if !cmd.IsSet("timeout") {
		if err := cmd.Set("timeout", leaksTimeout.String()); err != nil {
			return nil, err
		}
	}
	response, err := call(ctx, cmd, podfsmv1.SandboxesClient.Leaks, &podfsmv1.LeaksRequest{Fix: fix, Sandboxes: cmd.Args().Slice()})
	if fix && errors.As(err, new(downError)) {
		return nil, fmt.Errorf("%w\nonly the daemon knows all owners and can remove leaks: start it and try again", err)
	}
	return orLedger(ctx, cmd, response, err, func(l *savedLedger) (*podfsmv1.LeaksResponse, error) {
		if l.InUse { // what the daemon makes now would look like a leak
			return nil, fmt.Errorf("%w\nbut %s", err, inUse(locate(ctx, cmd).root))
		}
		complain(cmd.Root().ErrWriter, "only network namespaces, CNI plugins and what belongs to their sandboxes were examined; "+
			"start the daemon and run podfsm leaks again for the rest")
		return l.leaks(ctx, cmd.Args().Slice())
	})
}

// writeLeaks writes a line for each leak, with the outcome of a fix.
func writeLeaks(w io.Writer, r *podfsmv1.LeaksResponse, fix bool) error {
	if len(r.GetLeaks())+len(r.GetDamagedLedgerFiles()) == 0 {
		_, err := fmt.Fprintln(w, "No leaks found")
		return err
	}
	header := []string{"SANDBOX", "KIND", "NAME"}
	if fix {
		header = append(header, "RESULT")
	}
	var b bytes.Buffer
	t := newTable(&b, header...)
	for _, leak := range r.GetLeaks() {
		cells := []string{shorten(leak.GetSandboxId()), leak.GetKind(), leak.GetName()}
		if fix {
			cells = append(cells, outcome(leak))
		}
		t.row(cells...)
	}
	t.flush()
	if files := r.GetDamagedLedgerFiles(); len(files) > 0 {
		b.WriteString("\nDamaged files of the ledger, kept to be looked at\n")
		for _, file := range files {
			fmt.Fprintln(&b, printable(file))
		}
	}
	_, err := w.Write(b.Bytes())
	return err
}

func outcome(leak *podfsmv1.Leak) string {
	if leak.GetRemoved() {
		return "removed"
	}
	return "not removed: " + leak.GetError()
}

// leftError says that there are leaks, while podfsm leaks itself succeeded.
type leftError struct{ left, removed int }

func (e leftError) Error() string {
	things := "things have leaked"
	if e.left == 1 {
		things = "thing has leaked"
	}
	if e.removed > 0 {
		return fmt.Sprintf("%d %s and could not be removed; %d removed", e.left, things, e.removed)
	}
	return fmt.Sprintf("%d %s", e.left, things)
}

// remaining returns an error if a leak is left.
func remaining(r *podfsmv1.LeaksResponse) error {
	var e leftError
	for _, leak := range r.GetLeaks() {
		if leak.GetRemoved() {
			e.removed++
		} else {
			e.left++
		}
	}
	if e.left == 0 {
		return nil
	}
	return e
}
