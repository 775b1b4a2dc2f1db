package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/show"
)

func watchCommand() *cli.Command {
	return &cli.Command{
		Name:          "watch",
		Usage:         "list the sandboxes, or one pod's, and then follow their transitions",
		ArgsUsage:     "[REF]",
		ShellComplete: completeRef,
		Description: `REF is a pod's namespace/name or name, a sandbox id or its beginning. Lines with - in the column AFTER are
the list. If the daemon stops, podfsm waits for the next one, and lists what has changed meanwhile.

podfsm watch                     all sandboxes
podfsm watch default/web         those of one pod, and of its later attempts
podfsm watch -o json | jq .      a line of JSON each; lines of the list have no event`,
		HideHelpCommand: true,
		Flags:           []cli.Flag{outputFlag("json")},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			ref, err := optionalRef(cmd)
			if err != nil {
				return err
			}
			return watch(ctx, cmd, ref)
		},
	}
}

func watch(ctx context.Context, cmd *cli.Command, ref string) error {
	w := cmd.Root().Writer
	write := func(t *podfsmv1.SandboxTransition) error {
		switch {
		case !concerns(t, ref):
			return nil
		case cmd.String("output") == "json":
			return writeJSONLine(w, t)
		default:
			return writeTransition(w, t, time.Local)
		}
	}
	listed := func(all []*podfsmv1.Sandbox, again bool) error {
		if !again && cmd.String("output") != "json" {
			if err := writeWatchHeader(w); err != nil {
				return err
			}
		}
		for _, s := range all {
			if err := write(standing(s)); err != nil {
				return err
			}
		}
		return nil
	}
	return follow(ctx, cmd, follower{listed: listed, moved: func(_ context.Context, t *podfsmv1.SandboxTransition) error { return write(t) }})
}

// standing returns a listed sandbox as a transition without an event.
func standing(s *podfsmv1.Sandbox) *podfsmv1.SandboxTransition {
	return &podfsmv1.SandboxTransition{
		SandboxId: s.GetId(), ContainerdNamespace: s.GetContainerdNamespace(),
		PodName: s.GetPodName(), PodNamespace: s.GetPodNamespace(), PodUid: s.GetPodUid(), Attempt: s.GetAttempt(),
		Transition: &podfsmv1.Transition{Seq: s.GetSeq(), At: s.GetSince(), To: s.GetState(), Error: s.GetError(), TraceId: s.GetTraceId()},
	}
}

// follower receives sandboxes and their transitions.
type follower struct {
	all bool // list ended sandboxes, too
	// listed is called with all sandboxes first, and after a restart of the daemon with those that
	// have changed.
	listed func(all []*podfsmv1.Sandbox, again bool) error
	moved  func(context.Context, *podfsmv1.SandboxTransition) error
}

// reconnectPause is the time between two tries to reach a daemon that has gone.
const reconnectPause = 500 * time.Millisecond

// goneError says that the followed daemon has gone.
type goneError struct{ error }

// follow reports all sandboxes, and then each transition, until ctx ends. If the daemon goes,
// follow waits for the next one.
func follow(ctx context.Context, cmd *cli.Command, f follower) error {
	seen := map[string]uint64{} // the last reported transition by sandbox
	for again, waiting := false, false; ; {
		err := followOnce(ctx, cmd, f, seen, again, func() { again, waiting = true, false })
		switch {
		case ctx.Err() != nil:
			return nil
		case !errors.As(err, new(goneError)) && !(again && exitStatus(err) == exitNoDaemon):
			return err
		case !waiting:
			complain(cmd.Root().ErrWriter, "%v; waiting for the next one", err)
			waiting = true
		}
		select {
		case <-time.After(reconnectPause):
		case <-ctx.Done():
			return nil
		}
	}
}

// followOnce follows one daemon. It calls began after it has listed the sandboxes.
func followOnce(ctx context.Context, cmd *cli.Command, f follower, seen map[string]uint64, again bool, began func()) error {
	d, err := connect(ctx, cmd)
	if err != nil {
		return err
	}
	defer d.conn.Close()
	following, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := d.follow(following, cancel)
	if err != nil {
		return err
	}
	// The stream was opened before the list, so no transition is missed in between.
	response, err := call(ctx, cmd, podfsmv1.SandboxesClient.List, &podfsmv1.ListRequest{Ended: f.all || again})
	if err != nil {
		return err
	}
	complain(cmd.Root().ErrWriter, "following the daemon at %s", d.address)
	if err := f.listed(changed(response.GetSandboxes(), seen, !again), again); err != nil {
		return err
	}
	began()
	for {
		t, err := stream.Recv()
		if err != nil {
			return d.gone(err)
		}
		if last, ok := seen[t.GetSandboxId()]; ok && t.GetTransition().GetSeq() <= last {
			continue // the list included it
		}
		remember(seen, t.GetSandboxId(), t.GetTransition().GetTo(), t.GetTransition().GetSeq())
		if err := f.moved(ctx, t); err != nil {
			return err
		}
	}
}

// changed returns the sandboxes that have changed since they were reported. Ended sandboxes are
// among them in the first list, and later if they were reported before.
func changed(sandboxes []*podfsmv1.Sandbox, seen map[string]uint64, first bool) []*podfsmv1.Sandbox {
	return slices.DeleteFunc(sandboxes, func(s *podfsmv1.Sandbox) bool {
		last, known := seen[s.GetId()]
		if known && s.GetSeq() == last {
			return true
		}
		remember(seen, s.GetId(), s.GetState(), s.GetSeq())
		return isEnded(s.GetState()) && !known && !first
	})
}

// remember keeps the last report of a sandbox until the sandbox has ended.
func remember(seen map[string]uint64, id, state string, seq uint64) {
	if isEnded(state) {
		delete(seen, id)
		return
	}
	seen[id] = seq
}

// follow opens the stream. It waits for the daemon as long as for any answer, and then cancels ctx.
func (d *daemon) follow(ctx context.Context, cancel func()) (grpc.ServerStreamingClient[podfsmv1.SandboxTransition], error) {
	slow := time.AfterFunc(d.timeout, cancel)
	stream, err := podfsmv1.NewSandboxesClient(d.conn).Watch(ctx, &podfsmv1.WatchRequest{})
	if err == nil {
		var header map[string][]string
		if header, err = stream.Header(); err == nil && header == nil {
			_, err = stream.Recv() // the stream ended without a header: Recv has the error
		}
	}
	if !slow.Stop() {
		return nil, timeoutError{fmt.Errorf("no answer from the daemon at %s within %s", d.address, d.timeout)}
	}
	if err != nil {
		return nil, d.explain(err)
	}
	return stream, nil
}

// gone explains why the stream has ended.
func (d *daemon) gone(err error) error {
	if code := status.Code(err); errors.Is(err, io.EOF) || code == codes.Unavailable || code == codes.Canceled {
		return goneError{fmt.Errorf("the daemon at %s has gone", d.address)}
	}
	return d.explain(err)
}

// concerns reports whether a transition belongs to the sandbox or pod of a reference.
func concerns(t *podfsmv1.SandboxTransition, ref string) bool {
	if ref == "" {
		return true
	}
	_, err := show.Match(ref, []*podfsmv1.Sandbox{{Id: t.GetSandboxId(), PodName: t.GetPodName(), PodNamespace: t.GetPodNamespace()}})
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
	pod, after := absent, absent
	if t.GetPodName() != "" {
		pod = t.GetPodNamespace() + "/" + t.GetPodName()
	}
	if tr.GetEvent() != "" {
		after = span(tr.GetAfter().AsDuration())
	}
	line := fmt.Sprintf(watchFormat, clock(tr.GetAt(), zone), shortID, printable(shorten(t.GetSandboxId())),
		strconv.FormatUint(uint64(t.GetAttempt()), 10), printable(pod), after, stateWidth, printable(tr.GetTo()), printable(tr.GetError()))
	_, err := fmt.Fprintln(w, strings.TrimRight(line, " \n"))
	return err
}

// clock returns the time of day in milliseconds.
func clock(ts *timestamppb.Timestamp, zone *time.Location) string {
	return ts.AsTime().In(zone).Format("15:04:05.000")
}
