package harness

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Attach returns a node whose containerd somebody else runs, such as systemd, in
// this machine's own namespaces, with its socket in its state directory dir. CRI
// serves when it returns. The node's methods that start or end a daemon, or look
// at its process, aren't for it.
func Attach(ctx context.Context, dir string) (*Node, error) {
	n := &Node{dir: dir, name: filepath.Base(dir)}
	// Pods that other processes have made have ranges, too.
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
