package cluster

import (
	"context"
	"errors"
	"fmt"

	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/integration/kubelet"
)

// OneNode is a cluster of one node: a control plane, and the node's kubelet.
type OneNode struct {
	*ControlPlane
	Kubelet *kubelet.Kubelet
}

// New starts a cluster on a node that has run a pod and so has a bridge: the control plane from a
// folder of programs, and a kubelet. The node joins as soon as the kubelet has asked the API
// server. The caller closes the kubelet, then the control plane; both end with the node, too.
func New(ctx context.Context, n *harness.Node, programs, executable string) (_ *OneNode, err error) {
	c := &OneNode{}
	if c.ControlPlane, err = NewControlPlane(ctx, n, programs); err != nil {
		return nil, err
	}
	c.Kubelet, err = kubelet.New(ctx, n, kubelet.Config{
		Executable: executable,
		Kubeconfig: c.Kubeconfig("system:node:" + kubelet.NodeName),
		Settings:   map[string]any{"address": "0.0.0.0"}, // reachable for the API server
	})
	if err != nil {
		err = fmt.Errorf("%w; the ends of the control plane's logs:\n%s", err, c.LogTails(30))
		return nil, errors.Join(err, c.ControlPlane.Close(context.WithoutCancel(ctx)))
	}
	return c, nil
}
