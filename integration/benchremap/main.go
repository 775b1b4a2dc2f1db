// Command benchremap measures what it costs to give the files of an image the owners of a user namespace: with chown(1), as a node
// without anything better would, and with each strategy of podfsm's snapshotter. It writes docs/remap-bench.md and leaves nothing behind.
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
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

const (
	page   = "docs/remap-bench.md"
	folder = ".build/bench-remap"
)

func main() {
	only := flag.String("only", "", "measure the images whose name contains this alone, and don't write the page")
	rounds := flag.Int("rounds", 5, "how often each cell is measured")
	flag.Parse()
	_ = log.SetLevel("warn") // one that it knows
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := run(ctx, *only, *rounds); err != nil {
		fmt.Fprintln(os.Stderr, "benchremap:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, only string, rounds int) (err error) {
	dir, err := filepath.Abs(folder)
	if err != nil {
		return err
	}
	if err := errors.Join(remove(dir), os.MkdirAll(dir, 0o755)); err != nil { // it may be of a run that was killed
		return err
	}
	defer func() { err = errors.Join(err, remove(dir)) }()
	machine, err := machine(dir)
	if err != nil {
		return err
	}
	results := make([][]series, len(published))
	for i, img := range published {
		if !strings.Contains(img.name, only) {
			continue
		}
		if results[i], err = measure(ctx, filepath.Join(dir, "image"), img, rounds); err != nil {
			return fmt.Errorf("failed to measure image %q: %w", img.name, err)
		}
		fmt.Println(table(img, results[i]))
	}
	if only != "" {
		return nil
	}
	if err := os.WriteFile(page, []byte(text(machine, rounds, results)), 0o644); err != nil {
		return err
	}
	fmt.Println("wrote", page)
	return nil
}

// remove removes a directory and what is mounted in it.
func remove(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if err := mount.UnmountAll(m.Mountpoint, unix.MNT_DETACH); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}
