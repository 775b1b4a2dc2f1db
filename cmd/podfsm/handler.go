package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	server "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/pkg/atomicfile"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/pelletier/go-toml/v2"
	"github.com/urfave/cli/v3"
)

func handlerCommand() *cli.Command {
	return &cli.Command{
		Name:  "handler",
		Usage: "print or write the runtime handler podfsm for this node, as a file for containerd's conf.d",
		Description: "The handler gets the settings of a handler that the node has already, so that podfsm's pods have the same runtime and\n" +
			"cgroup driver: those of the default handler, or of runc if the default is podfsm's. Without --write, nothing changes.",
		HideHelpCommand: true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "like", Usage: "the handler whose settings are copied"},
			&cli.StringFlag{Name: "write", TakesFile: true, Usage: "write the handler to this `FILE`, unless the file has settings that would be lost"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := noArguments(cmd); err != nil {
				return err
			}
			program, err := findProgram()
			if err != nil {
				return err
			}
			config, err := dumpConfig(ctx, cmd.Duration("timeout"), program, cmd.String("config"))
			if err != nil {
				return fmt.Errorf("failed to read containerd's configuration %q: %w", cmd.String("config"), err)
			}
			text, err := handlerText(config, cmd.String("like"))
			if err != nil {
				return err
			}
			if file := cmd.String("write"); file != "" {
				return replaceHandler(file, text)
			}
			_, err = io.WriteString(cmd.Root().Writer, text)
			return err
		},
	}
}

// handlerText returns a file with the handler podfsm, which has the settings of another handler.
func handlerText(config *server.Config, like string) (string, error) {
	sections, err := readSections(config)
	if err != nil {
		return "", err
	}
	if like == "" {
		like = sections.stockHandler("").Name
	}
	settings, err := settingsOf(config, like)
	if err != nil {
		return "", err
	}
	settings["sandboxer"] = own
	table := map[string]any{
		"version": oldestConfig,
		"plugins": map[string]any{runtimeSection: map[string]any{"containerd": map[string]any{"runtimes": map[string]any{own: settings}}}},
	}
	text, err := toml.Marshal(table)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf(handlerHead, own, like, withoutEmptyTables(string(text))), nil
}

const handlerHead = `# The runtime handler %q: this node's handler %q with podfsm's sandboxer.
# Printed by podfsm handler. podfsm's own options are explained in
# /usr/share/doc/podfsm/docs/reference/configuration.md.
%s`

// withoutEmptyTables removes the headers of tables that only contain tables.
func withoutEmptyTables(text string) string {
	lines := slices.Collect(strings.Lines(text))
	var kept strings.Builder
	for i, line := range lines {
		if strings.HasPrefix(line, "[") && i+1 < len(lines) && strings.HasPrefix(lines[i+1], "[") {
			continue
		}
		kept.WriteString(line)
	}
	return kept.String()
}

// replaceHandler replaces the file atomically. A file with settings that the new text lacks stays
// as it is: an operator has written them.
func replaceHandler(file, text string) error {
	old, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var has, gets map[string]any
	if err := toml.Unmarshal(old, &has); err != nil {
		return fmt.Errorf("failed to read %q: %w; correct the file, or move it away", file, err)
	}
	if err := toml.Unmarshal([]byte(text), &gets); err != nil {
		return err
	}
	if lost := lacking(has, gets, ""); len(lost) > 0 {
		slices.Sort(lost)
		return fmt.Errorf("failed to write %q: the file has settings that would be lost: %s; "+
			"move them to another file in its directory, or edit the file to have what podfsm handler prints", file, strings.Join(lost, ", "))
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	f, err := atomicfile.New(file, 0o644)
	if err != nil {
		return err
	}
	if _, err := io.WriteString(f, text); err != nil {
		return errors.Join(err, f.Cancel())
	}
	return f.Close()
}

// lacking names the settings of one table that another table lacks. Their values may differ.
func lacking(has, gets map[string]any, prefix string) (names []string) {
	for name, value := range has {
		got, there := gets[name]
		if table, ok := value.(map[string]any); ok {
			within, _ := got.(map[string]any)
			names = append(names, lacking(table, within, prefix+name+".")...)
		} else if !there {
			names = append(names, prefix+name)
		}
	}
	return names
}

// settingsOf returns the settings of a runtime handler, without those that are unset.
func settingsOf(config *server.Config, name string) (map[string]any, error) {
	var runtimes struct {
		Containerd struct {
			Runtimes map[string]map[string]any `toml:"runtimes"`
		} `toml:"containerd"`
	}
	if err := readSection(config, runtimeSection, &runtimes); err != nil {
		return nil, err
	}
	all := runtimes.Containerd.Runtimes
	settings, ok := all[name]
	if !ok {
		return nil, fmt.Errorf("failed to find runtime handler %q in containerd's configuration; name a handler by --like: %s", name, strings.Join(slices.Sorted(maps.Keys(all)), ", "))
	}
	options, _ := settings["options"].(map[string]any)
	systemd, _ := options["SystemdCgroup"].(bool)
	maps.DeleteFunc(options, unset)
	maps.DeleteFunc(settings, unset)
	if settings["runtime_type"] == plugins.RuntimeRuncV2 { // show the cgroup driver also if it is the default
		if options == nil {
			options = map[string]any{}
		}
		options["SystemdCgroup"] = systemd
		settings["options"] = options
	}
	return settings, nil
}

// unset reports whether a setting has the value that containerd uses without it.
func unset(_ string, value any) bool {
	v := reflect.ValueOf(value)
	return !v.IsValid() || v.IsZero() || (v.Kind() == reflect.Slice || v.Kind() == reflect.Map) && v.Len() == 0
}
