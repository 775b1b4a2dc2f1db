package doctor

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/podfsm/podfsm/userns"
)

// idPool checks subuid(5) and subgid(5), if the pool is from these files.
func idPool(_ context.Context, n Node) []Finding {
	switch {
	case n.Config == nil:
		return n.unconfigured()
	case !n.Config.Pool:
		return []Finding{ok("no pool is configured")}
	case n.Config.PoolUser == "":
		return []Finding{ok("the pool is userns_pool.ranges")}
	}
	subuid, subgid := filepath.Join(n.Etc, "subuid"), filepath.Join(n.Etc, "subgid")
	ranges, err := userns.SubIDs(n.Config.PoolUser, subuid, subgid)
	if err != nil {
		return []Finding{fail(NoPods, err.Error(), fmt.Sprintf("give user %q at least 65536 ids, from a multiple of 65536 up, in both files", n.Config.PoolUser))}
	}
	var uids, gids uint64
	for _, e := range ranges.UIDs {
		uids += e.Size
	}
	for _, e := range ranges.GIDs {
		gids += e.Size
	}
	return []Finding{ok(fmt.Sprintf("user %q has %d uids and %d gids in %s and %s", n.Config.PoolUser, uids, gids, subuid, subgid))}
}
