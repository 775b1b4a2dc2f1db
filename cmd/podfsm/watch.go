package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/records"
)

func watchCommand() *cli.Command {
	return &cli.Command{
		Name:      "watch",
		Usage:     "follow the transitions of all sandboxes, or of one pod's",
		ArgsUsage: "[REF]",
		Description: `REF is a pod's namespace/name or name, a sandbox id or its beginning. It ends when the daemon goes.

podfsm watch                     all sandboxes
podfsm watch default/web         those of one pod, also of attempts that are yet to come
podfsm watch -o json | jq .      a line of JSON for each transition`,
		HideHelpCommand: true,
		Flags:           []cli.Flag{outputFlag("json")},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if cmd.NArg() > 1 {
				return errors.New("watch takes one argument at most: a pod's namespace/name or name, a sandbox id or its beginning")
			}
			return watch(ctx, cmd, cmd.Args().First())
		},
	}
}

func watch(ctx context.Context, cmd *cli.Command, ref string) error {
	d, err := connect(cmd)
	if err != nil {
		return err
	}
	defer d.conn.Close()
	following, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := d.follow(following, cancel)
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.Root().ErrWriter, "podfsm: following the daemon at %s\n", d.address)
	write := writeTransition
	if cmd.String("output") == "json" {
		write = writeTransitionJSON
	} else if err := writeWatchHeader(cmd.Root().Writer); err != nil {
		return err
	}
	for {
		t, err := stream.Recv()
		if err != nil {
			return d.gone(ctx, err)
		}
		if !concerns(t, ref) {
			continue
		}
		if err := write(cmd.Root().Writer, t, time.Local); err != nil {
			return err
		}
	}
}

// follow begins to watch. It waits for the daemon as long as for any answer, and
// then cancels ctx.
func (d *daemon) follow(ctx context.Context, cancel func()) (grpc.ServerStreamingClient[podfsmv1.SandboxTransition], error) {
	slow := time.AfterFunc(d.timeout, cancel)
	stream, err := podfsmv1.NewSandboxesClient(d.conn).Watch(ctx, &podfsmv1.WatchRequest{})
	if err == nil {
		var header map[string][]string
		if header, err = stream.Header(); err == nil && header == nil {
			_, err = stream.Recv() // the call has ended without a header, and this says why
		}
	}
	if !slow.Stop() {
		return nil, fmt.Errorf("no answer from the daemon at %s within %s", d.address, d.timeout)
	}
	if err != nil {
		return nil, d.explain(err)
	}
	return stream, nil
}

// gone explains the end of what was being followed; nil when it was asked for.
func (d *daemon) gone(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return nil
	case errors.Is(err, io.EOF), status.Code(err) == codes.Unavailable, status.Code(err) == codes.Canceled:
		return fmt.Errorf("the daemon at %s has gone", d.address)
	}
	return d.explain(err)
}

// concerns says whether a transition is of what a reference names.
func concerns(t *podfsmv1.SandboxTransition, ref string) bool {
	if ref == "" {
		return true
	}
	_, err := records.Match(ref, []*podfsmv1.Sandbox{{Id: t.GetSandboxId(), PodName: t.GetPodName(), PodNamespace: t.GetPodNamespace()}})
	return err == nil
}

const watchFormat = "%-12s  %-*s  %-7s  %-30s  %-7s  %-*s  %s\n"

func writeWatchHeader(w io.Writer) error {
	_, err := fmt.Fprintf(w, watchFormat, "TIME", shortID, "SANDBOX", "ATTEMPT", "POD", "AFTER", stateWidth, "STATE", "ERROR")
	return err
}

// stateWidth is the width of the longest state.
const stateWidth = len("SnapshotRemapped")

func writeTransition(w io.Writer, t *podfsmv1.SandboxTransition, zone *time.Location) error {
	tr := t.GetTransition()
	pod := absent
	if t.GetPodName() != "" {
		pod = t.GetPodNamespace() + "/" + t.GetPodName()
	}
	line := fmt.Sprintf(watchFormat, tr.GetAt().AsTime().In(zone).Format("15:04:05.000"), shortID, printable(shorten(t.GetSandboxId())),
		strconv.FormatUint(uint64(t.GetAttempt()), 10), printable(pod), span(tr.GetAfter().AsDuration()), stateWidth, printable(tr.GetTo()), printable(tr.GetError()))
	_, err := fmt.Fprintln(w, strings.TrimRight(line, " \n"))
	return err
}

// writeTransitionJSON writes one line.
func writeTransitionJSON(w io.Writer, t *podfsmv1.SandboxTransition, _ *time.Location) error {
	varied, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(t)
	if err != nil {
		return err
	}
	line, err := json.Marshal(json.RawMessage(varied)) // protojson varies its white space on purpose
	if err != nil {
		return err
	}
	_, err = w.Write(append(line, '\n'))
	return err
}
