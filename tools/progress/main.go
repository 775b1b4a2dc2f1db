// Command progress reads the output of go test -json and shows what a person waits for. Once a
// minute it shows the running tests. It shows the output of failed and skipped tests, and the result
// of each package. At the end it shows the slowest tests, and the errors of failed tests again.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

const (
	// interval is the time between two lines of progress.
	interval = time.Minute
	// slowest is the number of slowest tests at the end.
	slowest = 10
	// failureLines is how much of the output of a failed test is repeated at the end. The error comes
	// before the logs of daemons.
	failureLines = 40
)

// unneeded are the reasons for which a test may be skipped: it is about something that the machine
// doesn't have, and that nodes like the machine don't need. Another machine runs the test.
var unneeded = []string{
	// A process that can't be killed is one in a frozen cgroup. On cgroup v2, SIGKILL ends it.
	"needs the freezer of cgroup v1",
	// The mounts of the hierarchies of cgroup v1 differ between a container and its host.
	"the nesting is one of cgroup v1",
	// The exit status behind a pidfd. Without it, podfsm reports an unknown status.
	"needs Linux 6.15",
}

func main() {
	all := flag.Bool("all", false, "show the output of tests that pass, too")
	failOnSkip := flag.Bool("fail-on-skip", false, "exit with 1 if a test was skipped that this machine can run")
	flag.Parse()
	r := newReport(os.Stdout, time.Now)
	r.all = *all
	r.readAll(os.Stdin)
	if *failOnSkip && len(r.skipped) > 0 {
		fmt.Fprintln(os.Stderr, "skipped tests have not passed:", strings.Join(r.skipped, ", "))
		os.Exit(1)
	}
}

// readAll reads the output of go test, and shows the progress at the same time.
func (r *report) readAll(from io.Reader) {
	lines := make(chan string)
	go func() {
		defer close(lines)
		in := bufio.NewReader(from)
		for {
			line, err := in.ReadString('\n')
			if line != "" {
				lines <- line
			}
			if err != nil {
				return
			}
		}
	}()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case line, ok := <-lines:
			if !ok {
				r.finish()
				return
			}
			r.read(line)
		case <-tick.C:
			r.progress()
		}
	}
}

// event is one of go test -json (cmd/test2json).
type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64 // in seconds
}

// test is a running test, or a package if Test is empty.
type test struct{ Package, Test string }

// report is the state of a run of go test.
type report struct {
	out            io.Writer
	now            func() time.Time
	begun          time.Time
	all            bool // also show what passes
	passed, failed int
	skipped        []string           // without those that are unneeded
	running        map[test]time.Time // since when
	output         map[test]*strings.Builder
	took           []ended
	failures       []string // name and first lines of output
}

// ended is a test that has ended, with its duration.
type ended struct {
	test
	seconds float64
}

func newReport(out io.Writer, now func() time.Time) *report {
	return &report{out: out, now: now, begun: now(), running: map[test]time.Time{}, output: map[test]*strings.Builder{}}
}

// read reads a line of go test. A line that is no event is shown as it is.
func (r *report) read(line string) {
	var e event
	if json.Unmarshal([]byte(line), &e) != nil || e.Action == "" {
		fmt.Fprint(r.out, line)
		return
	}
	t := test{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		fmt.Fprint(r.out, e.Output)
	case "run", "cont":
		r.running[t] = r.now()
	case "pause": // until those that don't run beside others have ended
		delete(r.running, t)
	case "output":
		r.keep(t, e.Output)
	case "pass", "fail", "skip":
		if t.Test != "" && !strings.Contains(t.Test, "/") {
			r.took = append(r.took, ended{t, e.Elapsed})
		}
		r.end(t, e.Action)
	}
}

// keep keeps the output of a test until its end, without the lines of go test about running tests.
// Of a package only the result is shown, which is the last line.
func (r *report) keep(t test, output string) {
	if strings.HasPrefix(output, "=== ") {
		return
	}
	if r.output[t] == nil {
		r.output[t] = &strings.Builder{}
	}
	r.output[t].WriteString(output)
}

func (r *report) end(t test, result string) {
	text := ""
	if kept := r.output[t]; kept != nil {
		text = kept.String()
	}
	delete(r.output, t)
	delete(r.running, t)
	switch {
	case t.Test == "" && result == "pass":
		text = lastLine(text)
	case t.Test == "" && result == "skip": // it has no tests
		return
	case t.Test == "":
		r.endAll(t.Package)
	case result == "pass":
		r.passed++
		if !r.all {
			return
		}
	case result == "fail":
		r.failed++
		r.failures = append(r.failures, t.Test+" failed:\n"+firstLines(text, failureLines))
	case result == "skip" && !slices.ContainsFunc(unneeded, func(reason string) bool { return strings.Contains(text, reason) }):
		r.skipped = append(r.skipped, t.Test)
	}
	fmt.Fprint(r.out, text)
}

// endAll ends the unfinished tests of a failed package. After a timeout, for example, the stacks
// are the output of the running test.
func (r *report) endAll(pkg string) {
	for _, t := range slices.SortedFunc(maps.Keys(r.output), func(a, b test) int { return strings.Compare(a.Test, b.Test) }) {
		if t.Package == pkg {
			r.end(t, "fail")
		}
	}
}

func lastLine(text string) string {
	text = strings.TrimSuffix(text, "\n")
	return text[strings.LastIndexByte(text, '\n')+1:] + "\n"
}

// firstLines returns at most n lines of a text.
func firstLines(text string, n int) string {
	lines := strings.SplitAfterN(text, "\n", n+1)
	return strings.Join(lines[:min(len(lines), n)], "")
}

func (r *report) progress() {
	elapsed := r.now().Sub(r.begun)
	fmt.Fprintf(r.out, "%s  %d tests passed, %d failed; running: %s\n", minutes(elapsed), r.passed, r.failed, r.runs())
}

// runs lists the running tests, without those with running subtests.
func (r *report) runs() string {
	var all []string
	for t, since := range r.running {
		isSubtest := func(other test) bool { return other.Package == t.Package && strings.HasPrefix(other.Test, t.Test+"/") }
		if !slices.ContainsFunc(slices.Collect(maps.Keys(r.running)), isSubtest) {
			all = append(all, fmt.Sprintf("%s (%s)", t.Test, minutes(r.now().Sub(since))))
		}
	}
	if len(all) == 0 {
		return "building"
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

// finish shows the slowest tests, and why tests have failed: a long log may have lost it.
func (r *report) finish() {
	r.showSlowest()
	for _, failure := range r.failures {
		fmt.Fprint(r.out, failure)
	}
}

// showSlowest shows the slowest tests, if any took a second or more. The time of a test includes its
// subtests.
func (r *report) showSlowest() {
	slow := slices.DeleteFunc(slices.Clone(r.took), func(e ended) bool { return e.seconds < 1 })
	if len(slow) == 0 {
		return
	}
	slices.SortStableFunc(slow, func(a, b ended) int { return cmp.Compare(b.seconds, a.seconds) })
	fmt.Fprintln(r.out, "the slowest tests:")
	for _, e := range slow[:min(len(slow), slowest)] {
		fmt.Fprintf(r.out, "%6.1f s  %s %s\n", e.seconds, e.Package, e.Test)
	}
}

func minutes(d time.Duration) string {
	return fmt.Sprintf("%d:%02d", int(d.Minutes()), int(d.Seconds())%60)
}
