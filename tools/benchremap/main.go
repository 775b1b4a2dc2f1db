// Command benchremap measures the cost of giving the files of an image the owners of a user
// namespace: by chown(1), which any node can run, and by each strategy of podfsm's snapshotter. It
// writes docs/explanation/remap-bench.md and leaves nothing else behind.
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
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

const (
	pagePath = "docs/explanation/remap-bench.md"
	folder   = ".build/bench-remap"
)

func main() {
	only := flag.String("only", "", "measure the images whose name contains this alone, and don't write the page")
	rounds := flag.Int("rounds", 5, "how often each cell is measured")
	flag.Parse()
	_ = log.SetLevel("warn") // a valid level
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
	if err := errors.Join(remove(dir), os.MkdirAll(dir, 0o755)); err != nil { // a killed run may have left the directory
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
	if err := os.WriteFile(pagePath, []byte(text(machine, rounds, results)), 0o644); err != nil {
		return err
	}
	fmt.Println("wrote", pagePath)
	return nil
}

// remove removes a directory with its mounts.
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
