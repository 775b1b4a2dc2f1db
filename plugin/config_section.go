package plugin

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

// section is a plugin's section of containerd's configuration as it stands there. containerd itself decodes it, leaves out with a
// warning what the type doesn't have, and doesn't start where a value has another type. A map takes everything, so that a mistake
// can be told, and keeps nothing but podfsm from working.
type section map[string]any

// sectionOf is the section with the given options.
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
		return fmt.Errorf("its options can't be read: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	err = toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(into)
	if unknown := (&toml.StrictMissingError{}); errors.As(err, &unknown) {
		var names []string
		for _, one := range unknown.Errors {
			names = append(names, strings.Join(one.Key(), "."))
		}
		return fmt.Errorf("unknown option %s: correct it, or take it out: %w", strings.Join(names, ", "), errdefs.ErrInvalidArgument)
	}
	if wrong := (&toml.DecodeError{}); errors.As(err, &wrong) {
		return fmt.Errorf("option %s has a value of the wrong type, or one that is too large: %w", strings.Join(wrong.Key(), "."), errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fmt.Errorf("its options can't be read: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// optionsOf reads podfsm's own section, as containerd gives it to the controller. With an error come the defaults.
func optionsOf(given any) (*Config, error) { return read(given, URI, defaultConfig) }

// snapshotterOptionsOf reads the section of podfsm's snapshotter likewise, and looks at the values.
func snapshotterOptionsOf(given any) (*SnapshotterConfig, error) {
	uri := plugins.SnapshotPlugin.String() + "." + Name
	config, err := read(given, uri, defaultSnapshotterConfig)
	if err != nil {
		return config, err
	}
	if err := config.check(); err != nil {
		return defaultSnapshotterConfig(), fmt.Errorf("[plugins.'%s']: %w", uri, err)
	}
	return config, nil
}

func read[T any](given any, uri string, defaults func() *T) (*T, error) {
	s, ok := given.(*section)
	if !ok {
		return defaults(), fmt.Errorf("containerd gives the configuration of %s as %T: %w", uri, given, errdefs.ErrInternal)
	}
	config := defaults()
	if err := s.decode(config); err != nil {
		return defaults(), fmt.Errorf("[plugins.'%s']: %w", uri, err)
	}
	return config, nil
}
