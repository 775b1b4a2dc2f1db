package plugin

import (
	"cmp"
	"context"
	"slices"

	"github.com/containerd/errdefs/pkg/errgrpc"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/show"
)

// Leaks returns leaked resources, and removes them on request. A second search tells what was
// removed.
func (a *api) Leaks(ctx context.Context, r *podfsmv1.LeaksRequest) (*podfsmv1.LeaksResponse, error) {
	if _, err := a.engine(); err != nil {
		return nil, err
	}
	response, err := a.leaks(ctx, r)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return response, nil
}

func (a *api) leaks(ctx context.Context, r *podfsmv1.LeaksRequest) (*podfsmv1.LeaksResponse, error) {
	found, err := a.controller.leaks(ctx)
	if err != nil {
		return nil, err
	}
	found, err = show.LeaksOf(found, r.GetSandboxes())
	if err != nil {
		return nil, err
	}
	left, failed := found, map[string]error{}
	if r.GetFix() && len(found) > 0 {
		failed = a.controller.fix(ctx, found)
		if left, err = a.controller.leaks(ctx); err != nil {
			return nil, err
		}
	}
	response := &podfsmv1.LeaksResponse{}
	for _, thing := range found {
		leak := show.Leak(thing)
		leak.Removed = !slices.Contains(left, thing)
		if r.GetFix() && !leak.Removed {
			leak.Error = cmp.Or(show.Text(failed[thing.ID]), "still there after the removal")
		}
		response.Leaks = append(response.Leaks, leak)
	}
	response.DamagedLedgerFiles, err = a.controller.ledger.Aside()
	return response, err
}
