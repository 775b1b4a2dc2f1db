package harness

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Attach returns a node for a containerd that it did not start, such as one of systemd's. It runs
// in this machine's namespaces and has its socket in its state directory dir. CRI serves when
// Attach returns. Methods that start, end or examine the daemon's process must not be used.
func Attach(ctx context.Context, dir string) (*Node, error) {
	n := &Node{dir: dir, name: filepath.Base(dir)}
	// Pods of other processes have id ranges, too.
	n.ranges.Store(rand.Uint32N(30_000))
	if err := n.connect(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, Patience(startTimeout))
	defer cancel()
	err := poll(ctx, pollInterval, func() error {
		_, err := n.Runtime.Status(ctx, &runtime.StatusRequest{})
		return err
	})
	if err != nil {
		n.disconnect()
		return nil, fmt.Errorf("containerd in %q does not serve: %w", dir, err)
	}
	return n, nil
}
