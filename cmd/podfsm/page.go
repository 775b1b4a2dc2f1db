package main

import (
	"bytes"
	"cmp"
	_ "embed"
	"errors"
	"fmt"
	"html/template"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v3"
	"google.golang.org/protobuf/types/known/timestamppb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/ledger/records"
)

// pageText is the page; html/template escapes what is put into it, wherever
// that is, and the page's policy lets a browser load and run nothing.
//
//go:embed page.html
var pageText string

var pageTemplate = template.Must(template.New("page").Parse(pageText))

// writePage writes a timeline as a page, to the file that the flag names.
func writePage(cmd *cli.Command, t *timeline, now time.Time) error {
	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, newPage(t, now)); err != nil {
		return fmt.Errorf("failed to write the page: %w", err)
	}
	path := cmd.String("html")
	if path == "-" {
		_, err := cmd.Root().Writer.Write(b.Bytes())
		return err
	}
	if err := replaceFile(path, b.Bytes(), 0o666); err != nil {
		return fmt.Errorf("failed to write the page: %w", err)
	}
	return nil
}

// replaceFile makes the file anew, or not at all. The content gets into no file, link or pipe that
// another user has put there.
func replaceFile(path string, content []byte, mode fs.FileMode) error {
	info, err := os.Stat(path)
	switch {
	case path == "":
		return errors.New("the file has no name")
	case err == nil && !info.Mode().IsRegular():
		return fmt.Errorf("%s is not a regular file", path)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	}
	fresh := filepath.Join(filepath.Dir(path), fmt.Sprintf(".%s.%d", filepath.Base(path), os.Getpid()))
	f, err := os.OpenFile(fresh, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(fresh, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(fresh))
	}
	return nil
}

// page is the content of the page.
type page struct {
	Name        text
	IsPod       bool
	Attempt     uint32
	Short       text
	Created     moment
	State       text
	For         string
	Note        text
	Severity    string // a CSS class: "bad", "warn" or ""
	FailedStep  text
	Cleanups    string
	Reason      text
	Slowest     text
	Periods     []pagePeriod
	Errors      []pageNote
	Pending     []pageNote
	WrittenOff  []pageNote
	Graph       drawing
	Transitions []pageTransition
	Siblings    []pageSibling
	Facts       []pageNote
	Version     string
	Now         moment
}

type pagePeriod struct {
	Title string
	From  moment
	Took  string
	Lines []pageLine
}

type pageLine struct {
	Label       text
	Nested      bool
	Timed       bool
	Left, Width float64 // percent
	Start, Took string
	Outcome     string
	Class       string
}

// pageNote is a text and its subject.
type pageNote struct{ What, Text text }

type pageTransition struct {
	Seq       uint64
	To, Event text
	After     string
	At        moment
	Error     text
}

type pageSibling struct {
	Attempt           uint32
	Short             text
	Created           moment
	State, FailedStep text
	This              bool
}

// moment is a time for people and for programs.
type moment struct{ time.Time }

func (m moment) ISO() string   { return m.Format("2006-01-02T15:04:05.000Z07:00") }
func (m moment) Text() string  { return m.Format("2006-01-02 15:04:05.000 MST") }
func (m moment) Short() string { return m.Format("2006-01-02 15:04:05") }
func (m moment) Clock() string { return m.Format("15:04:05.000") }

func newPage(t *timeline, now time.Time) page {
	at := func(ts *timestamppb.Timestamp) moment { return moment{ts.AsTime().In(now.Location())} }
	s := t.GetSandbox()
	all := waterfall(t.InspectResponse, now)
	p := page{
		Name: text(cmp.Or(podOf(s), s.GetId())), IsPod: podOf(s) != "", Attempt: s.GetAttempt(), Short: text(shorten(s.GetId())),
		Created: at(s.GetCreatedAt()), State: text(stateOf(s)), For: age(s.GetSince(), now), Note: text(t.note()), Severity: severityOf(s), FailedStep: text(s.GetFailedStep()),
		Cleanups: pendingCount(len(s.GetPendingCleanups())), Reason: text(reason(t.InspectResponse)), Graph: draw(records.Table(), t.GetTransitions()),
		Facts: factsOf(t.InspectResponse), Version: versions(), Now: moment{now},
	}
	if most, total, ok := slowest(all); ok {
		p.Slowest = text(fmt.Sprintf("Slowest step: %s, %s of the creation's %s.", most.label, span(most.when.length()), span(total)))
	}
	for _, period := range all {
		p.Periods = append(p.Periods, newPagePeriod(period, now))
	}
	for _, n := range errorsOf(all) {
		p.Errors = append(p.Errors, pageNote{text(n.what), text(n.text)})
	}
	for _, c := range s.GetPendingCleanups() {
		p.Pending = append(p.Pending, pageNote{text("undo of " + c.GetStep() + ", " + when(c, now)), text(c.GetError())})
	}
	for _, n := range writtenOff(t.GetTries(), now) {
		p.WrittenOff = append(p.WrittenOff, pageNote{text(n.what), text(n.text)})
	}
	for _, tr := range t.GetTransitions() {
		p.Transitions = append(p.Transitions, pageTransition{
			tr.GetSeq(), text(tr.GetTo()), text(tr.GetEvent()), span(tr.GetAfter().AsDuration()), at(tr.GetAt()), text(tr.GetError()),
		})
	}
	if len(t.siblings) > 1 {
		for _, one := range t.siblings {
			p.Siblings = append(p.Siblings, pageSibling{
				one.GetAttempt(), text(shorten(one.GetId())), at(one.GetCreatedAt()), text(stateOf(one)), text(one.GetFailedStep()), one.GetId() == s.GetId(),
			})
		}
	}
	return p
}

func pendingCount(cleanups int) string {
	switch cleanups {
	case 0:
		return ""
	case 1:
		return "1 cleanup is pending"
	}
	return fmt.Sprintf("%d cleanups are pending", cleanups)
}

// severityOf returns the CSS class for the state of a sandbox.
func severityOf(s *podfsmv1.Sandbox) string {
	switch {
	case len(s.GetPendingCleanups()) > 0 || s.GetFailedStep() != "" || s.GetState() == "Quarantined":
		return "bad"
	case s.GetError() != "" || s.GetState() == "NotReady":
		return "warn"
	}
	return ""
}

func newPagePeriod(p period, now time.Time) pagePeriod {
	view := pagePeriod{Title: p.title, From: moment{p.whole.start.In(now.Location())}, Took: span(p.whole.length())}
	for _, l := range p.lines {
		line := pageLine{
			Label: text(l.label), Nested: l.nested, Timed: l.timed,
			Outcome: string(l.ending), Class: strings.ReplaceAll(string(l.ending), " ", "-"),
		}
		if l.timed {
			line.Start, line.Took = "+"+span(l.when.start.Sub(p.whole.start)), span(l.when.length())
			line.Left = percent(min(p.whole.fraction(l.when.start), 0.995))
			line.Width = percent(min(p.whole.fraction(l.when.end), 1)) - line.Left
		}
		if l.ending == unknownEnd {
			line.Took = "?"
		}
		view.Lines = append(view.Lines, line)
	}
	return view
}

// percent returns a fraction in percent, rounded to a hundredth.
func percent(fraction float64) float64 {
	return math.Round(max(fraction, 0)*1e4) / 100
}

// factsOf returns the known properties of a sandbox.
func factsOf(r *podfsmv1.InspectResponse) []pageNote {
	s := r.GetSandbox()
	var facts []pageNote
	add := func(name, value string) {
		if value != "" {
			facts = append(facts, pageNote{text(name), text(value)})
		}
	}
	add("Sandbox", s.GetId())
	add("containerd namespace", s.GetContainerdNamespace())
	add("Pod uid", s.GetPodUid())
	add("Runtime handler", s.GetRuntimeHandler())
	add("Addresses", strings.Join(addresses(s), ", "))
	add("Pause process", pidOf(s))
	add("Network namespace", netnsOf(s))
	add("Host uids", mappings(s.GetUserns().GetUids()))
	add("Host gids", mappings(s.GetUserns().GetGids()))
	add("Trace", s.GetTraceId())
	for _, step := range r.GetSteps() {
		if len(step.GetDetail()) > 0 {
			plain := &podfsmv1.Step{Detail: step.GetDetail()}
			add(step.GetName(), detailOf(plain))
		}
	}
	return facts
}
