package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/show"
)

func timelineCommand() *cli.Command {
	return &cli.Command{
		Name:          "timeline",
		Usage:         "show how long each step of a sandbox took, what failed and what was undone",
		ArgsUsage:     "REF",
		ShellComplete: completeRef,
		Description: refDescription + `

podfsm timeline default/web                     the newest sandbox of the pod
podfsm timeline --attempt 0 default/web         the newest of the kubelet's attempt 0
podfsm timeline 3b1f0c9a7e5d                    the one with this id: several may be of one attempt
podfsm timeline --html web.html default/web     one page for a browser, which needs nothing else`,
		HideHelpCommand: true,
		Flags: []cli.Flag{
			&cli.Uint32Flag{Name: "attempt", Usage: "the newest sandbox of this attempt of the kubelet's"},
			outputFlag("json"),
			&cli.StringFlag{Name: "html", Usage: "write a page for a browser into `FILE`; - is stdout", TakesFile: true},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			ref, err := oneRef(cmd)
			if err != nil {
				return err
			}
			t, err := findTimeline(ctx, cmd, ref)
			if err != nil {
				return err
			}
			switch {
			case cmd.IsSet("html"):
				return writePage(cmd, t, time.Now())
			case cmd.String("output") == "json":
				return writeJSON(cmd.Root().Writer, timelineOutput(t, time.Now()))
			default:
				return writeTimeline(cmd.Root().Writer, t, widthOf(cmd.Root().Writer), time.Now())
			}
		},
	}
}

// timeline is a sandbox, and all sandboxes of its pod with the oldest first.
type timeline struct {
	*podfsmv1.InspectResponse
	siblings []*podfsmv1.Sandbox
	newest   *podfsmv1.Sandbox // of all pods of this name
}

// note warns if the sandbox is, or may be, of an earlier pod of the same name. podfsm keeps no record
// of a pod that it refused before the first step, or that the kubelet never asked for.
func (t *timeline) note() string {
	s := t.GetSandbox()
	switch {
	case podOf(s) == "" || t.newest == nil:
		return ""
	case !samePod(s, t.newest):
		return "this is an earlier pod of this name; podfsm timeline " + podOf(s) + " shows the newest"
	case s.GetId() == t.newest.GetId() && isEnded(s.GetState()):
		return "podfsm has no newer sandbox of this name. If kubectl shows another uid, this is an earlier pod of this name: see kubectl describe pod"
	}
	return ""
}

// samePod reports whether two sandboxes belong to one pod. A pod that is made again under its name has
// another uid.
func samePod(a, b *podfsmv1.Sandbox) bool {
	return podOf(a) == podOf(b) && a.GetPodUid() == b.GetPodUid()
}

// findTimeline finds a sandbox and the other sandboxes of its pod. A sandbox that ends between the
// two requests is in both answers.
func findTimeline(ctx context.Context, cmd *cli.Command, ref string) (*timeline, error) {
	all, inspect, err := source(ctx, cmd)
	if err != nil {
		return nil, err
	}
	matching, err := show.Match(ref, all)
	if err != nil {
		return nil, notFoundError{errors.New(printable(err.Error()))}
	}
	if cmd.IsSet("attempt") {
		if matching, err = ofAttempt(matching, cmd.Uint32("attempt")); err != nil {
			return nil, err
		}
	}
	newest := matching[len(matching)-1]
	for _, s := range matching {
		if podOf(s) != podOf(newest) {
			ref = cmp.Or(podOf(s), s.GetId())
			return nil, fmt.Errorf("ambiguous REF: name one pod, such as %s or %s", printable(podOf(newest)), printable(ref))
		}
	}
	response, err := inspect(newest.GetId())
	if err != nil {
		return nil, err
	}
	t := &timeline{InspectResponse: response}
	for _, s := range all {
		if podOf(s) == podOf(newest) {
			t.newest = s
		}
		if s.GetId() == newest.GetId() || podOf(s) != "" && samePod(s, newest) {
			t.siblings = append(t.siblings, s)
		}
	}
	return t, nil
}

// timelineOutput is a timeline for programs.
func timelineOutput(t *timeline, now time.Time) *podfsmv1.TimelineOutput {
	out := &podfsmv1.TimelineOutput{Sandbox: t.GetSandbox(), Siblings: t.siblings}
	for _, p := range waterfall(t.InspectResponse, now) {
		shown := &podfsmv1.TimelinePeriod{Title: p.title, StartedAt: timestamppb.New(p.whole.start), Duration: durationpb.New(p.whole.length())}
		for _, l := range p.lines {
			try := &podfsmv1.TimelineTry{Label: l.label, Plugin: l.nested, Outcome: string(l.ending), Error: l.err}
			if l.timed {
				try.StartedAt = timestamppb.New(l.when.start)
				if l.ending != unknownEnd {
					try.Duration = durationpb.New(l.when.length())
				}
			}
			shown.Tries = append(shown.Tries, try)
		}
		out.Periods = append(out.Periods, shown)
	}
	return out
}

// source is the daemon, or its ledger while the daemon is down. It lists all sandboxes, also ended
// ones, and inspects one.
func source(ctx context.Context, cmd *cli.Command) (all []*podfsmv1.Sandbox, inspect func(id string) (*podfsmv1.InspectResponse, error), err error) {
	response, err := call(ctx, cmd, podfsmv1.SandboxesClient.List, &podfsmv1.ListRequest{Ended: true})
	if err == nil {
		return response.GetSandboxes(), func(id string) (*podfsmv1.InspectResponse, error) {
			return call(ctx, cmd, podfsmv1.SandboxesClient.Inspect, &podfsmv1.InspectRequest{Ref: id})
		}, nil
	}
	found, err := readLedger(ctx, cmd, err)
	if err != nil {
		return nil, nil, err
	}
	return found.list(true).GetSandboxes(), found.inspect, nil
}

func ofAttempt(all []*podfsmv1.Sandbox, attempt uint32) ([]*podfsmv1.Sandbox, error) {
	var of []*podfsmv1.Sandbox
	var others []string
	for _, s := range all {
		if s.GetAttempt() == attempt {
			of = append(of, s)
		} else if text := strconv.FormatUint(uint64(s.GetAttempt()), 10); !slices.Contains(others, text) {
			others = append(others, text)
		}
	}
	if len(of) == 0 {
		return nil, notFoundError{fmt.Errorf("unknown attempt %d; known attempts: %s", attempt, strings.Join(others, ", "))}
	}
	return of, nil
}

const (
	narrowest, widest = 60, 160 // columns of a terminal
	labelWidth        = 28
)

// widthOf returns the number of columns of w, 80 if w is not a terminal.
func widthOf(w io.Writer) int {
	file, ok := w.(*os.File)
	if !ok {
		return 80
	}
	size, err := unix.IoctlGetWinsize(int(file.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 80
	}
	return min(max(int(size.Col), narrowest), widest)
}

// writeTimeline draws a timeline for a terminal of a width in columns.
func writeTimeline(w io.Writer, t *timeline, width int, now time.Time) error {
	var b bytes.Buffer
	all := waterfall(t.InspectResponse, now)
	addSummary(&b, t, all, width, now)
	for _, p := range all {
		addPeriod(&b, p, width, now)
	}
	if len(all) > 0 {
		addLegend(&b, all)
	}
	addErrors(&b, errorsOf(all), width)
	addPending(&b, t.GetSandbox().GetPendingCleanups(), width, now)
	addWrittenOff(&b, writtenOff(t.GetTries(), now), width)
	addSiblings(&b, t, now)
	_, err := w.Write(b.Bytes())
	return err
}

func addSummary(b *bytes.Buffer, t *timeline, all []period, width int, now time.Time) {
	s := t.GetSandbox()
	if pod := podOf(s); pod != "" {
		addField(b, "Pod:", fmt.Sprintf("%s, uid %s, attempt %d", pod, s.GetPodUid(), s.GetAttempt()), width)
	}
	addField(b, "Sandbox:", s.GetId(), width)
	addField(b, "State:", fmt.Sprintf("%s for %s", stateOf(s), age(s.GetSince(), now)), width)
	if note := t.note(); note != "" {
		addField(b, "Note:", note, width)
	}
	if s.GetFailedStep() != "" {
		addField(b, "Failed:", s.GetFailedStep(), width)
	}
	if most, total, ok := slowest(all); ok {
		addField(b, "Slowest:", fmt.Sprintf("%s, %s of the creation's %s", most.label, span(most.when.length()), span(total)), width)
	}
	if text := reason(t.InspectResponse); text != "" {
		addField(b, "Error:", text, width)
	}
	if s.GetTraceId() != "" {
		addField(b, "Trace:", s.GetTraceId(), width)
	}
	if path := pathOf(t.GetTransitions()); path != "" {
		addField(b, "Path:", path, width)
	}
}

// pathOf returns the states of a sandbox in their order, as "New > Ready".
func pathOf(transitions []*podfsmv1.Transition) string {
	var names []string
	for i, t := range transitions {
		if i == 0 {
			names = append(names, t.GetFrom())
		} else if t.GetSeq() > transitions[i-1].GetSeq()+1 {
			names = append(names, "…")
		}
		names = append(names, t.GetTo())
	}
	return strings.Join(names, " > ")
}

func addPeriod(b *bytes.Buffer, p period, width int, now time.Time) {
	fmt.Fprintf(b, "\n%s, from %s, %s\n", p.title, p.whole.start.In(now.Location()).Format("2006-01-02T15:04:05.000Z07:00"), span(p.whole.length()))
	columns := width - labelWidth - 2*9 - 3
	for _, l := range p.lines {
		label := printable(l.label)
		if l.nested {
			label = "  " + label
		}
		start, took, bar := "", "", "("+string(l.ending)+")"
		if l.timed {
			start, took = "+"+span(l.when.start.Sub(p.whole.start)), span(l.when.length())
			bar = p.whole.draw(l.when, columns, marks[l.ending])
		}
		if l.ending == unknownEnd {
			took = "?"
		}
		fmt.Fprintf(b, "%s %8s %8s %s\n", pad(label, labelWidth), start, took, bar)
	}
}

// addLegend explains the marks that were drawn.
func addLegend(b *bytes.Buffer, all []period) {
	var legend []string
	for _, o := range []ending{succeeded, skipped, failed, undone, undoFailed, underWay, unknownEnd} {
		drawn := slices.ContainsFunc(all, func(p period) bool {
			return slices.ContainsFunc(p.lines, func(l line) bool { return l.timed && l.ending == o })
		})
		if drawn {
			legend = append(legend, marks[o]+" "+string(o))
		}
	}
	fmt.Fprintf(b, "\n%s\n", strings.Join(legend, "   "))
}

func addErrors(b *bytes.Buffer, all []note, width int) {
	if len(all) == 0 {
		return
	}
	b.WriteString("\nErrors\n")
	for _, n := range all {
		addHanging(b, printable(n.what)+": "+printable(n.text), "  ", width)
	}
}

func addPending(b *bytes.Buffer, cleanups []*podfsmv1.PendingCleanup, width int, now time.Time) {
	if len(cleanups) == 0 {
		return
	}
	b.WriteString("\nPending cleanups\n")
	for _, c := range cleanups {
		addHanging(b, printable(fmt.Sprintf("undo of %s, %s: %s", c.GetStep(), when(c, now), c.GetError())), "  ", width)
	}
}

// addWrittenOff adds what was written off, and the reasons.
func addWrittenOff(b *bytes.Buffer, all []note, width int) {
	if len(all) == 0 {
		return
	}
	b.WriteString("\nWritten off\n")
	for _, n := range all {
		addHanging(b, printable(n.what+": "+n.text), "  ", width)
	}
}

// when returns since when a cleanup is pending, and when its next try is.
func when(c *podfsmv1.PendingCleanup, now time.Time) string {
	parts := []string{"since " + age(c.GetSince(), now)}
	if n := tries(c); n != "" {
		parts = append(parts, "tries: "+n)
	}
	if next := nextTry(c, now); next != "" {
		parts = append(parts, "next try: "+next)
	}
	return strings.Join(parts, ", ")
}

// shownSiblings is how many sandboxes of a pod a timeline lists.
const shownSiblings = 20

func addSiblings(b *bytes.Buffer, t *timeline, now time.Time) {
	if len(t.siblings) < 2 {
		return
	}
	b.WriteString("\nSandboxes of this pod, the newest last; * is this one\n")
	shown := t.siblings[max(0, len(t.siblings)-shownSiblings):]
	if left := len(t.siblings) - len(shown); left > 0 {
		fmt.Fprintf(b, "(%d earlier ones: podfsm ps --all)\n", left)
	}
	table := newTable(b, " ", "ATTEMPT", "SANDBOX", "CREATED", "STATE", "FAILED STEP")
	for _, s := range shown {
		mark := " "
		if s.GetId() == t.GetSandbox().GetId() {
			mark = "*"
		}
		table.row(mark, strconv.FormatUint(uint64(s.GetAttempt()), 10), shorten(s.GetId()), age(s.GetCreatedAt(), now)+" ago", cut(stateOf(s), 23), cut(s.GetFailedStep(), 14))
	}
	table.flush()
}

// fieldWidth is the width of a field's name.
const fieldWidth = 10

func addField(b *bytes.Buffer, name, text string, width int) {
	addHanging(b, fmt.Sprintf("%-*s", fieldWidth-1, name)+" "+printable(text), strings.Repeat(" ", fieldWidth), width)
}
