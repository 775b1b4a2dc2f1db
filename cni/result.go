package cni

import (
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/containerd/errdefs"
	gocni "github.com/containerd/go-cni"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
	"github.com/containernetworking/cni/pkg/version"
)

// defaultIfName is the interface whose addresses are the pod's.
const defaultIfName = "eth0"

// Results returns the result of the last plugin of each network, in the order of Networks.
//
// Errors: FailedPrecondition when a network is not attached.
func (a *Attachment) Results() ([]*types100.Result, error) {
	results := make([]*types100.Result, 0, len(a.Networks))
	for n, network := range a.Networks {
		list, err := a.list(n)
		if err != nil {
			return nil, err
		}
		last := a.state(n, len(list.Plugins)-1)
		if last.Result == nil {
			return nil, fmt.Errorf("sandbox %q is not attached to CNI network %q: %w", a.ContainerID, network.Name, errdefs.ErrFailedPrecondition)
		}
		result, err := last.result()
		if err != nil {
			return nil, fmt.Errorf("failed to decode the result of CNI network %q: %w", network.Name, err)
		}
		results = append(results, result)
	}
	return results, nil
}

// result decodes the recorded result.
func (s PluginState) result() (*types100.Result, error) {
	result, err := create.CreateFromBytes(s.Result)
	if err != nil {
		return nil, err
	}
	return types100.NewResultFromResult(result)
}

// IPs returns the pod's address and its additional addresses: those of eth0. preference is
// containerd's ip_pref: "ipv4" and "ipv6" prefer the first address of that family, "cni" prefers
// the plugin's first address. Any other preference counts as "ipv4". Without an address of the
// family, the first address is used.
//
// Errors: those of GoCNIResult, and FailedPrecondition when eth0 has no address.
func (a *Attachment) IPs(preference string) (ip string, additional []string, err error) {
	result, err := a.GoCNIResult()
	if err != nil {
		return "", nil, err
	}
	configs := result.Interfaces[defaultIfName].IPConfigs
	if len(configs) == 0 {
		return "", nil, fmt.Errorf("CNI networks of sandbox %q gave %s no address: %w", a.ContainerID, defaultIfName, errdefs.ErrFailedPrecondition)
	}
	ip, additional = selectIPs(configs, preference)
	return ip, additional, nil
}

func selectIPs(configs []*gocni.IPConfig, preference string) (string, []string) {
	ips := make([]string, len(configs))
	preferred := -1
	for i, config := range configs {
		ips[i] = config.IP.String()
		if preferred < 0 && (preference == "cni" || isIPv6(config.IP) == (preference == "ipv6")) {
			preferred = i
		}
	}
	preferred = max(preferred, 0)
	return ips[preferred], slices.Concat(ips[:preferred], ips[preferred+1:])
}

func isIPv6(ip net.IP) bool { return ip.To4() == nil }

// GoCNIResult returns the results in go-cni's form, as containerd shows them in its verbose sandbox
// info with use_internal_loopback: without the loopback.
//
// Errors: those of Results, and FailedPrecondition when a result refers to an interface that it
// doesn't list.
func (a *Attachment) GoCNIResult() (*gocni.Result, error) {
	results, err := a.Results()
	if err != nil {
		return nil, err
	}
	merged := &gocni.Result{Interfaces: map[string]*gocni.Config{defaultIfName: {}}}
	for n, result := range results {
		if err := merge(merged, result); err != nil {
			return nil, fmt.Errorf("result of CNI network %q is invalid: %w: %w", a.Networks[n].Name, err, errdefs.ErrFailedPrecondition)
		}
	}
	return merged, nil
}

// merge adds the result of one network.
func merge(merged *gocni.Result, result *types100.Result) error {
	for _, i := range result.Interfaces {
		if i == nil {
			return errors.New("an interface is null")
		}
		merged.Interfaces[i.Name] = &gocni.Config{Mac: i.Mac, Sandbox: i.Sandbox, PciID: i.PciID, SocketPath: i.SocketPath}
	}
	for _, ip := range result.IPs {
		if ip == nil || len(ip.Address.IP) == 0 {
			return errors.New("an address is null")
		}
		name := defaultIfName // a plugin need not list interfaces
		if ip.Interface != nil {
			if i := *ip.Interface; i < 0 || i >= len(result.Interfaces) {
				return fmt.Errorf("address %v is on interface %d of %d", ip.Address.IP, i, len(result.Interfaces))
			}
			name = result.Interfaces[*ip.Interface].Name
		}
		merged.Interfaces[name].IPConfigs = append(merged.Interfaces[name].IPConfigs, &gocni.IPConfig{IP: ip.Address.IP, Gateway: ip.Gateway})
	}
	merged.DNS = append(merged.DNS, result.DNS)
	merged.Routes = append(merged.Routes, result.Routes...)
	return nil
}

// lastResult returns the previous result for DEL, in the version of the list: the result of the
// last plugin whose ADD succeeded. It is nil if no ADD succeeded, and before CNI 0.4.0, which had
// no previous result for DEL.
func (a *Attachment) lastResult(network int, list *libcni.NetworkConfigList) (types.Result, error) {
	if known, err := version.GreaterThanOrEqualTo(list.CNIVersion, "0.4.0"); err != nil || !known {
		return nil, err
	}
	for p := len(list.Plugins) - 1; p >= 0; p-- {
		state := a.state(network, p)
		if state.Result == nil {
			continue
		}
		result, err := create.CreateFromBytes(state.Result)
		if err == nil {
			result, err = result.GetAsVersion(list.CNIVersion)
		}
		if err != nil {
			return nil, fmt.Errorf("failed to decode the recorded result of CNI plugin %q: %w: %w", state.Type, err, errdefs.ErrDataLoss)
		}
		return result, nil
	}
	return nil, nil
}
