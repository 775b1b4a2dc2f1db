// Command podfsm shows an operator the pod sandboxes that podfsm runs in
// containerd: their states, their steps, pending cleanups and leaks. While the
// daemon is down it reads its ledger.
package main

//go:generate go test -run ^TestReference$ . -update

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/urfave/cli/v3"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

const defaultTimeout = 10 * time.Second

func main() {
	_ = log.SetLevel(log.PanicLevel.String()) // of the engine's own, which tell a daemon's log what the output says here
	if err := run(context.Background(), os.Args, os.Stdout, os.Stderr); err != nil {
		complain(os.Stderr, "%v", err)
		os.Exit(exitStatus(err))
	}
}

// run is the whole program. The first of args is the program's name.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	return program(stdout, stderr).Run(ctx, args)
}

// program returns the tree of all commands.
func program(stdout, stderr io.Writer) *cli.Command {
	root := &cli.Command{
		Name:  "podfsm",
		Usage: "show and mend the pod sandboxes that podfsm runs in containerd",
		Description: "podfsm asks the daemon on containerd's socket, which it finds by containerd's configuration.\n" +
			"While the daemon is down, it reads the daemon's ledger and says so.",
		Writer:    stdout,
		ErrWriter: stderr,
		Flags: append(placeFlags(),
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
		),
		Commands: []*cli.Command{
			statusCommand(), psCommand(), watchCommand(),
			describeCommand(), inspectCommand(), timelineCommand(), graphCommand(), logsCommand(),
			cleanupsCommand(), leaksCommand(), idsCommand(),
			doctorCommand(), bundleCommand(), drainCommand(), handlerCommand(), versionCommand(),
		},
		EnableShellCompletion:           true,
		ConfigureShellCompletionCommand: func(completion *cli.Command) { completion.Hidden = false },
		Action: func(_ context.Context, cmd *cli.Command) error {
			if cmd.Bool("version") {
				_, err := fmt.Fprintf(stdout, "podfsm %s\n", versions())
				return err
			}
			if cmd.Args().Present() {
				return usagef("unknown command %q (see podfsm --help)", cmd.Args().First())
			}
			return cli.ShowRootCommandHelp(cmd)
		},
	}
	returnUsageErrors(root)
	return root
}

// returnUsageErrors makes a command and its subcommands return a usage error instead of printing
// their help.
func returnUsageErrors(cmd *cli.Command) {
	cmd.OnUsageError = func(_ context.Context, _ *cli.Command, err error, _ bool) error { return usageError{err} }
	for _, below := range cmd.Commands {
		returnUsageErrors(below)
	}
}

// list asks the daemon, or reads its ledger while the daemon is down.
func list(ctx context.Context, cmd *cli.Command, ended bool) (*podfsmv1.ListResponse, error) {
	response, err := call(ctx, cmd, podfsmv1.SandboxesClient.List, &podfsmv1.ListRequest{Ended: ended})
	return orLedger(ctx, cmd, response, err, func(l *savedLedger) (*podfsmv1.ListResponse, error) { return l.list(ended), nil })
}

// completeRef completes REF with the names of pods, and the ids of sandboxes without a pod.
func completeRef(ctx context.Context, cmd *cli.Command) {
	cli.DefaultCompleteWithFlags(ctx, cmd)
	if args := cmd.Args().Slice(); len(args) > 0 && strings.HasPrefix(args[len(args)-1], "-") {
		return
	}
	response, err := call(ctx, cmd, podfsmv1.SandboxesClient.List, &podfsmv1.ListRequest{Ended: true})
	if err != nil {
		return // completion has no place for an error
	}
	var refs []string
	for _, s := range response.GetSandboxes() {
		refs = append(refs, printable(cmp.Or(podOf(s), s.GetId())))
	}
	slices.Sort(refs)
	for _, ref := range slices.Compact(refs) {
		fmt.Fprintln(cmd.Root().Writer, ref)
	}
}

// refDescription explains the references to sandboxes.
const refDescription = `REF is a pod's namespace/name or name, a sandbox id or its beginning. Of several sandboxes of one
pod the newest counts. Sandboxes that have ended are found, too: the last 200, failed creations among them.`

// inspect asks the daemon, or reads its ledger while the daemon is down.
func inspect(ctx context.Context, cmd *cli.Command, ref string) (*podfsmv1.InspectResponse, error) {
	response, err := call(ctx, cmd, podfsmv1.SandboxesClient.Inspect, &podfsmv1.InspectRequest{Ref: ref})
	return orLedger(ctx, cmd, response, err, func(l *savedLedger) (*podfsmv1.InspectResponse, error) { return l.inspect(ref) })
}

func outputFlag(formats ...string) cli.Flag {
	choice := strings.Join(formats, " or ")
	return &cli.StringFlag{
		Name:    "output",
		Aliases: []string{"o"},
		Usage:   "`FORMAT` of the output: " + choice,
		Validator: func(format string) error {
			if !slices.Contains(formats, format) {
				return errors.New("must be " + choice)
			}
			return nil
		},
	}
}
