// Command compare makes the same things go wrong for a pod of containerd's own handler and for a pod of podfsm's, in the same binary, and
// writes what each of them leaves into docs/stock-beside-ours.md. It leaves nothing behind.
//
// It runs in the repository's folder.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/integration/harness"
)

// details says that all that is left is shown, one by one.
var details bool

// parallel is how many cells are measured at a time, each on a node of its own.
const parallel = 4

const page = "docs/stock-beside-ours.md"

func main() {
	only := flag.String("only", "", "look at the faults whose name contains this alone, show each thing that is left, and don't write the page")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := run(ctx, *only); err != nil {
		fmt.Fprintln(os.Stderr, "compare:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, only string) error {
	if err := harness.Sweep(ctx); err != nil {
		return err
	}
	details = only != ""
	chosen := slices.DeleteFunc(slices.Clone(faults), func(f fault) bool { return !strings.Contains(f.name, only) })
	table := make([][2]string, len(chosen))
	cells, ctx := errgroup.WithContext(ctx)
	cells.SetLimit(parallel)
	for i, f := range chosen {
		for j, handler := range []string{harness.StockHandler, harness.PodfsmHandler} {
			cells.Go(func() (err error) {
				start := time.Now()
				if table[i][j], err = measure(ctx, f, handler); err != nil {
					return fmt.Errorf("failed to measure %q with handler %q: %w", f.name, handler, err)
				}
				fmt.Printf("%d/%d %s, %s: %s (%.0f s)\n", i+1, len(chosen), f.name, handler, table[i][j], time.Since(start).Seconds())
				return nil
			})
		}
	}
	if err := cells.Wait(); err != nil {
		return err
	}
	var rows strings.Builder
	for i, f := range chosen {
		fmt.Fprintf(&rows, "| %s | %s | %s |\n", f.name+note(f), table[i][0], table[i][1])
	}
	if only != "" {
		return nil
	}
	if err := os.WriteFile(page, []byte(head+rows.String()+tail()), 0o644); err != nil {
		return err
	}
	fmt.Println("wrote", page)
	return nil
}

func note(f fault) string {
	if f.varies {
		return " \\*"
	}
	return ""
}

const head = `# Stock beside ours

What goes wrong with a pod, and what is left of it on the node: once with containerd's own handler ` + "`runc`" + `, once with podfsm's handler, in
the same binary. After the fault has gone away, the kubelet's part is done: containerd is restarted, every pod that is listed is
stopped and removed, up to three times each, and containerd is restarted once more. What is there then and wasn't before the fault, is
left: on the machine, in the node's network namespace and in containerd's stores.

This page is written by ` + "`make compare`" + `, which measures every cell. Pods of the stock handler have user namespaces, too.

| fault | containerd's own handler leaves | podfsm leaves |
|---|---|---|
`

// tail explains the rows.
func tail() string {
	var text strings.Builder
	text.WriteString("\n\\* What is left of this varies from run to run, because it depends on the moment.\n\n## The faults\n\n")
	for _, f := range faults {
		fmt.Fprintf(&text, "- **%s**: %s\n", f.name, f.what)
	}
	return text.String()
}

// measure makes a fault on a node of its own and says what it leaves.
func measure(ctx context.Context, f fault, handler string) (left string, err error) {
	if f.measure != nil {
		return f.measure(ctx, handler)
	}
	n, err := harness.NewNode(ctx, f.config)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, n.Close(context.WithoutCancel(ctx))) }()
	s := &scene{Node: n, handler: handler}
	if _, err := n.WarmUp(ctx, handler); err != nil {
		return "", err
	}
	if f.prepare != nil {
		if err := f.prepare(ctx, s); err != nil {
			return "", err
		}
	}
	before, err := n.Settle(ctx)
	if err != nil {
		return "", err
	}
	if err := f.happen(ctx, s); err != nil {
		return "", err
	}
	if err := n.Heal(); err != nil {
		return "", err
	}
	if err := n.Restart(ctx); err != nil {
		if !f.fatal {
			return "", err
		}
		return "**containerd does not start any more**", nil
	}
	if err := s.kubelet(ctx); err != nil {
		return "", err
	}
	if f.clear != nil {
		if err := f.clear(ctx, s); err != nil {
			return "", err
		}
	}
	if err := n.Restart(ctx); err != nil {
		return "", err
	}
	return remains(ctx, n, before)
}

// remains waits for what soon goes, and says what stays.
func remains(ctx context.Context, n *harness.Node, before harness.Census) (string, error) {
	if n.WaitClean(ctx, before) == nil {
		return "nothing", nil
	}
	after, err := n.Census(ctx)
	if err != nil {
		return "", err
	}
	if details {
		fmt.Print(before.Diff(after))
	}
	return words(before, after), nil
}
