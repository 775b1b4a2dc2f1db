// Command conformance runs the public test suite of the CRI, critest, against an unmodified
// containerd and against containerd-podfsm with podfsm's handler as the default. It fails if a spec
// fails with podfsm that passes with stock. It leaves nothing behind, except for AppArmor profiles
// that critest loads, and empty cgroups of pods that were being made when it was interrupted.
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
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/integration/harness"
)

func main() {
	focus := flag.String("focus", "", "run the specs alone whose text matches this `pattern`")
	parallel := flag.Int("parallel", 4, "run so many specs at a time on each side")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := run(ctx, *focus, *parallel); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, focus string, parallel int) error {
	if err := harness.Sweep(ctx); err != nil {
		return err
	}
	bin, err := harness.BuildCritest(ctx)
	if err != nil {
		return err
	}
	images, err := harness.CritestImages(ctx)
	if err != nil {
		return fmt.Errorf("failed to make critest's images: %w", err)
	}
	stock, podfsm, err := suite{bin, images, focus, parallel, time.Now().Unix()}.both(ctx)
	if err != nil {
		return err
	}
	rows := table(stock, podfsm)
	show(os.Stdout, rows)
	if focus != "" {
		return errors.Join(lists{races: races}.check(rows), enough(stock, 1))
	}
	return errors.Join(lists{deviations, withoutImages, races}.check(rows), enough(stock, fewest))
}

// both runs the specs on both sides in parallel: most of their time is waiting.
func (s suite) both(ctx context.Context) (stock, podfsm map[string]result, err error) {
	sides, sideCtx := errgroup.WithContext(ctx)
	sides.Go(func() (err error) {
		stock, err = s.run(sideCtx, "stock", harness.Stock, harness.StockHandler)
		return err
	})
	sides.Go(func() (err error) {
		podfsm, err = s.run(sideCtx, "podfsm", harness.Podfsm, harness.PodfsmHandler)
		return err
	})
	if err := sides.Wait(); err != nil {
		return nil, nil, err
	}
	harness.RemoveEmptyDirs()
	left, err := harness.Leftovers()
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("nodes left resources on the machine: %q", left)
	}
	return stock, podfsm, err
}
