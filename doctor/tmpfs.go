package doctor

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/podfsm/podfsm/userns"
)

// tmpfs tries an idmapped mount of a tmpfs, on which almost every pod has its service account
// token. Without such mounts, a handler that maps every pod runs almost none. A handler of mode
// kubelet still runs all pods without a user namespace.
func tmpfs(_ context.Context, n Node) []Finding {
	err := n.Tmpfs()
	if err == nil {
		return []Finding{ok("tmpfs could be mounted with mapped ids")}
	}
	if !errdefs.IsFailedPrecondition(err) {
		return []Finding{unknown(err.Error(), "find out what keeps root from mounting a tmpfs: a security module, or the container that the node itself is")}
	}
	evidence := fmt.Sprintf("tmpfs can't be mounted with mapped ids: %v; a pod with a user namespace can't have a service account token, "+
		"a volume secret, projected or downwardAPI, or an emptyDir in memory", err)
	asked := warn(evidence, "upgrade to Linux 6.3 or later; until then set automountServiceAccountToken: false in pods with hostUsers: false, or hostUsers: true")
	asked.Stops = TmpfsPods
	if n.Config == nil {
		return []Finding{asked}
	}
	mapsAll := func(h Handler) bool { return h.Mode == userns.ModeAuto || h.Mode == userns.ModeNode }
	var found []Finding
	for _, g := range grouped(n.Config.Handlers, mapsAll, equal) {
		f := asked
		if g.of {
			f = fail(TmpfsPods, evidence, "upgrade to Linux 6.3 or later, or set mode = \"kubelet\" for the handler")
		}
		f.Subject, f.Handlers = g.subject(), g.handlers
		found = append(found, f)
	}
	return orNone(found)
}
