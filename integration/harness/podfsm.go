package harness

import (
	"context"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

// Sandboxes is podfsm's own API on the running daemon.
func (n *Node) Sandboxes() podfsmv1.SandboxesClient { return podfsmv1.NewSandboxesClient(n.conn) }

// countLedger lists the sandboxes that podfsm is not done with.
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
