// Command podfsm shows an operator the pod sandboxes that podfsm runs in
// containerd: their states, their steps and what is owed for them.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/defaults"
	"github.com/urfave/cli/v3"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

const defaultTimeout = 10 * time.Second

func main() {
	if err := run(context.Background(), os.Args, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintf(os.Stderr, "podfsm: %v\n", err)
		os.Exit(1)
	}
}

// run is the whole program; args starts with the program's name.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	root := &cli.Command{
		Name:      "podfsm",
		Usage:     "show the pod sandboxes that podfsm runs in containerd",
		Writer:    stdout,
		ErrWriter: stderr,
		Flags: []cli.Flag{
			&cli.StringFlag{
				Name:    "address",
				Usage:   "containerd's gRPC socket",
				Value:   defaults.DefaultAddress,
				Sources: cli.EnvVars("CONTAINERD_ADDRESS"),
			},
			&cli.DurationFlag{
				Name:  "timeout",
				Usage: "how long to wait for an answer",
				Value: defaultTimeout,
				Validator: func(d time.Duration) error {
					if d <= 0 {
						return errors.New("must be positive")
					}
					return nil
				},
			},
			&cli.BoolFlag{
				Name:  "version",
				Usage: "print the version of podfsm and of the containerd it was built with",
				Local: true,
			},
		},
		Commands: []*cli.Command{psCommand(), inspectCommand(), debtsCommand()},
		Action: func(_ context.Context, cmd *cli.Command) error {
			if cmd.Bool("version") {
				_, err := fmt.Fprintf(stdout, "podfsm %s\n", versions())
				return err
			}
			if cmd.Args().Present() {
				return fmt.Errorf("unknown command %q (see podfsm --help)", cmd.Args().First())
			}
			return cli.ShowRootCommandHelp(cmd)
		},
	}
	for _, cmd := range append(root.Commands, root) {
		cmd.OnUsageError = func(_ context.Context, _ *cli.Command, err error, _ bool) error { return err }
	}
	return root.Run(ctx, args)
}

func psCommand() *cli.Command {
	return &cli.Command{
		Name:            "ps",
		Usage:           "list the sandboxes, the oldest first",
		HideHelpCommand: true,
		Flags:           []cli.Flag{outputFlag("wide", "json")},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if cmd.Args().Present() {
				return errors.New("ps takes no arguments")
			}
			response, err := call(ctx, cmd, podfsmv1.SandboxesClient.List, &podfsmv1.ListRequest{})
			if err != nil {
				return err
			}
			output := cmd.String("output")
			if output == "json" {
				return writeJSON(cmd.Root().Writer, response)
			}
			return writeList(cmd.Root().Writer, response.GetSandboxes(), output == "wide", time.Now())
		},
	}
}

func inspectCommand() *cli.Command {
	return &cli.Command{
		Name:        "inspect",
		Usage:       "show the steps, transitions and debts of one sandbox",
		ArgsUsage:   "REF",
		Description: "REF is a sandbox id, a unique prefix of one, a pod's namespace/name or a pod's name.",
		// Otherwise a pod named "help" could not be inspected.
		HideHelpCommand: true,
		Flags:           []cli.Flag{outputFlag("json")},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if cmd.NArg() != 1 {
				return errors.New("inspect takes one argument: a sandbox id, a prefix of one, or a pod's namespace/name or name")
			}
			response, err := call(ctx, cmd, podfsmv1.SandboxesClient.Inspect, &podfsmv1.InspectRequest{Ref: cmd.Args().First()})
			if err != nil {
				return err
			}
			if cmd.String("output") == "json" {
				return writeJSON(cmd.Root().Writer, response)
			}
			return writeInspection(cmd.Root().Writer, response, time.Now())
		},
	}
}

func outputFlag(formats ...string) cli.Flag {
	choice := strings.Join(formats, " or ")
	return &cli.StringFlag{
		Name:    "output",
		Aliases: []string{"o"},
		Usage:   "output format: " + choice + "; for people to read without it",
		Validator: func(format string) error {
			if !slices.Contains(formats, format) {
				return errors.New("must be " + choice)
			}
			return nil
		},
	}
}
