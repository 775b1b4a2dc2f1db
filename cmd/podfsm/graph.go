package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/urfave/cli/v3"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/states"
)

func graphCommand() *cli.Command {
	return &cli.Command{
		Name:          "graph",
		Usage:         "draw the states that sandboxes can have, or the path that one sandbox took",
		ArgsUsage:     "[REF]",
		ShellComplete: completeRef,
		Description: `Without REF it needs no daemon. ` + refDescription + `

podfsm graph default/web                              the path that the pod's newest sandbox has taken
podfsm graph -o dot default/web | dot -Tsvg > web.svg the same in the picture of all states, by Graphviz
podfsm graph -o mermaid                               the picture, for a page that renders Mermaid`,
		HideHelpCommand: true,
		Flags:           []cli.Flag{outputFlag("dot", "mermaid")},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			ref, err := optionalRef(cmd)
			if err != nil {
				return err
			}
			r := &podfsmv1.InspectResponse{}
			if ref != "" {
				if r, err = inspect(ctx, cmd, ref); err != nil {
					return err
				}
			}
			w := cmd.Root().Writer
			switch output := cmd.String("output"); {
			case output == "dot":
				_, err := io.WriteString(w, records.Table().DOT(passages(r.GetTransitions())...))
				return err
			case output == "mermaid":
				_, err := io.WriteString(w, records.Table().Mermaid(passages(r.GetTransitions())...))
				return err
			case ref != "":
				return writePath(w, r)
			default:
				return writeStates(w, records.Table())
			}
		},
	}
}

// passages returns transitions in the form of the diagrams.
func passages(transitions []*podfsmv1.Transition) []states.Passage {
	var path []states.Passage
	for _, t := range transitions {
		path = append(path, states.Passage{
			Transition: states.Transition{From: states.State(t.GetFrom()), Event: states.EventOnRecord(t.GetEvent()), To: states.State(t.GetTo())},
			Seq:        t.GetSeq(),
		})
	}
	return path
}

// writeStates writes a line for each legal transition.
func writeStates(w io.Writer, table *states.Table) error {
	var b bytes.Buffer
	t := newTable(&b, "STATE", "EVENT", "NEXT STATE")
	for _, transition := range table.Transitions() {
		t.row(string(transition.From), string(transition.Event), string(transition.To))
	}
	t.flush()
	_, err := w.Write(b.Bytes())
	return err
}

// writePath writes the states of a sandbox, one below the other.
func writePath(w io.Writer, r *podfsmv1.InspectResponse) error {
	var b bytes.Buffer
	s := r.GetSandbox()
	fmt.Fprintf(&b, "%s\n", printable(strings.TrimSpace(fmt.Sprintf("sandbox %s %s", s.GetId(), podOf(s)))))
	for i, t := range r.GetTransitions() {
		if i == 0 {
			fmt.Fprintf(&b, "\n%s\n", printable(t.GetFrom()))
		}
		fmt.Fprintf(&b, "  | %s %s, after %s\n", strconv.FormatUint(t.GetSeq(), 10), printable(t.GetEvent()), span(t.GetAfter().AsDuration()))
		if t.GetError() != "" {
			fmt.Fprintf(&b, "  | %s\n", printable(t.GetError()))
		}
		fmt.Fprintf(&b, "%s\n", printable(t.GetTo()))
	}
	_, err := w.Write(b.Bytes())
	return err
}
