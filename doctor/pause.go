package doctor

import (
	"context"
	"errors"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/pause"
)

// pauseProgram runs podfsm-init in new namespaces of every kind.
func pauseProgram(ctx context.Context, n Node) []Finding {
	path := ""
	if n.Config != nil {
		path = n.Config.InitPath
	}
	if path == "" {
		found, err := pause.FindInit()
		if err != nil && n.Daemon == 0 && n.Stock == nil {
			return down() // the daemon searches beside its own executable and in its own PATH
		}
		if err != nil {
			return []Finding{fail(AllPods, err.Error(), "install podfsm-init of the same release beside the daemon's executable, or set init_path")}
		}
		path = found
	}
	version, err := pause.Examine(ctx, path)
	switch {
	case err == nil:
		return []Finding{ok(path + ": " + version + ", runs in namespaces of every kind")}
	case errdefs.IsNotFound(err), errdefs.IsFailedPrecondition(err):
		return []Finding{fail(AllPods, err.Error(), "install podfsm-init of the same release as the daemon, and restart containerd")}
	case errors.Is(err, unix.ENOSPC):
		return []Finding{fail(AllPods, err.Error(), "raise the sysctls user.max_*_namespaces: the kernel refuses a new namespace")}
	default:
		return []Finding{fail(AllPods, err.Error(), "find out what keeps root from making namespaces: a security module, or the container that the node itself is")}
	}
}
