package cni

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/podfsm/podfsm/tracing"
)

// checkTimeout is how long one plugin's CHECK may run. Cilium's plugin tries to reach its agent for 30 seconds before it answers.
const checkTimeout = 45 * time.Second

// Check asks the plugins whether the pod is still attached as ADD left it (CNI specification,
// CHECK). It changes and records nothing. Networks below CNI 0.4.0, and networks with disableCheck,
// are skipped, and so are plugins that have no CHECK or ask for a later try. If a plugin fails, the
// plugins behind it in its chain are not asked, as the specification requires. The other networks
// are.
//
// sysctls are those of the pod, which were set after ADD. A plugin that had set one of them to
// another value is not asked about that sysctl. No plugin is asked about the IPv6 addresses and
// routes of an interface without IPv6.
//
// Errors: FailedPrecondition when the pod isn't attached or a plugin is missing; DeadlineExceeded
// or Canceled when a plugin was killed; otherwise the plugin's own, a *types.Error.
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
	if disablesIPv6(sysctls, a.Networks[network].IfName) {
		if result, err = withoutIPv6(result, list.CNIVersion); err != nil {
			return err
		}
	}
	for p := range list.Plugins {
		if state := a.state(network, p); state.Phase != Added {
			return fmt.Errorf("sandbox %q is not attached to CNI network %q: plugin %q is %q: %w", a.ContainerID, list.Name, state.Type, state.Phase, errdefs.ErrFailedPrecondition)
		}
		c := call{driver: d, attachment: a, network: network, plugin: p, list: list, netns: a.NetNSPath, sysctls: sysctls}
		err := c.check(ctx, result)
		switch {
		case lacksCheck(err):
		case wantsLater(err):
			tracing.Log(ctx).WithError(err).Info("CNI plugin can't check the pod now")
		case err != nil:
			return err
		}
	}
	return nil
}

// lacksCheck reports whether a plugin has no CHECK, although its CNI version requires one, as
// whereabouts. Its error says nothing about the pod.
func lacksCheck(err error) bool {
	var refused *types.Error
	return errors.As(err, &refused) && strings.Contains(refused.Msg, "not implemented")
}

// disablesIPv6 reports whether sysctls have removed the IPv6 addresses of an interface. A later
// sysctl that enables IPv6 again doesn't restore them.
func disablesIPv6(sysctls map[string]string, ifName string) bool {
	for name, value := range sysctls {
		switch sysctlFile(name, ifName) {
		case "net/ipv6/conf/all/disable_ipv6", sysctlFile("net/ipv6/conf/IFNAME/disable_ipv6", ifName):
			if strings.TrimSpace(value) != "0" {
				return true
			}
		}
	}
	return false
}

// withoutIPv6 returns a result without its IPv6 addresses and routes, in a version of CNI.
func withoutIPv6(result types.Result, cniVersion string) (types.Result, error) {
	if result == nil {
		return nil, nil
	}
	current, err := types100.NewResultFromResult(result)
	if err != nil {
		return nil, fmt.Errorf("failed to convert its result: %w", err)
	}
	current.IPs = slices.DeleteFunc(current.IPs, func(c *types100.IPConfig) bool { return c != nil && isIPv6(c.Address.IP) })
	current.Routes = slices.DeleteFunc(current.Routes, func(r *types.Route) bool { return r != nil && isIPv6(r.Dst.IP) })
	return current.GetAsVersion(cniVersion)
}

// wantsLater reports whether a plugin can't check the pod at the moment (CNI specification, error
// code 11), as Cilium's without its agent. Its error says nothing about the pod, either.
func wantsLater(err error) bool {
	var refused *types.Error
	return errors.As(err, &refused) && refused.Code == types.ErrTryAgainLater
}

// since reports whether the CNI version of a list is cniVersion or later.
func since(list *libcni.NetworkConfigList, cniVersion string) (bool, error) {
	return version.GreaterThanOrEqualTo(list.CNIVersion, cniVersion)
}
