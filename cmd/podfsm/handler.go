package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strings"

	server "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/pelletier/go-toml/v2"
	"github.com/urfave/cli/v3"
)

func handlerCommand() *cli.Command {
	return &cli.Command{
		Name:  "handler",
		Usage: "print the runtime handler podfsm for this node, as a file for containerd's conf.d",
		Description: "The handler has the settings of one that the node has already, so that podfsm's pods have its runtime and cgroup driver:\n" +
			"the default handler, or runc where that is podfsm's. Nothing is changed.",
		HideHelpCommand: true,
		Flags: []cli.Flag{
			configFlag("containerd's configuration"),
			&cli.StringFlag{Name: "like", Usage: "the handler whose settings are taken"},
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
			return writeHandler(cmd.Root().Writer, config, cmd.String("like"))
		},
	}
}

// writeHandler writes the handler podfsm with the settings of another one.
func writeHandler(w io.Writer, config *server.Config, like string) error {
	sections, err := readSections(config)
	if err != nil {
		return err
	}
	if like == "" {
		like = sections.stockHandler("").Name
	}
	settings, err := settingsOf(config, like)
	if err != nil {
		return err
	}
	settings["sandboxer"] = own
	table := map[string]any{
		"version": oldestConfig,
		"plugins": map[string]any{runtimeSection: map[string]any{"containerd": map[string]any{"runtimes": map[string]any{own: settings}}}},
	}
	text, err := toml.Marshal(table)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, handlerHead, own, like, withoutEmptyTables(string(text)))
	return err
}

const handlerHead = `# The runtime handler %q: this node's handler %q with podfsm's sandboxer.
# Printed by podfsm handler. podfsm's own options are explained in
# /usr/share/doc/podfsm/docs/operators.md.
%s`

// withoutEmptyTables leaves out the headers of tables that only have tables.
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

// settingsOf are those of a runtime handler, without the ones that say nothing.
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
		return nil, fmt.Errorf("there is no runtime handler %q in containerd's configuration; name one by --like: %s", name, strings.Join(slices.Sorted(maps.Keys(all)), ", "))
	}
	if options, ok := settings["options"].(map[string]any); ok {
		systemd := options["SystemdCgroup"]
		maps.DeleteFunc(options, unset)
		if systemd != nil {
			options["SystemdCgroup"] = systemd // which is to be seen, also where it is false
		}
	}
	maps.DeleteFunc(settings, unset)
	return settings, nil
}

// unset says of a setting that it is what containerd takes without it.
func unset(_ string, value any) bool {
	v := reflect.ValueOf(value)
	return !v.IsValid() || v.IsZero() || (v.Kind() == reflect.Slice || v.Kind() == reflect.Map) && v.Len() == 0
}
