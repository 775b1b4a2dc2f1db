// Command progress reads what go test -json prints and shows what a person waits for: once a minute what runs, the output of what fails or
// is skipped, and the result of each package.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

// interval is the time between two lines of progress.
const interval = time.Minute

func main() {
	r := newReport(os.Stdout, time.Now)
	lines := make(chan string)
	go func() {
		defer close(lines)
		in := bufio.NewReader(os.Stdin)
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
}

// test names one of the tests that run, or a package where Test is empty.
type test struct{ Package, Test string }

// report is what is known of a run of go test.
type report struct {
	out            io.Writer
	now            func() time.Time
	begun          time.Time
	passed, failed int
	running        map[test]time.Time // since when
	output         map[test]*strings.Builder
}

func newReport(out io.Writer, now func() time.Time) *report {
	return &report{out: out, now: now, begun: now(), running: map[test]time.Time{}, output: map[test]*strings.Builder{}}
}

// read takes a line of go test. What is no event is shown as it is.
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
		r.end(t, e.Action)
	}
}

// keep keeps what a test prints until it has ended. Of a package the result alone is shown, which is its last line.
func (r *report) keep(t test, output string) {
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
		return
	case result == "fail":
		r.failed++
	}
	fmt.Fprint(r.out, text)
}

// endAll ends the tests of a package that has failed before they have ended: by a timeout, for example, whose stacks are the output of the
// test that ran.
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

func (r *report) progress() {
	elapsed := r.now().Sub(r.begun)
	fmt.Fprintf(r.out, "%s  %d tests passed, %d failed; running: %s\n", minutes(elapsed), r.passed, r.failed, r.runs())
}

// runs lists the tests that run, without those whose subtests do.
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

func minutes(d time.Duration) string {
	return fmt.Sprintf("%d:%02d", int(d.Minutes()), int(d.Seconds())%60)
}
