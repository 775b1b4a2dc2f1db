package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	server "github.com/containerd/containerd/v2/cmd/containerd/server/config"
)

// own is the name of podfsm's sandboxer and of its snapshotter.
const own = "podfsm"

// checkStock returns an error if pods of other handlers need podfsm, too. Without its default
// snapshotter or its default handler, a containerd without podfsm has no CRI.
func checkStock(config *server.Config) error {
	settings, err := neededSettings(config)
	if err != nil {
		return err
	}
	if len(settings) > 0 {
		return undrainedError{fmt.Errorf("containerd's configuration needs podfsm for more than podfsm's own handlers; change %s", strings.Join(settings, " and "))}
	}
	return nil
}

// criSettings are the settings of a CRI section that can need podfsm, in any version of the
// configuration.
type criSettings struct {
	Snapshotter string                   `toml:"snapshotter"`
	Default     string                   `toml:"default_runtime_name"`
	Runtimes    map[string]handlerConfig `toml:"runtimes"`
}

// neededSettings returns the settings that need podfsm, with their sections.
func neededSettings(config *server.Config) (needed []string, _ error) {
	for _, section := range []string{imagesSection, runtimeSection, criDir} {
		var given struct {
			criSettings
			Containerd criSettings `toml:"containerd"`
		}
		if err := readSection(config, section, &given); err != nil {
			return nil, err
		}
		quoted := fmt.Sprintf("plugins.'%s'", section)
		needed = append(needed, given.needed(quoted)...)
		needed = append(needed, given.Containerd.needed(quoted+".containerd")...)
	}
	return needed, nil
}

func (s criSettings) needed(section string) (needed []string) {
	if s.Snapshotter == own {
		needed = append(needed, fmt.Sprintf("snapshotter in [%s]", section))
	}
	if s.Runtimes[s.Default].Sandboxer == own {
		needed = append(needed, fmt.Sprintf("default_runtime_name in [%s]", section))
	}
	for _, name := range slices.Sorted(maps.Keys(s.Runtimes)) {
		if h := s.Runtimes[name]; h.Snapshotter == own && h.Sandboxer != own {
			needed = append(needed, fmt.Sprintf("snapshotter in [%s.runtimes.%s]", section, name))
		}
	}
	return needed
}
