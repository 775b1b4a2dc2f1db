package plugin

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/stretchr/testify/require"

	_ "github.com/containerd/containerd/v2/plugins/cri/images"
	_ "github.com/containerd/containerd/v2/plugins/cri/runtime"

	"github.com/podfsm/podfsm/userns"
)

func TestDefaultConfig(t *testing.T) {
	got, err := defaultConfig().timeouts()
	require.NoError(t, err)
	require.Equal(t, timeouts{cniAdd: 3 * time.Minute, cniDel: 90 * time.Second, runtime: 2 * time.Minute, unclaimed: 2 * time.Minute}, got)
}

func TestNetNSPrefix(t *testing.T) {
	for _, prefix := range []string{"podfsm-", "cni-"} {
		require.NoError(t, (&Config{NetNSPrefix: prefix}).checkPrefix())
	}
	require.NoError(t, defaultConfig().checkPrefix())
	for _, prefix := range []string{"", "cni", "../", "other-"} {
		err := (&Config{NetNSPrefix: prefix}).checkPrefix()
		require.True(t, errdefs.IsInvalidArgument(err))
		require.ErrorContains(t, err, `netns_prefix = "`+prefix+`" is neither`)
	}
}

func TestLowestHostIDOption(t *testing.T) {
	got, err := defaultConfig().lowest()
	require.NoError(t, err)
	require.EqualValues(t, userns.MinHostID, got)
	require.Less(t, uint32(userns.TryHostID), got, "no pod has the id of tries, and the option only raises the lowest one")
}

func TestTimeouts(t *testing.T) {
	for key, set := range map[string]func(*Config, string){
		"cni_add_timeout":   func(c *Config, v string) { c.CNIAddTimeout = v },
		"cni_del_timeout":   func(c *Config, v string) { c.CNIDelTimeout = v },
		"runtime_timeout":   func(c *Config, v string) { c.RuntimeTimeout = v },
		"unclaimed_timeout": func(c *Config, v string) { c.UnclaimedTimeout = v },
	} {
		for _, bad := range []string{"", "0", "0s", "-1s", "3", "soon", "1e400s", "9999999h"} {
			t.Run(key+"="+bad, func(t *testing.T) {
				config := defaultConfig()
				set(config, bad)
				got, err := config.timeouts()
				require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
				require.ErrorContains(t, err, key, "the message names the option")
				require.ErrorContains(t, err, `"`+bad+`"`, "and what it is set to")
				require.Zero(t, got)
			})
		}
		config := defaultConfig()
		set(config, "1h1ms")
		got, err := config.timeouts()
		require.NoError(t, err)
		require.Contains(t, []time.Duration{got.cniAdd, got.cniDel, got.runtime, got.unclaimed}, time.Hour+time.Millisecond)
	}
}

func TestGCOption(t *testing.T) {
	for text, want := range map[string]bool{"auto": true, "off": false} {
		got, err := (&Config{CNIGC: text}).gc()
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	for _, bad := range []string{"", "on", "OFF", "true"} {
		_, err := (&Config{CNIGC: bad}).gc()
		require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
		require.ErrorContains(t, err, `cni_gc = "`+bad+`"`)
	}
	wanted, err := defaultConfig().gc()
	require.NoError(t, err)
	require.True(t, wanted)
}

type good struct{ config any }

func (g good) Config() any { return g.config }

type withArgument struct{}

func (withArgument) Config(string) any { return nil }

type withTwoResults struct{}

func (withTwoResults) Config() (any, error) { return nil, nil }

func TestReadConfigOf(t *testing.T) {
	for name, instance := range map[string]any{
		"no method":   struct{}{},
		"an argument": withArgument{},
		"two results": withTwoResults{},
		"a field":     struct{ Config func() any }{},
	} {
		t.Run(name, func(t *testing.T) {
			require.True(t, errdefs.IsNotImplemented(readConfigOf(instance, &stockConfig{})))
		})
	}
	require.Error(t, readConfigOf(good{func() {}}, &stockConfig{}), "what has no JSON form")
	require.Error(t, readConfigOf(good{map[string]any{"rootDir": 1}}, &stockConfig{}), "another type")

	config := &stockConfig{}
	require.NoError(t, readConfigOf(good{map[string]any{"rootDir": "/r", "containerd": map[string]any{"defaultRuntimeName": "runc"}}}, config))
	require.Equal(t, "/r", config.RootDir)
	require.Equal(t, "runc", config.Containerd.DefaultRuntimeName)
}

// initContext has the given plugins of containerd's CRI.
func initContext(t *testing.T, instances map[string]any) *plugin.InitContext {
	set := plugin.NewPluginSet()
	for id, instance := range instances {
		registration := plugin.Registration{Type: plugins.CRIServicePlugin, ID: id, InitFn: func(*plugin.InitContext) (any, error) { return instance, nil }}
		require.NoError(t, set.Add(registration.Init(plugin.NewContext(t.Context(), set, nil))))
	}
	return plugin.NewContext(t.Context(), set, nil)
}

func TestReadStockConfig(t *testing.T) {
	runtimes := good{map[string]any{"stateDir": "/s", "netnsMountsUnderStateDir": true}}
	images := good{map[string]any{"snapshotter": "overlayfs", "pinned_images": map[string]string{"sandbox": "pause"}}}
	config, err := readStockConfig(initContext(t, map[string]any{"runtime": runtimes, "images": images}))
	require.NoError(t, err)
	require.Equal(t, "/s/netns", config.netNSDir())
	require.Equal(t, "overlayfs", config.image.Snapshotter)

	for name, instances := range map[string]map[string]any{
		"no images":       {"runtime": runtimes},
		"no runtime":      {"images": images},
		"another runtime": {"runtime": struct{}{}, "images": images},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := readStockConfig(initContext(t, instances))
			require.Error(t, err)
		})
	}
}

// keys are the names under which a struct's fields stand in JSON, those of nested structs as "outer.inner".
func keys(t reflect.Type, prefix string) (all []string) {
	for _, f := range reflect.VisibleFields(t) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "" {
			continue
		}
		all = append(all, prefix+name)
		if f.Type.Kind() == reflect.Struct {
			all = append(all, keys(f.Type, prefix+name+".")...)
		}
	}
	return all
}

// The types are internal to containerd, so only this keeps a renamed field from being read as its zero value.
func TestStockConfigFitsContainerds(t *testing.T) {
	defaults := map[string]any{}
	for _, r := range registry.Graph(nil) {
		if r.Type == plugins.CRIServicePlugin {
			defaults[r.ID] = r.Config
		}
	}
	require.Contains(t, defaults, "runtime")
	require.Contains(t, defaults, "images")

	known := func(config any) map[string]any {
		text, err := json.Marshal(config)
		require.NoError(t, err)
		object := map[string]any{}
		require.NoError(t, json.Unmarshal(text, &object))
		return object
	}
	find := func(object map[string]any, key string) bool {
		var value any = object
		for part := range strings.SplitSeq(key, ".") {
			inner, ok := value.(map[string]any)
			if !ok {
				return false
			}
			if value, ok = inner[part]; !ok {
				return false
			}
		}
		return true
	}
	runtimes := known(defaults["runtime"])
	for _, key := range keys(reflect.TypeFor[stockConfig](), "") {
		switch key {
		case "rootDir", "stateDir": // set when the plugin is initialized
		default:
			require.True(t, find(runtimes, key), "containerd's runtime configuration has no %q", key)
		}
	}
	images := known(defaults["images"])
	field, _ := reflect.TypeFor[stockConfig]().FieldByName("image")
	for _, key := range keys(field.Type, "") {
		require.True(t, find(images, key), "containerd's image configuration has no %q", key)
	}

	config := &stockConfig{}
	require.NoError(t, readConfigOf(good{defaults["runtime"]}, config))
	require.NoError(t, readConfigOf(good{defaults["images"]}, &config.image))
	require.Equal(t, "runc", config.Containerd.DefaultRuntimeName)
	runc := known(defaults["runtime"])["containerd"].(map[string]any)["runtimes"].(map[string]any)["runc"].(map[string]any)
	for _, key := range keys(reflect.TypeFor[handler](), "") {
		require.True(t, find(runc, key), "containerd's runtime handlers have no %q", key)
	}
	require.Equal(t, "io.containerd.runc.v2", config.Containerd.Runtimes["runc"].Type)
	require.NotEmpty(t, config.CNI.BinDirs)
	require.Equal(t, "/etc/cni/net.d", config.CNI.ConfDir)
	require.Equal(t, "overlayfs", config.image.Snapshotter)
	require.NotEmpty(t, config.image.PinnedImages["sandbox"])
}

func TestHandler(t *testing.T) {
	stock := stockWith()
	for name, want := range map[string]string{"": "podsandbox", "runc": "podsandbox", "podfsm": Name, "kata": "shim"} {
		h, err := stock.handler(name)
		require.NoError(t, err)
		require.Equal(t, want, h.Sandboxer)
	}
	for range 20 { // the text must not change from try to try
		_, err := stock.handler("nobody's")
		require.True(t, errdefs.IsInvalidArgument(err))
		require.ErrorContains(t, err, `"nobody's"`)
		require.ErrorContains(t, err, "kata, podfsm, runc")
	}
	stock.Containerd.DefaultRuntimeName = "gone"
	_, err := stock.handler("")
	require.True(t, errdefs.IsInvalidArgument(err))
}

func TestCNIConf(t *testing.T) {
	stock := stockWith(func(s *stockConfig) {
		s.CNI.MaxConfNum = 1
		s.Containerd.DefaultRuntimeName = "own-dir"
		s.Containerd.Runtimes["own-dir"] = handler{ConfDir: "/own"}
		s.Containerd.Runtimes["own-both"] = handler{ConfDir: "/own", MaxConfNum: 3}
		s.Containerd.Runtimes["own-number"] = handler{MaxConfNum: 3}
	})
	for name, want := range map[string]struct {
		dir string
		max int
	}{
		"runc":       {"/etc/cni/net.d", 1},
		"own-dir":    {"/own", 1},
		"own-both":   {"/own", 3},
		"own-number": {"/etc/cni/net.d", 1},
		"":           {"/etc/cni/net.d", 1},
	} {
		dir, max := stock.cniConf(name)
		require.Equal(t, want.dir, dir, "handler %q", name)
		require.Equal(t, want.max, max, "handler %q", name)
	}
}

func TestSnapshotterAndNetNSDir(t *testing.T) {
	stock := stockWith(func(s *stockConfig) { s.StateDir = "/state" })
	require.Equal(t, "overlayfs", stock.snapshotter(handler{}))
	require.Equal(t, "stargz", stock.snapshotter(handler{Snapshotter: "stargz"}))
	require.Equal(t, "/var/run/netns", stock.netNSDir())
	stock.NetNSMountsUnderStateDir = true
	require.Equal(t, "/state/netns", stock.netNSDir())
}
