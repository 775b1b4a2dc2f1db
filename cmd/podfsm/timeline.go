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

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/records"
)

func timelineCommand() *cli.Command {
	return &cli.Command{
		Name:      "timeline",
		Usage:     "show what took how long, failed, was undone and is owed, of one sandbox of a pod",
		ArgsUsage: "REF",
		Description: refDescription + `

podfsm timeline default/web                     the newest sandbox of the pod
podfsm timeline --attempt 0 default/web         the newest of the kubelet's attempt 0
podfsm timeline 3b1f0c9a7e5d                    the one with this id: several may be of one attempt
podfsm timeline --html web.html default/web     one page for a browser, which needs nothing else`,
		HideHelpCommand: true,
		Flags: []cli.Flag{
			&cli.Uint32Flag{Name: "attempt", Usage: "the newest sandbox of this attempt of the kubelet's"},
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
			if !cmd.IsSet("html") {
				return writeTimeline(cmd.Root().Writer, t, widthOf(cmd.Root().Writer), time.Now())
			}
			return writePage(cmd, t, time.Now())
		},
	}
}

// timeline is a sandbox, and all of its pod, the oldest first.
type timeline struct {
	*podfsmv1.InspectResponse
	siblings []*podfsmv1.Sandbox
}

// findTimeline finds a sandbox, and those of the same pod. What ends between
// the two requests is there in both.
func findTimeline(ctx context.Context, cmd *cli.Command, ref string) (*timeline, error) {
	all, inspect, err := source(ctx, cmd)
	if err != nil {
		return nil, err
	}
	matching, err := records.Match(ref, all)
	if err != nil {
		return nil, errors.New(printable(err.Error()))
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
			return nil, fmt.Errorf("several pods are meant: name one, as %s or %s", printable(podOf(newest)), printable(ref))
		}
	}
	response, err := inspect(newest.GetId())
	if err != nil {
		return nil, err
	}
	return &timeline{response, slices.DeleteFunc(all, func(s *podfsmv1.Sandbox) bool {
		return s.GetId() != newest.GetId() && (podOf(s) == "" || podOf(s) != podOf(newest))
	})}, nil
}

// source is the daemon, or its ledger while that is down: all sandboxes, also
// those that have ended, and a look at one of them.
func source(ctx context.Context, cmd *cli.Command) (all []*podfsmv1.Sandbox, inspect func(id string) (*podfsmv1.InspectResponse, error), err error) {
	response, err := call(ctx, cmd, podfsmv1.SandboxesClient.List, &podfsmv1.ListRequest{Ended: true})
	if err == nil {
		return response.GetSandboxes(), func(id string) (*podfsmv1.InspectResponse, error) {
			return call(ctx, cmd, podfsmv1.SandboxesClient.Inspect, &podfsmv1.InspectRequest{Ref: id})
		}, nil
	}
	found, err := readLedger(cmd, err)
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
		return nil, fmt.Errorf("no sandbox of attempt %d is known; there are some of %s", attempt, strings.Join(others, ", "))
	}
	return of, nil
}

const (
	narrowest, widest = 60, 160 // columns of a terminal
	labelWidth        = 28
)

// widthOf is how many columns w has: 80 when it is no terminal.
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

// writeTimeline draws a timeline for a terminal of so many columns.
func writeTimeline(w io.Writer, t *timeline, width int, now time.Time) error {
	var b bytes.Buffer
	all := waterfall(t.InspectResponse, now)
	addSummary(&b, t, all, width, now)
	for _, s := range all {
		addStretch(&b, s, width, now)
	}
	if len(all) > 0 {
		addLegend(&b, all)
	}
	addMishaps(&b, mishaps(all), width)
	addOwed(&b, t.GetSandbox().GetDebts(), width, now)
	addWrittenOff(&b, writtenOff(t.GetActs(), now), width)
	addSiblings(&b, t, now)
	_, err := w.Write(b.Bytes())
	return err
}

func addSummary(b *bytes.Buffer, t *timeline, all []stretch, width int, now time.Time) {
	s := t.GetSandbox()
	if pod := podOf(s); pod != "" {
		addField(b, "Pod:", fmt.Sprintf("%s, attempt %d", pod, s.GetAttempt()), width)
	}
	addField(b, "Sandbox:", s.GetId(), width)
	addField(b, "State:", fmt.Sprintf("%s for %s", stateOf(s), age(s.GetSince(), now)), width)
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

// pathOf are the states that a sandbox went through, as "New > Ready".
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

func addStretch(b *bytes.Buffer, s stretch, width int, now time.Time) {
	fmt.Fprintf(b, "\n%s, from %s, %s\n", s.title, s.whole.start.In(now.Location()).Format("2006-01-02T15:04:05.000Z07:00"), span(s.whole.length()))
	columns := width - labelWidth - 2*9 - 3
	for _, l := range s.lanes {
		label := printable(l.label)
		if l.nested {
			label = "  " + label
		}
		start, took, bar := "", "", "("+string(l.ending)+")"
		if l.timed {
			start, took = "+"+span(l.when.start.Sub(s.whole.start)), span(l.when.length())
			bar = s.whole.draw(l.when, columns, marks[l.ending])
		}
		if l.ending == unknownEnd {
			took = "?"
		}
		fmt.Fprintf(b, "%s %8s %8s %s\n", pad(label, labelWidth), start, took, bar)
	}
}

// pad makes a text exactly as wide, and cuts out the middle of one that is too
// wide: its end tells the most.
func pad(text string, width int) string {
	runes := []rune(text)
	if over := len(runes) - width; over > 0 {
		runes = slices.Concat(runes[:width/2-1], []rune("…"), runes[width/2+over:])
	}
	return string(runes) + strings.Repeat(" ", width-len(runes))
}

// addLegend explains the marks that were drawn.
func addLegend(b *bytes.Buffer, all []stretch) {
	var legend []string
	for _, o := range []ending{succeeded, skipped, failed, undone, undoFailed, underWay, unknownEnd} {
		drawn := slices.ContainsFunc(all, func(s stretch) bool {
			return slices.ContainsFunc(s.lanes, func(l lane) bool { return l.timed && l.ending == o })
		})
		if drawn {
			legend = append(legend, marks[o]+" "+string(o))
		}
	}
	fmt.Fprintf(b, "\n%s\n", strings.Join(legend, "   "))
}

func addMishaps(b *bytes.Buffer, all []mishap, width int) {
	if len(all) == 0 {
		return
	}
	b.WriteString("\nErrors\n")
	for _, m := range all {
		addHanging(b, printable(m.what)+": "+printable(m.text), "  ", width)
	}
}

func addOwed(b *bytes.Buffer, debts []*podfsmv1.Debt, width int, now time.Time) {
	if len(debts) == 0 {
		return
	}
	b.WriteString("\nOwed\n")
	for _, d := range debts {
		addHanging(b, printable(fmt.Sprintf("undo of %s, %s: %s", d.GetStep(), when(d, now), d.GetError())), "  ", width)
	}
}

// addWrittenOff has what was given up, and why.
func addWrittenOff(b *bytes.Buffer, all []mishap, width int) {
	if len(all) == 0 {
		return
	}
	b.WriteString("\nWritten off\n")
	for _, m := range all {
		addHanging(b, printable(m.what+": "+m.text), "  ", width)
	}
}

// when says since when a debt is owed, and when it will be tried again.
func when(d *podfsmv1.Debt, now time.Time) string {
	parts := []string{"since " + age(d.GetSince(), now)}
	if n := tries(d); n != "" {
		parts = append(parts, "tries: "+n)
	}
	if next := nextTry(d, now); next != "" {
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

// cut shortens a text that is longer than most characters.
func cut(text string, most int) string {
	if runes := []rune(printable(text)); len(runes) > most {
		return string(runes[:most-1]) + "…"
	}
	return text
}

// fieldWidth is the width of a field's name.
const fieldWidth = 10

func addField(b *bytes.Buffer, name, text string, width int) {
	addHanging(b, fmt.Sprintf("%-*s", fieldWidth-1, name)+" "+printable(text), strings.Repeat(" ", fieldWidth), width)
}

// addHanging writes a text in lines of at most so many columns, the further
// ones indented.
func addHanging(b *bytes.Buffer, text, indent string, width int) {
	for i, line := range wrap(text, width, width-len(indent)) {
		if i > 0 {
			b.WriteString(indent)
		}
		b.WriteString(line + "\n")
	}
}

// wrap breaks a text at spaces, and a word that is too long anywhere. The first
// line may have another width than the rest.
func wrap(text string, first, rest int) []string {
	var lines []string
	runes, width := []rune(text), first
	for len(runes) > width {
		cut := width
		for cut > width/2 && runes[cut] != ' ' {
			cut--
		}
		if runes[cut] != ' ' {
			cut = width
		}
		lines = append(lines, strings.TrimRight(string(runes[:cut]), " "))
		for runes = runes[cut:]; len(runes) > 0 && runes[0] == ' '; {
			runes = runes[1:]
		}
		width = rest
	}
	return append(lines, string(runes))
}

// barWidth is the width of a timeline in characters.
const barWidth = 30

// period is the time from start to end.
type period struct {
	start, end time.Time
}

func (p period) length() time.Duration {
	return p.end.Sub(p.start)
}

// stepPeriod is when s ran, up to now when it still runs. It is false for a step
// that was never started.
func stepPeriod(s *podfsmv1.Step, now time.Time) (period, bool) {
	if s.GetStartedAt() == nil {
		return period{}, false
	}
	start := s.GetStartedAt().AsTime()
	if s.GetDuration() == nil {
		return period{start, now}, true
	}
	return period{start, start.Add(s.GetDuration().AsDuration())}, true
}

// periodOf is the time from the first start of all steps to the last end.
func periodOf(steps []*podfsmv1.Step, now time.Time) period {
	var whole period
	for _, s := range steps {
		p, ok := stepPeriod(s, now)
		if !ok {
			continue
		}
		if whole.start.IsZero() || p.start.Before(whole.start) {
			whole.start = p.start
		}
		if p.end.After(whole.end) {
			whole.end = p.end
		}
	}
	return whole
}

// bar draws where in the whole part lies, as "[   ===     ]"; however short,
// it has a mark.
func (whole period) bar(part period) string {
	return whole.draw(part, barWidth, "=")
}

// draw is bar with another width and mark.
func (whole period) draw(part period, width int, mark string) string {
	from := whole.column(part.start, width)
	to := max(whole.column(part.end, width), from+1)
	if to > width {
		from, to = width-1, width
	}
	return "[" + strings.Repeat(" ", from) + strings.Repeat(mark, to-from) + strings.Repeat(" ", width-to) + "]"
}

// column is the character of a bar that t falls on, from 0 to width.
func (whole period) column(t time.Time, width int) int {
	return min(max(int(whole.fraction(t)*float64(width)+0.5), 0), width)
}

// fraction is how far into the whole t is, from 0 to 1 unless it is outside.
func (whole period) fraction(t time.Time) float64 {
	if whole.length() <= 0 {
		return 0
	}
	return float64(t.Sub(whole.start)) / float64(whole.length())
}
