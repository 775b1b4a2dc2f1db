package cni

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
)

// checkTimeout is how long one plugin's CHECK may run.
const checkTimeout = 30 * time.Second

// Check asks the plugins whether the pod is attached to its networks as ADD has left it (CNI specification, CHECK). Networks below
// CNI 0.4.0, and those that say disableCheck, are left out. Nothing is changed or recorded. A plugin that says no keeps those behind
// it in its chain from being asked, as the specification wants; the other networks are asked all the same. A plugin that has no CHECK is
// passed over.
//
// sysctls are those that the pod itself has asked for. They were set after ADD, and a plugin that had set another value isn't asked for
// that one.
//
// Errors: FailedPrecondition when the pod isn't attached or a plugin is missing; DeadlineExceeded or Canceled when a plugin was ended;
// otherwise the plugin's own, a *types.Error.
func (d *Driver) Check(ctx context.Context, a *Attachment, sysctls map[string]string) error {
	errs := make([]error, len(a.Networks))
	for n := range a.Networks {
		errs[n] = d.checkNetwork(ctx, a, n, sysctls)
	}
	return errors.Join(errs...)
}

func (d *Driver) checkNetwork(ctx context.Context, a *Attachment, network int, sysctls map[string]string) error {
	list, err := a.list(network)
	if err != nil {
		return err
	}
	if known, err := since(list, "0.4.0"); err != nil || !known || list.DisableCheck {
		return err
	}
	result, err := a.lastResult(network, list)
	if err != nil {
		return err
	}
	for p := range list.Plugins {
		if state := a.state(network, p); state.Phase != Added {
			return fmt.Errorf("sandbox %q is not attached to CNI network %q: plugin %q is %q: %w", a.ContainerID, list.Name, state.Type, state.Phase, errdefs.ErrFailedPrecondition)
		}
		c := call{driver: d, attachment: a, network: network, plugin: p, list: list, netns: a.NetNSPath, sysctls: sysctls}
		if err := c.check(ctx, result); err != nil && !lacksCheck(err) {
			return err
		}
	}
	return nil
}

// lacksCheck tells whether a plugin has no CHECK, although it speaks a version of CNI that has one, as whereabouts: that says nothing of
// the pod.
func lacksCheck(err error) bool {
	var refused *types.Error
	return errors.As(err, &refused) && strings.Contains(refused.Msg, "not implemented")
}

// since says whether a list is of a version of the CNI specification or of a later one.
func since(list *libcni.NetworkConfigList, cniVersion string) (bool, error) {
	return version.GreaterThanOrEqualTo(list.CNIVersion, cniVersion)
}
