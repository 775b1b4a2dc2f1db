package cni

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/stretchr/testify/require"
)

func TestLoad(t *testing.T) {
	for name, test := range map[string]struct {
		files map[string]string
		max   int
		names []string          // of the networks on eth0, eth1, …
		want  map[string]string // their lists
	}{
		"first list by name": {
			files: map[string]string{
				"20-b.conflist": `{"name":"b","cniVersion":"1.0.0","plugins":[{"type":"ptp"}]}`,
				"10-a.conflist": `{"name":"a","cniVersion":"1.1.0","disableCheck":true,"disableGC":true,"plugins":[{"type":"bridge","mtu":1400},{"type":"portmap"}]}`,
				"30-c.conflist": `not read`,
				"00.txt":        `not a configuration`,
			},
			max:   1,
			names: []string{"a"},
			want: map[string]string{
				"a": `{"name":"a","cniVersion":"1.1.0","disableCheck":true,"disableGC":true,"loadOnlyInlinedPlugins":true,"plugins":[{"type":"bridge","mtu":1400},{"type":"portmap"}]}`,
			},
		},
		"all": {
			files: map[string]string{
				"20-b.conflist": `{"name":"b","cniVersion":"1.0.0","plugins":[{"type":"ptp"}]}`,
				"10-a.conflist": `{"name":"a","cniVersion":"1.0.0","plugins":[{"type":"ptp"}]}`,
			},
			names: []string{"a", "b"},
		},
		"fewer than the limit": {
			files: map[string]string{"a.conflist": `{"name":"a","plugins":[{"type":"ptp"}]}`},
			max:   3,
			names: []string{"a"},
			want:  map[string]string{"a": `{"name":"a","cniVersion":"","loadOnlyInlinedPlugins":true,"plugins":[{"type":"ptp"}]}`},
		},
		"single plugins": {
			files: map[string]string{
				"a.conf": `{"name":"a","cniVersion":"0.4.0","type":"bridge","ipam":{"type":"host-local"}}`,
				"b.json": `{"name":"b","cniVersion":"1.0.0","type":"ptp"}`,
			},
			names: []string{"a", "b"},
			want: map[string]string{
				"a": `{"name":"a","cniVersion":"0.4.0","loadOnlyInlinedPlugins":true,"plugins":[{"name":"a","cniVersion":"0.4.0","type":"bridge","ipam":{"type":"host-local"}}]}`,
			},
		},
		"highest version that is understood": {
			files: map[string]string{"a.conflist": `{"name":"a","cniVersion":"0.4.0","cniVersions":["1.0.0","0.3.1","2.0.0"],"plugins":[{"type":"ptp"}]}`},
			names: []string{"a"},
			want:  map[string]string{"a": `{"name":"a","cniVersion":"1.0.0","loadOnlyInlinedPlugins":true,"plugins":[{"type":"ptp"}]}`},
		},
		"plugins in a directory": {
			files: map[string]string{
				"net.conflist":   `{"name":"a","cniVersion":"1.1.0","plugins":[{"type":"bridge"}]}`,
				"a/10-one.conf":  `{"type":"portmap","capabilities":{"portMappings":true}}`,
				"a/20-two.conf":  `{"type":"tuning"}`,
				"b/10-none.conf": `not read`,
			},
			names: []string{"a"},
			want: map[string]string{
				"a": `{"name":"a","cniVersion":"1.1.0","loadOnlyInlinedPlugins":true,"plugins":[{"type":"bridge"},{"type":"portmap","capabilities":{"portMappings":true}},{"type":"tuning"}]}`,
			},
		},
		"only inlined plugins": {
			files: map[string]string{
				"net.conflist": `{"name":"a","cniVersion":"1.1.0","loadOnlyInlinedPlugins":true,"plugins":[{"type":"bridge"}]}`,
				"a/10.conf":    `{"type":"portmap"}`,
			},
			names: []string{"a"},
			want:  map[string]string{"a": `{"name":"a","cniVersion":"1.1.0","loadOnlyInlinedPlugins":true,"plugins":[{"type":"bridge"}]}`},
		},
	} {
		t.Run(name, func(t *testing.T) {
			networks, err := Load(Config{ConfDir: confDir(t, test.files), MaxConfNum: test.max})
			require.NoError(t, err)
			require.Len(t, networks, len(test.names))
			for i, network := range networks {
				require.Equal(t, test.names[i], network.Name)
				require.Equal(t, []string{"eth0", "eth1"}[i], network.IfName)
				if want, ok := test.want[network.Name]; ok {
					require.JSONEq(t, want, string(network.Conflist))
				}
			}
		})
	}
}

func TestLoadInvalid(t *testing.T) {
	for name, test := range map[string]struct {
		files map[string]string
		text  string
	}{
		"no file":               {nil, "no CNI network is configured"},
		"no configuration file": {map[string]string{"README": "x"}, "no CNI network is configured"},
		"not JSON":              {map[string]string{"a.conflist": `{`}, "a.conflist"},
		"no name":               {map[string]string{"a.conflist": `{"plugins":[{"type":"ptp"}]}`}, "no name"},
		"name with a path":      {map[string]string{"a.conflist": `{"name":"../a","plugins":[{"type":"ptp"}]}`}, "network name"},
		"conf without a name":   {map[string]string{"a.conf": `{"type":"ptp"}`}, "network name"},
		"no plugin":             {map[string]string{"a.conflist": `{"name":"a"}`}, "plugin"},
		"empty list":            {map[string]string{"a.conflist": `{"name":"a","plugins":[]}`}, "no plugins"},
		"null plugin":           {map[string]string{"a.conflist": `{"name":"a","plugins":[null]}`}, "missing 'type'"},
		"plugin without a type": {map[string]string{"a.conflist": `{"name":"a","plugins":[{}]}`}, "missing 'type'"},
		"type with a path":      {map[string]string{"a.conflist": `{"name":"a","plugins":[{"type":"../ptp"}]}`}, "invalid plugin type"},
		"list in a conf":        {map[string]string{"a.conf": `{"name":"a","plugins":[{"type":"ptp"}]}`}, "missing 'type'"},
		"unknown version":       {map[string]string{"a.conflist": `{"name":"a","cniVersion":"7.0.0","plugins":[{"type":"ptp"}]}`}, "cniVersion"},
		"not a version":         {map[string]string{"a.conflist": `{"name":"a","cniVersion":"one","plugins":[{"type":"ptp"}]}`}, "cniVersion"},
		"second is invalid": {map[string]string{
			"a.conflist": `{"name":"a","plugins":[{"type":"ptp"}]}`,
			"b.conflist": `{"name":"b"}`,
		}, "b.conflist"},
		"invalid plugin in a directory": {map[string]string{
			"net.conflist": `{"name":"a","plugins":[{"type":"ptp"}]}`,
			"a/1.conf":     `{}`,
		}, "missing 'type'"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Load(Config{ConfDir: confDir(t, test.files)})
			require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
			require.ErrorContains(t, err, test.text)
		})
	}
	t.Run("no directory", func(t *testing.T) {
		_, err := Load(Config{ConfDir: filepath.Join(t.TempDir(), "absent")})
		require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
		require.ErrorContains(t, err, "no CNI network is configured")
	})
	t.Run("not a directory", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		require.NoError(t, os.WriteFile(file, nil, 0o644))
		_, err := Load(Config{ConfDir: file})
		require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	})
}

func confDir(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, data := range files {
		file := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
		require.NoError(t, os.WriteFile(file, []byte(data), 0o644))
	}
	return dir
}

// Each configuration that loads can be recorded, read again and given to plugins, with the same
// meaning.
func FuzzLoad(f *testing.F) {
	for _, seed := range []string{
		`{"name":"a","cniVersion":"1.0.0","plugins":[{"type":"bridge","capabilities":{"bandwidth":true}}]}`,
		`{"name":"a","cniVersion":"1.0.0","type":"bridge","capabilities":{"bandwidth":true}}`,
		`{"name":"a","cniVersions":["1.0.0",""],"disableCheck":"TRUE","plugins":[{"Type":"bridge","name":1e999}]}`,
		`{"name":"a","plugins":[null]}`, `null`, `[]`, `{"name":"a","plugins":{"type":"x"}}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		check := func(network Network, err error) {
			if err != nil {
				return
			}
			first, err := network.list()
			require.NoError(t, err)
			again, err := networkOfList(first)
			require.NoError(t, err)
			require.JSONEq(t, string(network.Conflist), string(again.Conflist))

			a, err := NewAttachment(Config{}, []Network{network}, "id", "/netns", nil, Capabilities{"bandwidth": []byte(`{}`)})
			require.NoError(t, err)
			for p := range first.Plugins {
				values := map[string]any{"name": first.Name, "cniVersion": first.CNIVersion}
				if given := a.capabilities(first.Plugins[p].Network); len(given) > 0 {
					values["runtimeConfig"] = given
				}
				_, err := libcni.InjectConf(first.Plugins[p], values)
				require.NoError(t, err)
			}
		}
		check(networkOfConf(data))
		if list, err := libcni.NetworkConfFromBytes(data); err == nil {
			check(networkOfList(list))
		}
	})
}
