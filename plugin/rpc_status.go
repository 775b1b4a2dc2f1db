package plugin

import (
	"context"

	"github.com/containerd/containerd/v2/version"
	"google.golang.org/protobuf/types/known/timestamppb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/show"
)

// Status returns the state of podfsm, also while it is degraded.
func (a *api) Status(context.Context, *podfsmv1.StatusRequest) (*podfsmv1.StatusResponse, error) {
	c := a.controller
	response := &podfsmv1.StatusResponse{}
	if c.engine != nil {
		response = show.Status(c.engine.List())
		response.LastRecovery = c.recovery.status()
	}
	response.Version, response.ContainerdVersion = thisRelease(), version.Version
	response.StartedAt = timestamppb.New(c.started)
	response.Degraded = show.Text(c.refused())
	if since, draining := c.drain.draining(); draining {
		response.DrainingSince = timestamppb.New(since)
	}
	if c.node != nil && c.node.ids != nil {
		if free, held, quarantined, ok := c.node.ids.Usage(); ok {
			response.IdPool = &podfsmv1.IDPoolUse{Free: uint32(free), Held: uint32(held), Quarantined: uint32(quarantined)}
		}
	}
	if c.doctor != nil {
		response.FailedChecks = c.doctor.FailedChecks()
	}
	return response, nil
}
