package plugin

import (
	"context"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/show"
)

// IDs returns the holders of host ids, and the state of the pool.
func (a *api) IDs(ctx context.Context, _ *podfsmv1.IDsRequest) (*podfsmv1.IDsResponse, error) {
	if _, err := a.engine(); err != nil {
		return nil, err
	}
	return show.IDs(a.controller.node.ids.Overview(ctx)), nil
}
