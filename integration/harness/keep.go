package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// keepEnv keeps the nodes of tests after their end, for debugging.
const keepEnv = "PODFSM_KEEP"

// keptMark is a file in the directory of a node that Sweep leaves alone.
const keptMark = "kept"

// keep leaves the node with its daemon and its pods in place after its test, and logs how to reach
// and remove it.
func (n *Node) keep(t testing.TB) {
	t.Helper()
	shell, err := n.WriteShell(context.WithoutCancel(t.Context()))
	if err != nil {
		t.Errorf("failed to write a program for a shell on node %q: %v", n.name, err)
	}
	if err := os.WriteFile(n.path(keptMark), nil, 0o644); err != nil {
		t.Errorf("failed to keep node %q: %v", n.name, err)
	}
	if n.Traces != nil {
		n.Traces.Close()
	}
	n.disconnect()
	n.lock.Close()
	forget(n.dir)
	t.Logf("node %s stays:\n  shell:   %s\n  daemon:  %s\n  log:     %s\n  socket:  %s\n  remove:  make sweep",
		n.name, shell, n.describeDaemon(), n.path("containerd.log"), n.Socket())
}

func (n *Node) describeDaemon() string {
	if n.daemon == nil {
		return fmt.Sprintf("is down; in the shell, %s --config config.toml starts it", n.executable)
	}
	return fmt.Sprintf("process %d", n.Pid())
}

// forget removes a node from those that Leftovers looks for.
func forget(dir string) {
	made.Lock()
	defer made.Unlock()
	made.dirs = slices.DeleteFunc(made.dirs, func(other string) bool { return other == dir })
}

func isKept(dir string) bool {
	_, err := os.Lstat(filepath.Join(dir, keptMark))
	return err == nil
}

// SweepKept removes the nodes that tests have kept, and what Sweep removes.
func SweepKept(ctx context.Context) error {
	marks, err := filepath.Glob(filepath.Join(os.TempDir(), dirPattern, keptMark))
	if err != nil {
		return err
	}
	var errs []error
	for _, mark := range marks {
		errs = append(errs, os.Remove(mark))
	}
	return errors.Join(append(errs, Sweep(ctx))...)
}
