package main

import (
	"bufio"
	"context"

	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

func logsCommand() *cli.Command {
	return &cli.Command{
		Name:          "logs",
		Usage:         "print the daemon's log lines about one sandbox",
		ArgsUsage:     "REF",
		ShellComplete: completeRef,
		Description: refDescription + `

The lines come from systemd's journal since the creation of the sandbox, or from a file. They have the sandbox's id or
its trace id. kubectl logs shows the containers' own output.

podfsm logs default/web                            from the journal of containerd.service
podfsm logs -f default/web                         and those to come
podfsm logs --file /var/log/containerd.log web     from a file; - is stdin`,
		HideHelpCommand: true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "unit", Usage: "the systemd `UNIT` of the daemon", Value: "containerd.service"},
			&cli.StringFlag{Name: "file", Usage: "read this `FILE` instead of the journal; - is stdin", TakesFile: true},
			&cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "wait for further lines of the journal"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			ref, err := oneRef(cmd)
			if err != nil {
				return err
			}
			if cmd.IsSet("file") && cmd.Bool("follow") {
				return usagef("logs takes either --file or --follow")
			}
			response, err := inspect(ctx, cmd, ref)
			if err != nil {
				return err
			}
			return writeLogs(ctx, cmd, response.GetSandbox())
		},
	}
}

func writeLogs(ctx context.Context, cmd *cli.Command, s *podfsmv1.Sandbox) error {
	w := cmd.Root().Writer
	switch file := cmd.String("file"); file {
	case "":
		return journalOf(ctx, journalQuery{unit: cmd.String("unit"), since: s.GetCreatedAt().AsTime(), follow: cmd.Bool("follow")},
			func(lines io.Reader) error { return writeLinesAbout(w, lines, s) })
	case "-":
		return writeLinesAbout(w, cmd.Root().Reader, s)
	default:
		lines, err := os.Open(file)
		if err != nil {
			return err
		}
		defer lines.Close()
		return writeLinesAbout(w, lines, s)
	}
}

// longestLine bounds a line of the log. CNI plugins write lines of any length.
const longestLine = 1 << 20

// writeLinesAbout writes the lines of a log that name a sandbox or its trace.
func writeLinesAbout(w io.Writer, log io.Reader, s *podfsmv1.Sandbox) error {
	return eachLine(log, func(line string) error {
		if !strings.Contains(line, s.GetId()) && (s.GetTraceId() == "" || !strings.Contains(line, s.GetTraceId())) {
			return nil
		}
		_, err := fmt.Fprintln(w, printable(line))
		return err
	})
}

func eachLine(log io.Reader, do func(line string) error) error {
	lines := bufio.NewScanner(log)
	lines.Buffer(nil, longestLine)
	for lines.Scan() {
		if err := do(lines.Text()); err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("failed to read the log: %w", err)
	}
	return nil
}

// journalQuery selects lines of systemd's journal.
type journalQuery struct {
	unit   string
	since  time.Time
	follow bool
}

// journalOf copies the lines of a unit from systemd's journal.
func journalOf(ctx context.Context, q journalQuery, read func(io.Reader) error) error {
	program, err := exec.LookPath("journalctl")
	if err != nil {
		return fmt.Errorf("failed to find systemd's journal: %w; name the daemon's log by --file", err)
	}
	args := []string{"--unit", q.unit, "--since", fmt.Sprintf("@%d", q.since.Unix()), "--output", "short-iso", "--no-pager", "--quiet"}
	if q.follow {
		args = append(args, "--follow")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	journal := exec.CommandContext(ctx, program, args...)
	var said strings.Builder
	journal.Stderr = &said
	lines, err := journal.StdoutPipe()
	if err != nil {
		return err
	}
	if err := journal.Start(); err != nil {
		return fmt.Errorf("failed to run journalctl: %w", err)
	}
	failed := read(lines)
	if failed != nil {
		cancel() // nothing reads its output any more
	}
	if err := journal.Wait(); err != nil && failed == nil && ctx.Err() == nil {
		failed = fmt.Errorf("journalctl failed: %w: %s", err, printable(strings.TrimSpace(said.String())))
	}
	return failed
}
