package plugin

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/userns"
)

// sectionFrom is podfsm's section as containerd gives it: what the file says, over the defaults.
func sectionFrom(t *testing.T, text string) *section {
	s := sectionOf(defaultConfig())
	require.NoError(t, toml.NewDecoder(strings.NewReader(text)).DisallowUnknownFields().Decode(s), "containerd must be able to read it")
	return s
}

func TestSection(t *testing.T) {
	config, err := optionsOf(sectionOf(defaultConfig()))
	require.NoError(t, err)
	defaults := defaultConfig()
	defaults.Pool.Ranges = []RangeConfig{}
	require.Equal(t, defaults, config)

	config, err = optionsOf(sectionFrom(t, "cni_gc = \"off\"\n[userns.podfsm]\nmode = \"auto\"\n[userns_pool]\nranges = [{ host_id = 100000, size = 131072 }]"))
	require.NoError(t, err)
	want := defaultConfig()
	want.CNIGC, want.UserNS = "off", map[string]UserNSConfig{"podfsm": {Mode: "auto"}}
	want.Pool.Ranges = []RangeConfig{{HostID: 100000, Size: 131072}}
	require.Equal(t, want, config)

	for text, said := range map[string]string{
		`cni_add_timout = "3m"`:                    "unknown option cni_add_timout",
		"[userns.podfsm]\nmodus = \"auto\"":        "unknown option userns.podfsm.modus",
		"[userns_pool]\nranges = [{ hostid = 1 }]": "unknown option userns_pool.ranges.hostid",
		"[pool]":                             "unknown option pool",
		"cni_gc = false":                     "option cni_gc has a value of the wrong type",
		"cni_add_timeout = 3":                "option cni_add_timeout has a value of the wrong type",
		"userns = \"auto\"":                  "option userns has a value of the wrong type",
		"userns_pool = []":                   "option userns_pool has a value of the wrong type",
		"[userns.podfsm]\nmode = [\"auto\"]": "option userns.podfsm.mode has a value of the wrong type",
		"[userns_pool]\nranges = [{ host_id = \"1\" }]": "option userns_pool.ranges.host_id has a value of the wrong type",
	} {
		got, err := optionsOf(sectionFrom(t, text))
		require.True(t, errdefs.IsInvalidArgument(err), "%s: %v", text, err)
		require.ErrorContains(t, err, said)
		require.ErrorContains(t, err, "[plugins.'io.containerd.podsandbox.controller.v1.podfsm']")
		require.NotContains(t, err.Error(), "plugin.", "names of Go types help no operator")
		require.Equal(t, defaultConfig(), got)
	}
}

func TestSnapshotterSection(t *testing.T) {
	config, err := snapshotterOptionsOf(&section{"root_path": "/data", "strategy": "chown"})
	require.NoError(t, err)
	require.Equal(t, &SnapshotterConfig{RootPath: "/data", Strategy: "chown"}, config)
	for _, s := range []section{
		{"strategies": "chown"}, {"strategy": 7}, {"strategy": "magic"}, {"mount_options": "index=on"}, {"root_path": "snapshots"},
	} {
		key := slices.Collect(maps.Keys(s))[0]
		config, err := snapshotterOptionsOf(&s)
		require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
		require.ErrorContains(t, err, "[plugins.'io.containerd.snapshotter.v1.podfsm']")
		require.ErrorContains(t, err, key)
		require.Equal(t, defaultSnapshotterConfig(), config)
	}
	config, err = snapshotterOptionsOf(&section{"root_path": "/data", "strategy": 7, "mount_options": []string{"index=on"}})
	require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
	require.Equal(t, &SnapshotterConfig{RootPath: "/data", Strategy: "auto"}, config, "the snapshots of running pods are there")
}

// The examples of the configuration reference are taken as they stand, and say what their names do.
func TestExamplesOfTheReference(t *testing.T) {
	for name, want := range map[string]struct {
		modes map[string]userns.Mode
		pool  bool
	}{
		"kubelet": {modes: map[string]userns.Mode{"podfsm": userns.ModeKubelet}},
		"auto":    {modes: map[string]userns.Mode{"podfsm": userns.ModeAuto}, pool: true},
		"node":    {modes: map[string]userns.Mode{"podfsm": userns.ModeNode, "podfsm-host": userns.ModeKubelet}},
	} {
		t.Run(name, func(t *testing.T) {
			text, err := os.ReadFile(filepath.Join("..", "docs", "reference", "config", name+".toml"))
			require.NoError(t, err)
			var file struct {
				Version int
				Plugins map[string]map[string]any
			}
			require.NoError(t, toml.Unmarshal(text, &file))
			require.Equal(t, 4, file.Version)
			stock := &stockConfig{}
			stock.Containerd.Runtimes = map[string]handler{}
			handlers := file.Plugins["io.containerd.cri.v1.runtime"]["containerd"].(map[string]any)["runtimes"].(map[string]any)
			for name, settings := range handlers {
				settings := settings.(map[string]any)
				stock.Containerd.Runtimes[name] = handler{Sandboxer: settings["sandboxer"].(string)}
				require.Equal(t, map[string]any{"SystemdCgroup": true}, settings["options"], "as in the file of the package, which the example replaces")
			}
			s := sectionOf(defaultConfig())
			maps.Copy(*s, file.Plugins[URI])
			config, err := optionsOf(s)
			require.NoError(t, err)
			_, err = config.timeouts()
			require.NoError(t, err)
			all, err := config.policies(stock)
			require.NoError(t, err)
			pool, err := config.openPool(all, t.TempDir())
			require.NoError(t, err)
			require.Equal(t, want.pool, pool != nil)
			for handler, mode := range want.modes {
				require.Equal(t, Name, stock.Containerd.Runtimes[handler].Sandboxer)
				require.Equal(t, mode, all.of(handler).Mode)
			}
			require.Len(t, handlers, len(want.modes))
		})
	}
}

// FuzzSection has podfsm's sections as an operator may write them.
func FuzzSection(f *testing.F) {
	f.Add("cni_gc = \"off\"\n[userns.podfsm]\nmode = \"auto\"\n[userns_pool]\nranges = [{ host_id = 100000, size = 131072 }]")
	f.Add("[userns.podfsm]\n" + nodeWide)
	f.Add("cni_gc = 1979-05-27\nuserns = [{}]\n\"\" = inf")
	f.Add("strategy = \"magic\"\nroot_path = \"/\"\nmount_options = [1]")
	f.Add("[userns_pool]\nuser = \"nobody\"\nranges = [{ host_id = -1, size = 9223372036854775807 }]")
	stock, dir := stockWith(), f.TempDir()
	f.Fuzz(func(t *testing.T, text string) {
		s := sectionOf(defaultConfig())
		if toml.Unmarshal([]byte(text), s) != nil {
			return // containerd's configuration as a whole is no TOML
		}
		alone := section{}
		require.NoError(t, toml.Unmarshal([]byte(text), &alone))
		if snapshotter, err := snapshotterOptionsOf(&alone); err != nil {
			require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
			snapshotter.RootPath = "" // which is kept, if it is one
			require.Equal(t, defaultSnapshotterConfig(), snapshotter)
		}
		config, err := optionsOf(s)
		if err != nil {
			require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
			return
		}
		if _, err := config.timeouts(); err != nil {
			require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
		}
		all, err := config.policies(stock)
		if err == nil {
			_, err = config.openPool(all, dir)
		}
		if err != nil {
			require.True(t, errdefs.IsInvalidArgument(err) || errdefs.IsFailedPrecondition(err), "%v", err)
		}
	})
}
