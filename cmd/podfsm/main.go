// Command podfsm shows an operator the pod sandboxes that podfsm runs in
// containerd: their states, their steps, what is owed for them and what has
// leaked. While the daemon is down it reads its ledger.
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
	"github.com/containerd/log"
	"github.com/urfave/cli/v3"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

const defaultTimeout = 10 * time.Second

func main() {
	_ = log.SetLevel(log.PanicLevel.String()) // of the engine's own, which tell a daemon's log what the output says here
	if err := run(context.Background(), os.Args, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintf(os.Stderr, "podfsm: %v\n", err)
		os.Exit(exitStatus(err))
	}
}

// exitStatus is 2 for leaks, for checks that fail, for a drain that isn't done
// and for a cleanup that is still pending, and 1 for whatever could not be done.
func exitStatus(err error) int {
	if errors.As(err, new(leftError)) || errors.As(err, new(failedError)) || errors.As(err, new(undrainedError)) || errors.As(err, new(pendingError)) {
		return 2
	}
	return 1
}

// run is the whole program; args starts with the program's name.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	root := &cli.Command{
		Name:      "podfsm",
		Usage:     "show the pod sandboxes that podfsm runs in containerd",
		Writer:    stdout,
		ErrWriter: stderr,
		Flags: append([]cli.Flag{
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
		}, directoryFlags()...),
		Commands: []*cli.Command{psCommand(), inspectCommand(), timelineCommand(), watchCommand(), graphCommand(), cleanupsCommand(), idsCommand(), leaksCommand(), doctorCommand(), handlerCommand(), drainCommand()},
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
	returnUsageErrors(root)
	return root.Run(ctx, args)
}

// returnUsageErrors keeps a command and those below it from printing its help
// for a mistake.
func returnUsageErrors(cmd *cli.Command) {
	cmd.OnUsageError = func(_ context.Context, _ *cli.Command, err error, _ bool) error { return err }
	for _, below := range cmd.Commands {
		returnUsageErrors(below)
	}
}

func psCommand() *cli.Command {
	return &cli.Command{
		Name:            "ps",
		Usage:           "list the sandboxes, the oldest first",
		HideHelpCommand: true,
		Flags: []cli.Flag{
			outputFlag("wide", "json"),
			&cli.BoolFlag{Name: "all", Aliases: []string{"a"}, Usage: "also those that have ended: the last 200, failed creations among them"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := noArguments(cmd); err != nil {
				return err
			}
			all := cmd.Bool("all")
			response, err := list(ctx, cmd, all)
			if err != nil {
				return err
			}
			output := cmd.String("output")
			if output == "json" {
				return writeJSON(cmd.Root().Writer, response)
			}
			if since := response.GetDrainingSince(); since != nil {
				fmt.Fprintf(cmd.Root().ErrWriter, "podfsm: no new pods are taken since %s ago (podfsm drain --cancel ends that)\n", age(since, time.Now()))
			}
			return writeList(cmd.Root().Writer, response.GetSandboxes(), all, output == "wide", time.Now())
		},
	}
}

// list asks the daemon, or its ledger while that is down.
func list(ctx context.Context, cmd *cli.Command, ended bool) (*podfsmv1.ListResponse, error) {
	response, err := call(ctx, cmd, podfsmv1.SandboxesClient.List, &podfsmv1.ListRequest{Ended: ended})
	return orLedger(cmd, response, err, func(l *ledger) (*podfsmv1.ListResponse, error) { return l.list(ended), nil })
}

// refDescription says what a sandbox can be named by.
const refDescription = `REF is a pod's namespace/name or name, a sandbox id or its beginning. Of several sandboxes of one
pod the newest counts. Sandboxes that have ended are found, too: the last 200, failed creations among them.`

func inspectCommand() *cli.Command {
	return &cli.Command{
		Name:        "inspect",
		Usage:       "show the steps, transitions and pending cleanups of one sandbox",
		ArgsUsage:   "REF",
		Description: refDescription,
		// Otherwise a pod named "help" could not be inspected.
		HideHelpCommand: true,
		Flags:           []cli.Flag{outputFlag("json")},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			ref, err := oneRef(cmd)
			if err != nil {
				return err
			}
			response, err := inspect(ctx, cmd, ref)
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

// inspect asks the daemon, or its ledger while that is down.
func inspect(ctx context.Context, cmd *cli.Command, ref string) (*podfsmv1.InspectResponse, error) {
	response, err := call(ctx, cmd, podfsmv1.SandboxesClient.Inspect, &podfsmv1.InspectRequest{Ref: ref})
	return orLedger(cmd, response, err, func(l *ledger) (*podfsmv1.InspectResponse, error) { return l.inspect(ref) })
}

// noArguments fails where the command has any.
func noArguments(cmd *cli.Command) error {
	if cmd.Args().Present() {
		return fmt.Errorf("%s takes no arguments", cmd.Name)
	}
	return nil
}

// oneRef is the command's only argument.
func oneRef(cmd *cli.Command) (string, error) {
	if cmd.NArg() != 1 {
		return "", fmt.Errorf("%s takes one argument: a pod's namespace/name or name, a sandbox id or its beginning", cmd.Name)
	}
	return cmd.Args().First(), nil
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
