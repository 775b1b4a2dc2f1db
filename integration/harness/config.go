package harness

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// MetricsAddress is where the daemon serves Prometheus metrics, in the node's
// network namespace, below /v1/metrics.
const MetricsAddress = "127.0.0.1:1338"

// Gateway is the address of the node's bridge, and Subnet that of its pods.
const (
	Gateway = "10.88.0.1"
	Subnet  = "10.88.0.0/16"
)

// settings is a TOML table.
type settings = map[string]any

// writeConfig writes config.toml: containerd's defaults with every path inside the node's
// directory, and c's TOML merged over it.
func (n *Node) writeConfig(c Config) error {
	config := n.config(c.Handlers)
	if c.TOML != "" {
		var more settings
		if err := toml.Unmarshal([]byte(c.TOML), &more); err != nil {
			return fmt.Errorf("failed to parse the extra configuration: %w", err)
		}
		merge(config, more)
	}
	data, err := toml.Marshal(config)
	if err != nil {
		return err
	}
	return os.WriteFile(n.path("config.toml"), data, 0o644)
}

func (n *Node) config(handlers []string) settings {
	return settings{
		"version":          4,
		"root":             n.path("root"),
		"state":            n.path("state"),
		"temp":             n.path("tmp"),
		"imports":          []string{}, // the default reads /etc/containerd/conf.d
		"disabled_plugins": []string{"io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.btrfs"},
		"debug":            settings{"level": "debug"},
		"plugins": settings{
			"io.containerd.server.v1.grpc":           settings{"address": n.Socket()},
			"io.containerd.server.v1.ttrpc":          settings{"address": n.Socket() + ".ttrpc"},
			"io.containerd.server.v1.metrics":        settings{"address": MetricsAddress},
			"io.containerd.server.v1.debug":          settings{"address": n.debugSocket()},
			"io.containerd.shim.v1.manager":          settings{"socket_dir": n.path("s")}, // default: /run/containerd/s
			"io.containerd.internal.v1.opt":          settings{"path": n.path("opt")},
			"io.containerd.image-verifier.v1.bindir": settings{"bin_dir": n.path("opt/image-verifier")},
			"io.containerd.nri.v1.nri":               settings{"disable": true, "socket_path": n.path("nri.sock"), "plugin_path": n.path("opt/nri"), "plugin_config_path": n.path("nri.d")},
			"io.containerd.cri.v1.images":            settings{"pinned_images": settings{"sandbox": PauseImage}},
			// Collect garbage after every removal, for up to half of the time, so that unprotected
			// objects vanish soon.
			"io.containerd.gc.v1.scheduler": settings{"deletion_threshold": 1, "pause_threshold": 0.5},
			"io.containerd.cri.v1.runtime":  n.criConfig(handlers),
		},
	}
}

func (n *Node) criConfig(handlers []string) settings {
	handler := func(sandboxer string) settings {
		return settings{
			"runtime_type": "io.containerd.runc.v2",
			"sandboxer":    sandboxer,
			"options": settings{
				"BinaryName":    n.path("bin/runc"),
				"Root":          n.path("state/runc"), // default: /run/containerd/runc
				"SystemdCgroup": systemdCgroups,
			},
		}
	}
	runtimes := settings{
		StockHandler:  handler("podsandbox"),
		PodfsmHandler: handler("podfsm"),
	}
	for _, name := range handlers {
		runtimes[name] = handler("podfsm")
	}
	return settings{
		"cdi_spec_dirs":                []string{n.path("cdi")},
		"netns_mounts_under_state_dir": true, // default: /var/run/netns
		// Without CAP_SYS_RESOURCE, as in many virtual machines for tests, the OOM score of pause
		// can not be lowered.
		"restrict_oom_score_adj": true,
		"cni": settings{
			"bin_dirs": []string{n.path("cni/bin")},
			"conf_dir": n.CNIConfDir(),
		},
		"containerd": settings{
			"default_runtime_name": StockHandler,
			"runtimes":             runtimes,
		},
	}
}

// merge copies from into to, table by table.
func merge(to, from settings) {
	for key, value := range from {
		table, isTable := value.(settings)
		below, hasTable := to[key].(settings)
		if isTable && hasTable {
			merge(below, table)
			continue
		}
		to[key] = value
	}
}

// Plugin is the configuration of one CNI plugin.
type Plugin = map[string]any

// DefaultChain returns the CNI chain a node starts with: a bridge with
// masquerade and host-local addresses, then port mappings.
func (n *Node) DefaultChain() []Plugin {
	return []Plugin{
		{
			"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
			"ipam": map[string]any{
				"type":    "host-local",
				"dataDir": n.path("cni/ipam"), // default: /var/lib/cni/networks
				"ranges":  [][]map[string]string{{{"subnet": Subnet, "gateway": Gateway}}},
				"routes":  []map[string]string{{"dst": "0.0.0.0/0"}},
			},
		},
		{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}},
	}
}

// SetChain replaces the CNI chain of the node and waits until a running daemon has loaded it.
// Without plugins, the node has no network. The network has the name of the node, because all
// daemons of a machine share libcni's default cache, whose key is the network.
func (n *Node) SetChain(ctx context.Context, plugins ...Plugin) error {
	return n.SetChainOf(ctx, "1.0.0", plugins...)
}

// SetChainOf is SetChain with a version of the CNI specification.
func (n *Node) SetChainOf(ctx context.Context, cniVersion string, plugins ...Plugin) error {
	var list []byte
	path := filepath.Join(n.CNIConfDir(), "10-pods.conflist")
	if len(plugins) == 0 {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	} else {
		var err error
		list, err = json.MarshalIndent(map[string]any{"cniVersion": cniVersion, "name": n.name, "plugins": plugins}, "", "  ")
		if err != nil {
			return err
		}
		// A rename within the directory: containerd ignores a file that is renamed into it from
		// elsewhere.
		next := filepath.Join(n.CNIConfDir(), "next")
		if err := os.WriteFile(next, list, 0o644); err != nil {
			return err
		}
		if err := os.Rename(next, path); err != nil {
			return err
		}
	}
	if n.daemon == nil {
		return nil
	}
	return poll(ctx, pollInterval, func() error { return n.hasLoaded(ctx, string(list)) })
}

// hasLoaded fails unless CRI has loaded this conflist; "" is no conflist.
func (n *Node) hasLoaded(ctx context.Context, list string) error {
	status, err := n.Runtime.Status(ctx, &runtime.StatusRequest{Verbose: true})
	if err != nil {
		return err
	}
	var loaded struct {
		Networks []struct {
			Config struct{ Name, Source string }
		}
	}
	if err := json.Unmarshal([]byte(status.GetInfo()["cniconfig"]), &loaded); err != nil {
		return final{fmt.Errorf("failed to read the CNI configuration that CRI shows: %w", err)}
	}
	source := ""
	for _, network := range loaded.Networks {
		if network.Config.Name == n.name {
			source = network.Config.Source
		}
	}
	if source != list {
		return fmt.Errorf("CRI has not loaded the CNI configuration: %w", errdefs.ErrUnavailable)
	}
	return nil
}

// CNIConfDir is where the daemon finds its network configuration.
func (n *Node) CNIConfDir() string { return n.path("cni/net.d") }

func (n *Node) path(below string) string { return filepath.Join(n.dir, below) }
