package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v3"
	"google.golang.org/protobuf/types/known/timestamppb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

func describeCommand() *cli.Command {
	return &cli.Command{
		Name:          "describe",
		Usage:         "show the steps, transitions and pending cleanups of one sandbox",
		ArgsUsage:     "REF",
		ShellComplete: completeRef,
		Description:   refDescription,
		// Without this, a pod named "help" could not be described.
		HideHelpCommand: true,
		Action: func(ctx context.Context, cmd *cli.Command) error {
			return lookUp(ctx, cmd, func(r *podfsmv1.InspectResponse) error {
				return writeDescription(cmd.Root().Writer, r, time.Now())
			})
		},
	}
}

func inspectCommand() *cli.Command {
	return &cli.Command{
		Name:            "inspect",
		Usage:           "print what describe shows, as JSON",
		ArgsUsage:       "REF",
		ShellComplete:   completeRef,
		Description:     refDescription,
		HideHelpCommand: true,
		Action: func(ctx context.Context, cmd *cli.Command) error {
			return lookUp(ctx, cmd, func(r *podfsmv1.InspectResponse) error {
				return writeJSON(cmd.Root().Writer, r)
			})
		},
	}
}

// lookUp shows the sandbox that the only argument of the command names.
func lookUp(ctx context.Context, cmd *cli.Command, show func(*podfsmv1.InspectResponse) error) error {
	ref, err := oneRef(cmd)
	if err != nil {
		return err
	}
	response, err := inspect(ctx, cmd, ref)
	if err != nil {
		return err
	}
	return show(response)
}

func writeDescription(w io.Writer, r *podfsmv1.InspectResponse, now time.Time) error {
	var b bytes.Buffer
	addIdentity(&b, r.GetSandbox(), now)
	addCleanups(&b, r.GetSandbox().GetPendingCleanups(), now)
	addWrittenOff(&b, writtenOff(r.GetTries(), now), widest)
	addSteps(&b, r.GetSteps(), now)
	addTransitions(&b, r, now)
	addCNIResult(&b, r.GetCniResult())
	_, err := w.Write(b.Bytes())
	return err
}

func addIdentity(b *bytes.Buffer, s *podfsmv1.Sandbox, now time.Time) {
	t := newTable(b)
	t.row("Sandbox:", s.GetId())
	t.row("Namespace:", s.GetContainerdNamespace())
	if pod := podOf(s); pod != "" {
		t.row("Pod:", fmt.Sprintf("%s, uid %s, attempt %d", pod, s.GetPodUid(), s.GetAttempt()))
	}
	t.row("Handler:", s.GetRuntimeHandler())
	t.row("State:", fmt.Sprintf("%s for %s, since %s", stateOf(s), age(s.GetSince(), now), instant(s.GetSince(), now)))
	if s.GetFailedStep() != "" {
		t.row("Failed:", s.GetFailedStep())
	}
	t.row("Step:", s.GetStep())
	t.row("Error:", s.GetError())
	t.row("Created:", fmt.Sprintf("%s ago, at %s", age(s.GetCreatedAt(), now), instant(s.GetCreatedAt(), now)))
	t.row("IPs:", strings.Join(addresses(s), ", "))
	t.row("Pid:", pidOf(s))
	t.row("NetNS:", netnsOf(s))
	t.row("UIDs:", mappings(s.GetUserns().GetUids()))
	t.row("GIDs:", mappings(s.GetUserns().GetGids()))
	t.row("Trace:", s.GetTraceId())
	t.flush()
}

func addresses(s *podfsmv1.Sandbox) []string {
	if s.GetIp() == "" {
		return nil
	}
	return append([]string{s.GetIp()}, s.GetAdditionalIps()...)
}

func netnsOf(s *podfsmv1.Sandbox) string {
	if s.GetNetnsPath() == "" {
		return ""
	}
	return fmt.Sprintf("%s, inode %d", s.GetNetnsPath(), s.GetNetnsInode())
}

func addCleanups(b *bytes.Buffer, cleanups []*podfsmv1.PendingCleanup, now time.Time) {
	if len(cleanups) == 0 {
		return
	}
	b.WriteString("\nPending cleanups\n")
	t := newTable(b, "STEP", "SINCE", "TRIES", "NEXT TRY", "ERROR")
	for _, c := range cleanups {
		t.row(c.GetStep(), age(c.GetSince(), now), tries(c), nextTry(c, now), c.GetError())
	}
	t.flush()
}

// tries is empty for a step that waits for other steps, and for tries of an earlier daemon.
func tries(c *podfsmv1.PendingCleanup) string {
	if c.GetTries() == 0 {
		return ""
	}
	return strconv.FormatUint(uint64(c.GetTries()), 10)
}

func nextTry(c *podfsmv1.PendingCleanup, now time.Time) string {
	if c.GetNextTry() == nil {
		return ""
	}
	wait := c.GetNextTry().AsTime().Sub(now)
	if wait <= 0 {
		return "now"
	}
	return "in " + span(wait)
}

func addSteps(b *bytes.Buffer, steps []*podfsmv1.Step, now time.Time) {
	if len(steps) == 0 {
		return
	}
	b.WriteString("\nSteps\n")
	t := newTable(b, "STEP", "STATUS", "START", "TOOK", "TIMELINE", "DETAIL")
	whole := intervalOf(steps, now)
	for _, s := range steps {
		start, took, bar := "", "", ""
		if p, ok := stepInterval(s, now); ok {
			start, took, bar = "+"+span(p.start.Sub(whole.start)), span(p.length()), whole.bar(p)
		}
		t.row(s.GetName(), s.GetStatus(), start, took, bar, detailOf(s))
	}
	t.flush()
}

// detailOf returns the details of a step on one line, its error first.
func detailOf(s *podfsmv1.Step) string {
	var parts []string
	if s.GetError() != "" {
		parts = append(parts, "error="+strconv.Quote(s.GetError()))
	}
	for _, name := range slices.Sorted(maps.Keys(s.GetDetail())) {
		parts = append(parts, name+"="+s.GetDetail()[name])
	}
	return strings.Join(parts, " ")
}

// addTransitions adds each transition with the time spent in the state that it left.
func addTransitions(b *bytes.Buffer, r *podfsmv1.InspectResponse, now time.Time) {
	if len(r.GetTransitions()) == 0 {
		return
	}
	b.WriteString("\nTransitions\n")
	t := newTable(b, "SEQ", "TIME", "AFTER", "EVENT", "FROM", "TO", "ERROR")
	var entered *timestamppb.Timestamp
	for _, tr := range r.GetTransitions() {
		if tr.GetSeq() == 1 {
			entered = r.GetSandbox().GetCreatedAt()
		}
		t.row(strconv.FormatUint(tr.GetSeq(), 10), instant(tr.GetAt(), now), between(entered, tr.GetAt()), tr.GetEvent(), tr.GetFrom(), tr.GetTo(), tr.GetError())
		entered = tr.GetAt()
	}
	t.flush()
}

func addCNIResult(b *bytes.Buffer, result string) {
	if result == "" {
		return
	}
	b.WriteString("\nCNI result\n")
	var indented bytes.Buffer
	if err := json.Indent(&indented, []byte(result), "", "  "); err != nil {
		indented.Reset()
		indented.WriteString(result)
	}
	for line := range strings.Lines(indented.String()) {
		fmt.Fprintln(b, printable(strings.TrimSuffix(line, "\n")))
	}
}
