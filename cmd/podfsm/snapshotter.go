package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	server "github.com/containerd/containerd/v2/cmd/containerd/server/config"
)

// ownSnapshotter is podfsm's.
const ownSnapshotter = "podfsm"

// checkSnapshotter is an error when the configuration gives podfsm's snapshotter
// to pods that aren't podfsm's: a containerd without podfsm can't run them, and
// has no CRI at all when it is the default one.
func checkSnapshotter(config *server.Config) error {
	names, err := snapshotterSettings(config)
	if err != nil {
		return err
	}
	if len(names) > 0 {
		return undrainedError{fmt.Errorf("containerd's configuration gives podfsm's snapshotter to pods that aren't podfsm's, and a containerd without it can't run them: "+
			"take snapshotter = %q out of %s, and restart containerd-podfsm", ownSnapshotter, strings.Join(names, " and "))}
	}
	return nil
}

// snapshotterSettings are the sections that give podfsm's snapshotter to other
// pods, in all versions of the configuration.
func snapshotterSettings(config *server.Config) (names []string, _ error) {
	type settings struct {
		Snapshotter string                   `toml:"snapshotter"`
		Runtimes    map[string]handlerConfig `toml:"runtimes"`
	}
	look := func(section string, s settings) {
		if s.Snapshotter == ownSnapshotter {
			names = append(names, "["+section+"]")
		}
		for _, name := range slices.Sorted(maps.Keys(s.Runtimes)) {
			if h := s.Runtimes[name]; h.Snapshotter == ownSnapshotter && h.Sandboxer != "podfsm" {
				names = append(names, fmt.Sprintf("[%s.runtimes.%s]", section, name))
			}
		}
	}
	for _, section := range []string{imagesSection, runtimeSection, criDir} {
		var given struct {
			settings
			Containerd settings `toml:"containerd"`
		}
		if err := readSection(config, section, &given); err != nil {
			return nil, err
		}
		quoted := fmt.Sprintf("plugins.'%s'", section)
		look(quoted, given.settings)
		look(quoted+".containerd", given.Containerd)
	}
	return names, nil
}
