// Command bench measures an unmodified containerd, CRI-O and podfsm side by side, and the floor: a
// bare clone of pause with the CNI plugins. It writes docs/explanation/bench.md and
// docs/explanation/bench.svg, and leaves nothing else behind.
//
// It runs in the folder of the repository.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/tools/page"
)

// options select what a run measures.
type options struct {
	rounds   int
	parallel []int // pods at a time
	standing []int // numbers of pods on a measured daemon, ascending
	sections []string
	page     string // the file for the table, with the plot beside it; "" writes neither
}

// section is a selectable part of the run.
type section struct {
	name string
	what string
	run  func(context.Context, *bench) error
}

var sections = []section{
	{"container", "a pod and its first container", withContainer},
	{"alone", "one pod at a time, and the CPU time that a pod takes", alone},
	{"stock", "pods of containerd's own handler, on an unmodified containerd and beside podfsm", stockPods},
	{"parallel", "many pods at a time", inParallel},
	{"writes", "what a daemon syncs and writes per pod", writes},
	{"standing", "daemons that have pods already: further pods, memory, lists, restarts", standing},
	{"growth", "calls about one pod, on a node with few pods of three containers and on one with many", growth},
	{"tracing", "podfsm with tracing off, sampled out, and on", traced},
}

// The main goroutine stays on the main thread. A thread that a goroutine has moved into a cgroup or
// namespace ends with the goroutine, except for the main thread, which would stay there.
func init() { runtime.LockOSThread() }

func main() {
	var o options
	var names, parallel, stand string
	flag.IntVar(&o.rounds, "rounds", 20, "how many pods of each kind and side are run alone; the other sections have fewer rounds in proportion")
	flag.StringVar(&parallel, "parallel", "8,32", "how many pods are run at a time")
	flag.StringVar(&stand, "standing", "10,100,300", "how many pods daemons have while they are looked at; memory per pod is counted from the first number on, and further pods are run beside the second")
	flag.StringVar(&names, "sections", "", "the sections to measure, separated by commas; all when empty:"+describe())
	flag.StringVar(&o.page, "page", "docs/explanation/bench.md", "where to write the page, and the plot beside it; nothing is written when empty or when not all sections are measured")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	err := errors.Join(o.choose(names), numbers(parallel, &o.parallel), numbers(stand, &o.standing))
	if err == nil {
		err = run(ctx, o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

func describe() string {
	var text strings.Builder
	for _, s := range sections {
		fmt.Fprintf(&text, "\n%s: %s", s.name, s.what)
	}
	return text.String()
}

func (o *options) choose(names string) error {
	all := make([]string, len(sections))
	for i, s := range sections {
		all[i] = s.name
	}
	if names == "" {
		o.sections = all
		return nil
	}
	o.sections = strings.Split(names, ",")
	for _, name := range o.sections {
		if !slices.Contains(all, name) {
			return fmt.Errorf("unknown section %q; choose from %s", name, strings.Join(all, ", "))
		}
	}
	return nil
}

func numbers(text string, to *[]int) error {
	for field := range strings.SplitSeq(text, ",") {
		n, err := strconv.Atoi(field)
		if err != nil || n < 1 {
			return fmt.Errorf("invalid number of pods %q", field)
		}
		*to = append(*to, n)
	}
	slices.Sort(*to)
	return nil
}

// bench is one run.
type bench struct {
	options
	sides   []*side // in the order of the table's columns
	floor   *floor
	results *results
}

func run(ctx context.Context, o options) (err error) {
	if err := harness.Sweep(ctx); err != nil {
		return err
	}
	start, load := time.Now(), page.Load()
	b := &bench{options: o, results: newResults()}
	defer func() {
		err = errors.Join(err, b.close(context.WithoutCancel(ctx)))
		harness.RemoveEmptyDirs()
		err = errors.Join(err, leftovers())
	}()
	progress("starting the daemons")
	if err := b.start(ctx); err != nil {
		return err
	}
	for _, s := range sections {
		if !slices.Contains(o.sections, s.name) {
			continue
		}
		began := time.Now()
		progress("%s: %s", s.name, s.what)
		if err := s.run(ctx, b); err != nil {
			return fmt.Errorf("section %s: %w", s.name, err)
		}
		progress("%s took %.0f s, load %s", s.name, time.Since(began).Seconds(), page.Load())
	}
	machine := describeMachine(load, time.Since(start), o)
	fmt.Print(b.results.table(machine))
	if o.page == "" || len(o.sections) < len(sections) {
		return nil
	}
	if err := b.results.write(o.page, machine); err != nil {
		return err
	}
	progress("wrote %s", o.page)
	return nil
}

// leftovers fails if a node has left anything on the machine.
func leftovers() error {
	left, err := harness.Leftovers()
	if len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("left on the machine: %s", strings.Join(left, ", ")))
	}
	return err
}

// fewer returns a percentage of the rounds, at least one.
func (b *bench) fewer(percent int) int { return max(1, b.rounds*percent/100) }

func progress(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
