package plugin

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	shims "github.com/containerd/containerd/v2/core/runtime/v2"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/plugin"

	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/pause"
	"github.com/podfsm/podfsm/userns"
)

// Config is podfsm's section of containerd's configuration,
// [plugins.'io.containerd.podsandbox.controller.v1.podfsm']. It has no option for what containerd's
// CRI configuration already says.
type Config struct {
	// CNIAddTimeout and CNIDelTimeout bound one run of one CNI plugin. The defaults, "3m" and "1m30s", leave time within the
	// kubelet's 4 minutes for running a sandbox, and 2 for stopping it, to roll back and to say which plugin hangs.
	CNIAddTimeout string `toml:"cni_add_timeout"`
	CNIDelTimeout string `toml:"cni_del_timeout"`
	// RuntimeTimeout bounds each of the other steps: the snapshot, pause, the pod's shim. Default: "2m".
	RuntimeTimeout string `toml:"runtime_timeout"`
	// UnclaimedTimeout is how long a sandbox whose caller had gone before it was ready waits for a
	// retry, or for a list or status call that shows it. Then it is removed. Default: "2m".
	UnclaimedTimeout string `toml:"unclaimed_timeout"`
	// CNIGC is "auto" to run CNI GC at containerd's start, on the networks that no other runtime
	// seems to share, or "off". Default: "auto".
	CNIGC string `toml:"cni_gc"`
	// NetNSPrefix is the prefix of the names of pinned network namespaces, before the sandbox id:
	// "podfsm-", or "cni-" for tools that look for the names that containerd gives. Namespaces of
	// running pods keep their names. Default: "podfsm-".
	NetNSPrefix string `toml:"netns_prefix"`
	// InitPath is the path of podfsm-init, the program that becomes pause. Default: "", which means
	// the one beside the daemon's executable, else the one in PATH.
	InitPath string `toml:"init_path"`
	// MinHostID is the lowest host id that a pod may be mapped to, whether the kubelet or podfsm
	// chooses the mapping. It is at least 1000, the default: the ids below belong to the node's
	// root and system users. 65536 also keeps pods off the ids of human users.
	MinHostID int64 `toml:"userns_min_host_id"`
	// UserNS sets, per runtime handler, whether the kubelet or podfsm chooses the id mappings of
	// pods.
	UserNS map[string]UserNSConfig `toml:"userns"`
	// Pool holds the host ids that mode "auto" gives to pods.
	Pool PoolConfig `toml:"userns_pool"`
}

func defaultConfig() *Config {
	return &Config{CNIAddTimeout: "3m", CNIDelTimeout: "1m30s", RuntimeTimeout: "2m", UnclaimedTimeout: "2m", CNIGC: "auto", NetNSPrefix: "podfsm-", MinHostID: 1000}
}

// safeConfig returns the options for running pods while the configured ones can't be used: the
// defaults, without CNI GC, which deletes attachments on a network that another runtime may share.
func safeConfig() *Config {
	config := defaultConfig()
	config.CNIGC = "off"
	return config
}

// timeouts are the parsed durations of a Config, all positive.
type timeouts struct{ cniAdd, cniDel, runtime, unclaimed time.Duration }

func (c *Config) timeouts() (t timeouts, err error) {
	for _, option := range []struct {
		key, text string
		into      *time.Duration
	}{
		{"cni_add_timeout", c.CNIAddTimeout, &t.cniAdd},
		{"cni_del_timeout", c.CNIDelTimeout, &t.cniDel},
		{"runtime_timeout", c.RuntimeTimeout, &t.runtime},
		{"unclaimed_timeout", c.UnclaimedTimeout, &t.unclaimed},
	} {
		if *option.into, err = positive(option.key, option.text); err != nil {
			return timeouts{}, err
		}
	}
	return t, nil
}

// gc returns whether CNI GC runs at the start.
func (c *Config) gc() (bool, error) {
	switch c.CNIGC {
	case "auto":
		return true, nil
	case "off":
		return false, nil
	default:
		return false, fmt.Errorf("cni_gc = %q is neither \"auto\" nor \"off\": %w", c.CNIGC, errdefs.ErrInvalidArgument)
	}
}

// checkPrefix refuses a prefix that the search for leaks does not know.
func (c *Config) checkPrefix() error {
	if c.NetNSPrefix != leaks.PinPrefix && c.NetNSPrefix != leaks.StockPinPrefix {
		return fmt.Errorf("netns_prefix = %q is neither %q nor %q: %w", c.NetNSPrefix, leaks.PinPrefix, leaks.StockPinPrefix, errdefs.ErrInvalidArgument)
	}
	return nil
}

// lowest is the lowest host id that pods may be mapped to.
func (c *Config) lowest() (uint32, error) {
	if c.MinHostID < userns.MinHostID || c.MinHostID > math.MaxUint32-1 {
		return 0, fmt.Errorf("userns_min_host_id = %d is not within %d to %d: %w", c.MinHostID, userns.MinHostID, uint32(math.MaxUint32-1), errdefs.ErrInvalidArgument)
	}
	return uint32(c.MinHostID), nil
}

func positive(key, text string) (time.Duration, error) {
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("%s = %q is not a positive duration like \"90s\": %w", key, text, errdefs.ErrInvalidArgument)
	}
	return d, nil
}

// stockConfig is the part of the configuration of containerd's CRI service that podfsm reads. It is
// read as JSON, because its Go types are internal to containerd.
type stockConfig struct {
	Containerd struct {
		DefaultRuntimeName string             `json:"defaultRuntimeName"`
		Runtimes           map[string]handler `json:"runtimes"`
	} `json:"containerd"`
	CNI struct {
		BinDirs       []string `json:"binDirs"`
		ConfDir       string   `json:"confDir"`
		MaxConfNum    int      `json:"maxConfNum"`
		SetupSerially bool     `json:"setupSerially"`
		IPPreference  string   `json:"ipPref"`
	} `json:"cni"`
	RestrictOOMScoreAdj      bool   `json:"restrictOOMScoreAdj"`
	UnsetSeccompProfile      string `json:"unsetSeccompProfile"`
	NetNSMountsUnderStateDir bool   `json:"netnsMountsUnderStateDir"`
	EnableUnprivilegedPorts  bool   `json:"enableUnprivilegedPorts"`
	EnableUnprivilegedICMP   bool   `json:"enableUnprivilegedICMP"`
	RootDir                  string `json:"rootDir"`
	StateDir                 string `json:"stateDir"`

	image struct {
		Snapshotter                string            `json:"snapshotter"`
		DisableSnapshotAnnotations bool              `json:"disableSnapshotAnnotations"`
		PinnedImages               map[string]string `json:"pinned_images"`
	}
}

// handler is one runtime handler of containerd's CRI configuration.
type handler struct {
	Type           string         `json:"runtimeType"`
	Path           string         `json:"runtimePath"`
	Options        map[string]any `json:"options"`
	PodAnnotations []string       `json:"PodAnnotations"`
	Snapshotter    string         `json:"snapshotter"`
	Sandboxer      string         `json:"sandboxer"`
	ConfDir        string         `json:"cniConfDir"`
	MaxConfNum     int            `json:"cniMaxConfNum"`
}

// systemdCgroup says whether systemd makes the cgroups of the handler's containers.
func (h handler) systemdCgroup() bool {
	systemd, _ := h.Options["SystemdCgroup"].(bool)
	return h.Type == plugins.RuntimeRuncV2 && systemd
}

// readStockConfig reads the configuration of containerd's CRI service from its two plugins.
func readStockConfig(ic *plugin.InitContext) (*stockConfig, error) {
	config := &stockConfig{}
	for id, into := range map[string]any{"runtime": config, "images": &config.image} {
		instance, err := ic.GetByID(plugins.CRIServicePlugin, id)
		if err != nil {
			return nil, fmt.Errorf("failed to find containerd's CRI plugin %q: %w", id, err)
		}
		if err := readConfigOf(instance, into); err != nil {
			return nil, fmt.Errorf("failed to read the configuration of containerd's CRI plugin %q: %w", id, err)
		}
	}
	return config, nil
}

// readConfigOf calls instance.Config(), whose type is internal to containerd, and reads its JSON form.
func readConfigOf(instance, into any) error {
	method := reflect.ValueOf(instance).MethodByName("Config")
	if !method.IsValid() || method.Type().NumIn() != 0 || method.Type().NumOut() != 1 {
		return fmt.Errorf("%T has no method Config(): %w", instance, errdefs.ErrNotImplemented)
	}
	text, err := json.Marshal(method.Call(nil)[0].Interface())
	if err != nil {
		return err
	}
	return json.Unmarshal(text, into)
}

// handlerName returns the name of a runtime handler. "" means the default handler.
func (c *stockConfig) handlerName(name string) string {
	if name == "" {
		return c.Containerd.DefaultRuntimeName
	}
	return name
}

// shimDirs returns where containerd keeps the files of shims. The directories are those of its task
// service; the configuration of its shim manager holds the defaults.
func shimDirs(ic *plugin.InitContext) pause.ShimDirs {
	tasks := plugins.RuntimePluginV2.String() + ".task"
	dirs := pause.ShimDirs{
		Root:    filepath.Join(filepath.Dir(ic.Properties[plugins.PropertyRootDir]), tasks),
		State:   filepath.Join(filepath.Dir(ic.Properties[plugins.PropertyStateDir]), tasks),
		Address: ic.Properties[plugins.PropertyGRPCAddress],
	}
	if manager := ic.Plugins().Get(plugins.ShimPlugin, "manager"); manager != nil {
		if config, ok := manager.Config.(*shims.ShimConfig); ok {
			dirs.Sockets = config.SocketDir
		}
	}
	return dirs
}

// readStreaming reads how containerd's CRI service, which ic is the init context of, serves
// streams.
func readStreaming(ic *plugin.InitContext) (streaming cri.Streaming) {
	text, err := json.Marshal(ic.Config)
	if err == nil {
		err = json.Unmarshal(text, &streaming)
	}
	if err != nil {
		log.G(ic.Context).WithError(err).Warn("failed to read the settings of the streaming server, serving port forwards with the defaults")
	}
	return streaming
}

// handler returns a runtime handler by its name. "" means the default handler. An unknown handler
// is an InvalidArgument error.
func (c *stockConfig) handler(name string) (handler, error) {
	name = c.handlerName(name)
	h, ok := c.Containerd.Runtimes[name]
	if !ok {
		known := strings.Join(slices.Sorted(maps.Keys(c.Containerd.Runtimes)), ", ")
		return handler{}, fmt.Errorf("runtime handler %q isn't configured in containerd, only %s are: %w", name, known, errdefs.ErrInvalidArgument)
	}
	return h, nil
}

// ownSandbox lists, by prefixes of their types, runtimes that make a sandbox of their own: a
// virtual machine, or a kernel in user space. A pause cloned by podfsm would run outside of it.
var ownSandbox = []struct{ runtime, name string }{
	{"io.containerd.kata", "Kata Containers"},
	{"io.containerd.runsc", "gVisor"},
	{"io.containerd.runhcs", "Windows"},
	{"aws.firecracker", "Firecracker"},
}

// checkHandlers refuses runtimes that podfsm can't run pods with. It allows hooks in
// base_runtime_spec: containerd applies that specification to containers, never to the sandbox.
func (c *stockConfig) checkHandlers() error {
	for _, name := range slices.Sorted(maps.Keys(c.Containerd.Runtimes)) {
		h := c.Containerd.Runtimes[name]
		if h.Sandboxer != Name {
			continue
		}
		for _, own := range ownSandbox {
			if strings.HasPrefix(h.Type, own.runtime) {
				return fmt.Errorf("runtime handler %q has sandboxer = %q, but its runtime %q (%s) makes a sandbox of its own; remove sandboxer from that handler: %w",
					name, Name, h.Type, own.name, errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}

// cniConf returns the CNI configuration directory of a handler and the maximum number of networks
// per pod. As in containerd, only pods that name the handler use its own directory.
func (c *stockConfig) cniConf(name string) (dir string, max int) {
	dir, max = c.CNI.ConfDir, c.CNI.MaxConfNum
	if h := c.Containerd.Runtimes[name]; h.ConfDir != "" {
		dir = h.ConfDir
		if h.MaxConfNum != 0 {
			max = h.MaxConfNum
		}
	}
	return dir, max
}

// hasOwnCNIConf reports whether a handler has its own CNI configuration directory. containerd's
// service only looks at the node's when it reports whether the network is ready.
func (c *stockConfig) hasOwnCNIConf(name string) bool {
	return c.Containerd.Runtimes[name].ConfDir != ""
}

// snapshotter returns the name of the snapshotter that a handler uses.
func (c *stockConfig) snapshotter(h handler) string {
	if h.Snapshotter != "" {
		return h.Snapshotter
	}
	return c.image.Snapshotter
}

// snapshotters returns the snapshotters of podfsm's handlers, sorted, without duplicates.
func (c *stockConfig) snapshotters() []string {
	var names []string
	for _, h := range c.Containerd.Runtimes {
		if h.Sandboxer == Name {
			names = append(names, c.snapshotter(h))
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// pauseImage is the reference of the pause image. containerd's default configuration pins one.
func (c *stockConfig) pauseImage() string { return c.image.PinnedImages["sandbox"] }

// netNSDir returns the directory of pinned network namespaces, the same as containerd's.
func (c *stockConfig) netNSDir() string {
	if c.NetNSMountsUnderStateDir {
		return filepath.Join(c.StateDir, "netns")
	}
	return "/var/run/netns"
}
