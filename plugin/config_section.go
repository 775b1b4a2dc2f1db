package plugin

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

// section is a plugin's section of containerd's configuration, undecoded. If containerd decoded it
// into a struct, it would ignore unknown options with a warning, and would not start at a value of
// the wrong type. With a map, podfsm can name the mistake, and nothing else on the node fails.
type section map[string]any

// sectionOf returns the section with the given options.
func sectionOf(config any) *section {
	text, err := toml.Marshal(config)
	s := &section{}
	if err == nil {
		err = toml.Unmarshal(text, s)
	}
	if err != nil {
		panic(err) // at the start of any process with the plugin in it, and so in every test
	}
	return s
}

// decode reads the section into the options, which hold the defaults. All errors are InvalidArgument and name the option.
func (s *section) decode(into any) error {
	text, err := toml.Marshal(*s)
	if err != nil {
		return fmt.Errorf("failed to read the options: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	err = toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(into)
	if unknown := (&toml.StrictMissingError{}); errors.As(err, &unknown) {
		var names []string
		for _, missing := range unknown.Errors {
			names = append(names, strings.Join(missing.Key(), "."))
		}
		return fmt.Errorf("unknown option %s; correct or remove it: %w", strings.Join(names, ", "), errdefs.ErrInvalidArgument)
	}
	if wrong := (&toml.DecodeError{}); errors.As(err, &wrong) {
		return fmt.Errorf("option %s has a value of the wrong type or range: %w", strings.Join(wrong.Key(), "."), errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fmt.Errorf("failed to read the options: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// optionsOf reads podfsm's own section. On an error it returns the defaults, too.
func optionsOf(given any) (*Config, error) { return read(given, URI, defaultConfig) }

// snapshotterOptionsOf reads and validates the section of podfsm's snapshotter. On an error it
// returns options for the snapshots of running pods, too: the defaults, in the configured directory.
func snapshotterOptionsOf(given any) (*SnapshotterConfig, error) {
	uri := plugins.SnapshotPlugin.String() + "." + Name
	config, err := read(given, uri, defaultSnapshotterConfig)
	if err == nil {
		if err = config.check(); err == nil {
			return config, nil
		}
		err = fmt.Errorf("[plugins.'%s']: %w", uri, err)
	}
	config = defaultSnapshotterConfig()
	config.RootPath = rootOf(given)
	return config, err
}

// rootOf returns the snapshotter's directory from a section that can't be used as a whole, "" for
// the default.
func rootOf(given any) string {
	s, ok := given.(*section)
	if !ok {
		return ""
	}
	if path, ok := (*s)["root_path"].(string); ok && filepath.IsAbs(path) {
		return path
	}
	return ""
}

func read[T any](given any, uri string, defaults func() *T) (*T, error) {
	s, ok := given.(*section)
	if !ok {
		return defaults(), fmt.Errorf("containerd passed the configuration of %s as %T: %w", uri, given, errdefs.ErrInternal)
	}
	config := defaults()
	if err := s.decode(config); err != nil {
		return defaults(), fmt.Errorf("[plugins.'%s']: %w", uri, err)
	}
	return config, nil
}
