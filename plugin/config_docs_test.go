package plugin

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"testing"

	server "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	_ "github.com/containerd/containerd/v2/plugins/server/metrics" // its section is shown
	"github.com/containerd/plugin/registry"
	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/require"
)

// snippets are the pieces of containerd's configuration in the pages and in what is installed, by where they are.
func snippets(t *testing.T) map[string][]string {
	pages, err := filepath.Glob("../docs/*/*.md")
	require.NoError(t, err)
	found := map[string][]string{}
	for _, page := range append(pages, "../README.md") {
		text, err := os.ReadFile(page)
		require.NoError(t, err)
		for _, block := range regexp.MustCompile("(?ms)^ *```toml\n(.*?)^ *```").FindAllStringSubmatch(string(text), -1) {
			found[page] = append(found[page], block[1])
		}
	}
	installed, err := os.ReadFile("../deploy/conf.d/podfsm.toml")
	require.NoError(t, err)
	found["../deploy/conf.d/podfsm.toml"] = []string{string(installed)}
	return found
}

// strictly decodes TOML, and fails for a key that the type doesn't have.
func strictly(t *testing.T, text []byte, into any) {
	t.Helper()
	require.NoError(t, toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(into), "%s", text)
}

// sections are the types of the sections that containerd's own plugins have.
func sections() map[string]reflect.Type {
	types := map[string]reflect.Type{}
	for _, r := range registry.Graph(nil) {
		if config := reflect.TypeOf(r.Config); config != nil && config.Kind() == reflect.Pointer && config != reflect.TypeFor[*section]() {
			types[r.URI()] = config.Elem()
		}
	}
	return types
}

// usable fails where podfsm would not run pods with its own options.
func usable(t *testing.T, options map[string]any) {
	t.Helper()
	s := sectionOf(defaultConfig())
	maps.Copy(*s, options)
	config, err := optionsOf(s)
	require.NoError(t, err)
	_, err = config.timeouts()
	require.NoError(t, err)
	_, err = config.gc()
	require.NoError(t, err)
	all, err := config.policies(stockWith(func(stock *stockConfig) {
		for name := range config.UserNS {
			stock.Containerd.Runtimes[name] = handler{Sandboxer: Name}
		}
	}))
	require.NoError(t, err)
	_, err = config.openPool(all, t.TempDir())
	require.NoError(t, err)
}

// What the pages show of containerd's configuration can be put into it as it stands: containerd and podfsm know every section and option,
// and podfsm takes the values of its own. Where a page says that it shows the defaults, it does.
func TestSnippetsInTheDocs(t *testing.T) {
	const snapshotterURI = "io.containerd.snapshotter.v1." + Name
	types, count, defaults := sections(), map[string]int{}, 0
	for where, blocks := range snippets(t) {
		for _, block := range blocks {
			var file server.Config
			strictly(t, []byte(block), &file)
			for uri, values := range file.Plugins {
				count[uri]++
				given := section(values.(map[string]any))
				switch uri {
				case URI:
					usable(t, given)
					if _, all := given["cni_gc"]; all {
						defaults++
						require.Equal(t, scalarsOf(*sectionOf(defaultConfig())), scalarsOf(given), where)
					}
				case snapshotterURI:
					_, err := snapshotterOptionsOf(&given)
					require.NoError(t, err, where)
					defaults++
					require.Equal(t, scalarsOf(*sectionOf(defaultSnapshotterConfig())), scalarsOf(given), where)
				default:
					require.Contains(t, types, uri, "%s shows an unknown section", where)
					text, err := toml.Marshal(values)
					require.NoError(t, err)
					strictly(t, text, reflect.New(types[uri]).Interface())
				}
			}
		}
	}
	require.Equal(t, 1, defaults)
	require.GreaterOrEqual(t, count["io.containerd.cri.v1.runtime"], 4)
	require.GreaterOrEqual(t, count[URI], 2)
}

// scalarsOf are the options of a section that are strings or numbers.
func scalarsOf(s section) map[string]any {
	found := map[string]any{}
	for key, value := range s {
		switch value.(type) {
		case string, int64:
			found[key] = value
		}
	}
	return found
}

// The reference has the default of each option that has one.
func TestDefaultsInTheReference(t *testing.T) {
	text, err := os.ReadFile("../docs/reference/configuration.md")
	require.NoError(t, err)
	defaults := reflect.ValueOf(defaultConfig()).Elem()
	for field, value := range defaults.Fields() {
		if value.IsZero() {
			continue
		}
		row := fmt.Sprintf("| `%s` | %s | `%#v` |", field.Tag.Get("toml"), map[reflect.Kind]string{reflect.String: "string", reflect.Int64: "integer"}[value.Kind()], value.Interface())
		require.Contains(t, string(text), row)
	}
}
