// Command compare injects the same faults for a pod of containerd's own handler and for a pod of
// podfsm's, in the same binary, and writes what each of them leaves into
// docs/explanation/stock-beside-ours.md. It leaves nothing else behind.
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
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/tools/page"
)

// details shows everything that is left item by item.
var details bool

// parallel is how many cells are measured at a time, each on its own node.
const parallel = 4

const pagePath = "docs/explanation/stock-beside-ours.md"

func main() {
	only := flag.String("only", "", "run only the faults whose name contains this, show everything that is left, and don't write the page")
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
		rows.WriteString(page.Row(f.name+note(f), table[i][0], table[i][1]))
	}
	if only != "" {
		return nil
	}
	if err := os.WriteFile(pagePath, []byte(head+page.Head("fault", "containerd's own handler leaves", "podfsm leaves")+rows.String()+tail()), 0o644); err != nil {
		return err
	}
	fmt.Println("wrote", pagePath)
	return nil
}

func note(f fault) string {
	if f.varies {
		return " \\*"
	}
	return ""
}

const head = `# Stock beside ours

What a fault leaves on the node: once with containerd's own handler ` + "`runc`" + `, once with podfsm's
handler, in the same binary. ` + "`make compare`" + ` writes this page and measures every cell. Pods of the
stock handler have user namespaces, too.

When the fault is over, the measurement acts as the kubelet: it restarts containerd, stops and
removes every listed pod, up to three times each, and restarts containerd again. It counts what is
there then and was not there before the fault: on the machine, in the node's network namespace and
in containerd's stores.

`

// tail explains the rows.
func tail() string {
	var text strings.Builder
	text.WriteString("\n\\* The result varies from run to run, because it depends on the moment.\n\n## The faults\n\n")
	for _, f := range faults {
		text.WriteString(page.Wrap(fmt.Sprintf("- **%s**: %s", f.name, f.what), "  "))
	}
	return text.String()
}

// measure injects a fault on a separate node and returns what it leaves.
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
		return "**containerd no longer starts**", nil
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

// remains waits for delayed cleanups, and returns what stays.
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
