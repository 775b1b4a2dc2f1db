package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	server "github.com/containerd/containerd/v2/cmd/containerd/server/config"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/pelletier/go-toml/v2"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/doctor"
	"github.com/podfsm/podfsm/userns"
)

// The sections of containerd's configuration that podfsm reads.
const (
	runtimeSection = "io.containerd.cri.v1.runtime"
	imagesSection  = "io.containerd.cri.v1.images"
	podfsmSection  = ledgerDir
)

// oldestConfig is the first version of containerd's configuration with these sections. Only the
// daemon can migrate an older one.
const oldestConfig = 3

// runtimeConfig is the part of containerd's CRI runtime section that the doctor needs, with
// containerd's defaults.
type runtimeConfig struct {
	Containerd struct {
		Default  string                   `toml:"default_runtime_name"`
		Runtimes map[string]handlerConfig `toml:"runtimes"`
	} `toml:"containerd"`
	CNI struct {
		BinDirs    []string `toml:"bin_dirs"`
		ConfDir    string   `toml:"conf_dir"`
		MaxConfNum int      `toml:"max_conf_num"`
	} `toml:"cni"`
	RestrictOOMScoreAdj bool `toml:"restrict_oom_score_adj"`
	NetNSUnderStateDir  bool `toml:"netns_mounts_under_state_dir"`
}

type handlerConfig struct {
	Type        string       `toml:"runtime_type"`
	Path        string       `toml:"runtime_path"`
	Sandboxer   string       `toml:"sandboxer"`
	Snapshotter string       `toml:"snapshotter"`
	ConfDir     string       `toml:"cni_conf_dir"`
	MaxConfNum  int          `toml:"cni_max_conf_num"`
	Options     *runcOptions `toml:"options"`
}

// runcOptions are the options of runc's shim that the doctor needs.
type runcOptions struct {
	BinaryName    string
	SystemdCgroup bool
}

// runc returns the handler's options for runc's shim, or nil without options.
func (h handlerConfig) runc() *runcOptions {
	if h.Type != plugins.RuntimeRuncV2 {
		return nil
	}
	return h.Options
}

func (h handlerConfig) systemdCgroup() bool {
	options := h.runc()
	return options != nil && options.SystemdCgroup
}

// ownConfig is the part of podfsm's section that the doctor needs.
type ownConfig struct {
	InitPath string `toml:"init_path"`
	UserNS   map[string]struct {
		Mode userns.Mode `toml:"mode"`
	} `toml:"userns"`
	Pool struct {
		Ranges []map[string]any `toml:"ranges"`
		User   string           `toml:"user"`
	} `toml:"userns_pool"`
}

// readConfig reads the part of the configuration that the doctor needs, while containerd is down.
func readConfig(ctx context.Context, path, root, state string) (*doctor.Config, error) {
	var file server.Config
	if err := server.LoadConfig(ctx, path, &file); err != nil {
		return nil, fmt.Errorf("failed to read containerd's configuration: %w", err)
	}
	if file.Version < oldestConfig {
		return nil, fmt.Errorf("failed to read containerd's configuration %s: only the daemon can read version %d", path, file.Version)
	}
	sections, err := readSections(&file)
	if err != nil {
		return nil, err
	}
	return sections.examined(root, state), nil
}

// sections are the sections that podfsm reads.
type sections struct {
	runtime runtimeConfig
	images  struct {
		Snapshotter string `toml:"snapshotter"`
	}
	own ownConfig
}

func readSections(file *server.Config) (*sections, error) {
	s := &sections{}
	s.runtime.Containerd.Default = "runc"
	s.runtime.Containerd.Runtimes = map[string]handlerConfig{"runc": {Type: plugins.RuntimeRuncV2, Options: &runcOptions{}}}
	s.runtime.CNI.BinDirs, s.runtime.CNI.ConfDir, s.runtime.CNI.MaxConfNum = []string{"/opt/cni/bin"}, "/etc/cni/net.d", 1
	s.images.Snapshotter = "overlayfs"
	for section, into := range map[string]any{runtimeSection: &s.runtime, imagesSection: &s.images, podfsmSection: &s.own} {
		if err := readSection(file, section, into); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// examined returns what the doctor needs of the sections.
func (s *sections) examined(root, state string) *doctor.Config {
	standard := s.runtime.Containerd.Runtimes[s.runtime.Containerd.Default]
	config := &doctor.Config{
		InitPath:            s.own.InitPath,
		CgroupDriver:        doctor.ToldDriver(standard.runc() != nil, standard.systemdCgroup()),
		NetNSDir:            "/var/run/netns",
		RestrictOOMScoreAdj: s.runtime.RestrictOOMScoreAdj,
		Pool:                s.own.Pool.User != "" || len(s.own.Pool.Ranges) > 0,
		PoolUser:            s.own.Pool.User,
	}
	if s.runtime.NetNSUnderStateDir {
		config.NetNSDir = filepath.Join(state, criDir, "netns")
	}
	for _, name := range slices.Sorted(maps.Keys(s.runtime.Containerd.Runtimes)) {
		if h := s.runtime.Containerd.Runtimes[name]; h.Sandboxer == own {
			config.Handlers = append(config.Handlers, s.handler(name, h, root))
		}
	}
	return config
}

// readSection reads the section of a plugin, if the configuration has it.
func readSection(config *server.Config, section string, into any) error {
	values, set := config.Plugins[section]
	if !set {
		return nil
	}
	text, err := toml.Marshal(values)
	if err == nil {
		err = toml.Unmarshal(text, into)
	}
	if err != nil {
		return fmt.Errorf("failed to read the section %s of containerd's configuration: %w", section, err)
	}
	return nil
}

func (s *sections) handler(name string, h handlerConfig, root string) doctor.Handler {
	c := s.runtime
	examined := doctor.Handler{
		Name:        name,
		Default:     name == c.Containerd.Default,
		Shim:        cmp.Or(h.Path, h.Type),
		Snapshotter: snapshotterOf(root, cmp.Or(h.Snapshotter, s.images.Snapshotter)),
		Mode:        cmp.Or(s.own.UserNS[name].Mode, userns.ModeKubelet),
		Network:     cni.Config{BinDirs: c.CNI.BinDirs, ConfDir: c.CNI.ConfDir, MaxConfNum: c.CNI.MaxConfNum},

		SystemdCgroup: h.systemdCgroup(),
	}
	if h.Type == plugins.RuntimeRuncV2 {
		examined.Binary = "runc"
		if options := h.runc(); options != nil {
			examined.Binary = cmp.Or(options.BinaryName, "runc")
		}
	}
	if h.ConfDir != "" {
		examined.Network.ConfDir = h.ConfDir
		examined.Network.MaxConfNum = cmp.Or(h.MaxConfNum, c.CNI.MaxConfNum)
	}
	return examined
}

// snapshotterOf describes a snapshotter while the daemon is down: only its default directory can be
// seen.
func snapshotterOf(root, name string) doctor.Snapshotter {
	s := doctor.Snapshotter{Name: name}
	dir := filepath.Join(root, string(plugins.SnapshotPlugin)+"."+name)
	if info, err := os.Stat(dir); err == nil && info.IsDir() {
		s.Root, s.Loaded, s.RemapIDs = dir, true, true
	}
	return s
}
