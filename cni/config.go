package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"
)

// Config is the CNI section of containerd's CRI configuration, with the runtime handler's own cni_conf_dir and cni_max_conf_num
// already in place of the general ones.
type Config struct {
	BinDirs      []string // where plugins are searched, in order
	ConfDir      string   // where the networks are configured
	MaxConfNum   int      // how many networks a pod is attached to, the first ones by file name; 0 or less is all
	Serial       bool     // attach to one network after the other, not to all at once
	IPPreference string   // for [Attachment.IPs]: ipv4, ipv6 or cni
}

// Network is a network as it was configured when it was read.
type Network struct {
	Name   string `json:"name"`
	IfName string `json:"ifName"` // of the interface in the pod: eth0 for the first network, eth1, …
	// Conflist is the complete network configuration list, with the plugins of separate files inlined.
	Conflist json.RawMessage `json:"conflist"`
}

// conflist is the form in which configurations are kept. Other keys at the top of a list don't
// reach any plugin.
type conflist struct {
	Name                   string            `json:"name"`
	CNIVersion             string            `json:"cniVersion"`
	DisableCheck           bool              `json:"disableCheck,omitempty"`
	DisableGC              bool              `json:"disableGC,omitempty"`
	LoadOnlyInlinedPlugins bool              `json:"loadOnlyInlinedPlugins"`
	Plugins                []json.RawMessage `json:"plugins"`
}

// Load reads the networks that a new pod is attached to, by the rules of containerd's go-cni: the
// files *.conflist, *.conf and *.json of ConfDir in the order of their names. A *.conf or *.json
// file holds one plugin. The first MaxConfNum files must all be valid. Load doesn't check that the
// plugins exist.
//
// Errors: FailedPrecondition when there is no network or one is invalid, with the remedy.
func Load(config Config) ([]Network, error) {
	files, err := libcni.ConfFiles(config.ConfDir, []string{".conflist", ".conf", ".json"})
	if err != nil {
		return nil, fmt.Errorf("failed to read the CNI configuration directory: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no CNI network is configured: put a *.conflist into %q, as a network add-on does when it is ready: %w", config.ConfDir, errdefs.ErrFailedPrecondition)
	}
	slices.Sort(files)
	if config.MaxConfNum > 0 {
		files = files[:min(config.MaxConfNum, len(files))]
	}
	networks := make([]Network, 0, len(files))
	for i, file := range files {
		network, err := loadFile(file)
		if err != nil {
			return nil, fmt.Errorf("CNI configuration %q is invalid, correct or remove it: %w: %w", file, err, errdefs.ErrFailedPrecondition)
		}
		network.IfName = fmt.Sprintf("eth%d", i)
		networks = append(networks, network)
	}
	return networks, nil
}

func loadFile(file string) (Network, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return Network{}, err
	}
	if filepath.Ext(file) != ".conflist" {
		return networkOfConf(data)
	}
	list, err := libcni.NetworkConfFromBytes(data)
	if err != nil {
		return Network{}, err
	}
	if !list.LoadOnlyInlinedPlugins {
		// The name becomes part of a path.
		if err := utils.ValidateNetworkName(list.Name); err != nil {
			return Network{}, err
		}
		more, err := libcni.NetworkPluginConfsFromFiles(filepath.Dir(file), list.Name)
		if err != nil {
			return Network{}, err
		}
		list.Plugins = append(list.Plugins, more...)
	}
	return networkOfList(list)
}

// networkOfConf returns a network with the only plugin of a *.conf file.
func networkOfConf(data []byte) (Network, error) {
	conf, err := libcni.NetworkPluginConfFromBytes(data)
	if err != nil {
		return Network{}, err
	}
	return networkOfList(&libcni.NetworkConfigList{
		Name:       conf.Network.Name,
		CNIVersion: conf.Network.CNIVersion,
		Plugins:    []*libcni.PluginConfig{conf},
	})
}

// networkOfList returns a list in the form that is kept, and checks that this form can be read
// again.
func networkOfList(list *libcni.NetworkConfigList) (Network, error) {
	kept := conflist{
		Name:                   list.Name,
		CNIVersion:             list.CNIVersion,
		DisableCheck:           list.DisableCheck,
		DisableGC:              list.DisableGC,
		LoadOnlyInlinedPlugins: true,
	}
	for _, plugin := range list.Plugins {
		kept.Plugins = append(kept.Plugins, plugin.Bytes)
	}
	data, err := json.Marshal(kept)
	if err != nil {
		return Network{}, err
	}
	network := Network{Name: list.Name, Conflist: data}
	if _, err := network.list(); err != nil {
		return Network{}, err
	}
	return network, nil
}

// list parses and validates the configuration list.
func (n Network) list() (*libcni.NetworkConfigList, error) {
	list, err := libcni.NetworkConfFromBytes(n.Conflist)
	if err != nil {
		return nil, err
	}
	if err := utils.ValidateNetworkName(list.Name); err != nil {
		return nil, err
	}
	// No version at all is 0.1.0.
	if list.CNIVersion != "" && !slices.Contains(version.All.SupportedVersions(), list.CNIVersion) {
		return nil, fmt.Errorf("invalid cniVersion %q: supported are %s", list.CNIVersion, strings.Join(version.All.SupportedVersions(), ", "))
	}
	if len(list.Plugins) == 0 {
		return nil, errors.New("the list has no plugin")
	}
	for _, plugin := range list.Plugins {
		if strings.ContainsRune(plugin.Network.Type, os.PathSeparator) {
			return nil, fmt.Errorf("invalid plugin type %q: not a file name", plugin.Network.Type)
		}
	}
	return list, nil
}
