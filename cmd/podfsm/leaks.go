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

// leaksTimeout is how long leaks waits when nothing else is said: the daemon
// looks at the whole node, twice, and a process may take its time to end.
const leaksTimeout = 3 * time.Minute

func leaksCommand() *cli.Command {
	return &cli.Command{
		Name:  "leaks",
		Usage: "list what stands on the host and belongs to no sandbox that is known",
		Description: "The exit status is 0 when there is nothing (left), 2 when there is, and 1 when that could not be found out.\n" +
			"It waits for 3 minutes unless --timeout says otherwise: the daemon looks at the whole node, twice.\n" +
			"While the daemon is down, only network namespaces and CNI plugins can be told from other pods' things, and what belongs to them.",
		HideHelpCommand: true,
		Flags: []cli.Flag{
			outputFlag("json"),
			&cli.BoolFlag{Name: "fix", Usage: "have the daemon remove it"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := noArguments(cmd); err != nil {
				return err
			}
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

// findLeaks asks the daemon, or looks itself while that is down.
func findLeaks(ctx context.Context, cmd *cli.Command, fix bool) (*podfsmv1.LeaksResponse, error) {
	if !cmd.IsSet("timeout") {
		if err := cmd.Set("timeout", leaksTimeout.String()); err != nil {
			return nil, err
		}
	}
	response, err := call(ctx, cmd, podfsmv1.SandboxesClient.Leaks, &podfsmv1.LeaksRequest{Fix: fix})
	if fix && errors.As(err, new(downError)) {
		return nil, fmt.Errorf("%w\nonly the daemon knows what belongs to whom, and removes leaks: start it and try again", err)
	}
	return orLedger(cmd, response, err, func(l *ledger) (*podfsmv1.LeaksResponse, error) {
		if l.InUse { // what it makes meanwhile would be taken for a leak
			return nil, fmt.Errorf("%w\nbut %s", err, inUse(cmd.String("root")))
		}
		return l.leaks(ctx)
	})
}

// writeLeaks has a line for each leak, with what became of it after a fix.
func writeLeaks(w io.Writer, r *podfsmv1.LeaksResponse, fix bool) error {
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

// leftError says that there are leaks: no failure, but not what one hopes for.
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

// remaining is an error unless nothing has leaked, or all of it was removed.
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
