package harness

import (
	"context"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

// Sandboxes returns a client of podfsm's own API on the running daemon.
func (n *Node) Sandboxes() podfsmv1.SandboxesClient { return podfsmv1.NewSandboxesClient(n.conn) }

// countLedger lists the sandboxes of podfsm that have not ended.
func (n *Node) countLedger(ctx context.Context, c Census) error {
	list, err := n.Sandboxes().List(ctx, &podfsmv1.ListRequest{})
	if status.Code(err) == codes.Unimplemented {
		return nil // containerd without podfsm
	}
	if err != nil {
		return fmt.Errorf("failed to list podfsm's sandboxes: %w", err)
	}
	for _, s := range list.GetSandboxes() {
		c.add(Ledger, "%s/%s %s %s", s.GetContainerdNamespace(), s.GetId(), s.GetState(), s.GetGoal())
	}
	return nil
}

// countHostIDs lists the holders of host ids, as podfsm reports them.
func (n *Node) countHostIDs(ctx context.Context, c Census) error {
	ids, err := n.Sandboxes().IDs(ctx, &podfsmv1.IDsRequest{})
	if status.Code(err) == codes.Unimplemented {
		return nil
	}
	if err != nil {
		return fmt.Errorf("failed to list the holders of ids: %w", err)
	}
	for _, h := range ids.GetHolders() {
		c.add(HostIDs, "%s/%s %s/%s %s", h.GetContainerdNamespace(), h.GetSandboxId(), h.GetPodNamespace(), h.GetPodName(), h.GetUserns())
	}
	return nil
}
