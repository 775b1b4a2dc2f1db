package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v3"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/doctor"
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/userns"
)

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name:  "doctor",
		Usage: "examine whether the node has what podfsm's pods need, and say what to do where it hasn't",
		Description: "The verdict of a check is ok, unknown, warn (pods run, but something is missing or will be) or fail (some or all don't run).\n" +
			"The exit status is 0 when nothing fails, 2 when something does, and 1 when the node could not be examined.\n" +
			"While the daemon is down, its configuration is read, and what only the daemon knows is unknown.\n" +
			"With --preflight the node is examined before podfsm is in place, beside a containerd without it or while that is down. Nothing is changed.",
		HideHelpCommand: true,
		Flags: []cli.Flag{outputFlag("json"), configFlag("containerd's configuration, read while the daemon is down and by --preflight"),
			&cli.BoolFlag{Name: "preflight", Usage: "examine the node before podfsm is in place: what to change before containerd-podfsm replaces containerd"}},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := noArguments(cmd); err != nil {
				return err
			}
			look, refused := examine, "pods refused meanwhile"
			if cmd.Bool("preflight") {
				look, refused = preflight, "pods that podfsm would refuse"
			}
			response, err := look(ctx, cmd)
			if err != nil {
				return err
			}
			w := cmd.Root().Writer
			switch {
			case cmd.String("output") == "json":
				err = writeJSON(w, response)
			case cmd.Bool("preflight"):
				err = errors.Join(writeFindings(w, response.GetFindings(), refused), writeKinds(w, response.GetFindings()))
			default:
				err = writeFindings(w, response.GetFindings(), refused)
			}
			if err != nil {
				return err
			}
			return failures(response.GetFindings())
		},
	}
}

// examine asks the daemon, or looks itself while that is down.
func examine(ctx context.Context, cmd *cli.Command) (*podfsmv1.DoctorResponse, error) {
	response, err := call(ctx, cmd, podfsmv1.SandboxesClient.Doctor, &podfsmv1.DoctorRequest{})
	if !errors.As(err, new(downError)) {
		return response, err
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("%w\nwithout a daemon only root can examine the node", err)
	}
	w := cmd.Root().ErrWriter
	fmt.Fprintf(w, "podfsm: %v\n", err)
	fmt.Fprintln(w, "podfsm: the daemon is down; what only it knows is unknown")
	root, state := cmd.String("root"), cmd.String("state")
	config, err := readConfig(ctx, cmd.String("config"), root, state)
	if err != nil {
		fmt.Fprintf(w, "podfsm: %s; what depends on it is unknown\n", printable(err.Error()))
	}
	n := thisNode(root, state)
	n.Config = config
	d := doctor.New(n)
	defer d.Close()
	return records.Examination(d.Examine(ctx)), nil
}

// thisNode is this machine with a containerd's directories, as far as it shows
// without the daemon.
func thisNode(root, state string) doctor.Node {
	return doctor.Node{
		Proc:       "/proc",
		Sys:        "/sys",
		Etc:        "/etc",
		SystemdDir: "/run/systemd/system",
		Root:       root,
		State:      state,
		Strategies: doctor.TryStrategies,
		Tmpfs:      userns.CheckTmpfs,
		Ledger: func() (doctor.Ledger, error) {
			return closedLedger(filepath.Join(root, ledgerDir), filepath.Join(state, ledgerDir))
		},
	}
}

// closedLedger is the ledger of a daemon that is down.
func closedLedger(rootDir, stateDir string) (doctor.Ledger, error) {
	l := doctor.Ledger{Dirs: []string{rootDir, stateDir}}
	saved, err := journal.OpenReadOnly(rootDir, stateDir)
	if errdefs.IsNotFound(err) {
		return l, nil
	}
	if err != nil {
		return l, err
	}
	views, err := records.Replay(saved.Sandboxes)
	if err != nil {
		return l, err
	}
	l.Files = journal.Files(rootDir, stateDir)
	l.Damaged = records.Damaged(saved.Damage, saved.Aside)
	l.Owed = records.Owing(views)
	return l, nil
}

// The columns of the table, in characters: those of the verdict and of the
// check, and what is left for the evidence.
const (
	pageWidth    = 80
	verdictWidth = 9
	checkWidth   = 22
)

// writeFindings has a row per finding, with its evidence wrapped, and below its
// remedy and which pods are refused.
func writeFindings(w io.Writer, findings []*podfsmv1.Finding, refused string) error {
	var b bytes.Buffer
	row := func(verdict, check, text string) {
		for i, line := range wrapped(text, pageWidth-verdictWidth-checkWidth) {
			if i > 0 {
				verdict, check = "", ""
			}
			fmt.Fprintf(&b, "%-*s%-*s%s\n", verdictWidth, verdict, checkWidth, check, line)
		}
	}
	row("VERDICT", "CHECK", "EVIDENCE")
	for _, f := range findings {
		text := printable(f.GetEvidence())
		if f.GetSubject() != "" {
			text = printable(f.GetSubject()) + ": " + text
		}
		row(f.GetVerdict(), f.GetCheck(), text)
		if f.GetRemedy() != "" {
			row("", "", "-> "+printable(f.GetRemedy()))
		}
		if f.GetRefusedPods() != "" {
			row("", "", refused+": "+f.GetRefusedPods())
		}
	}
	_, err := w.Write(b.Bytes())
	return err
}

// wrapped are the words of text in lines of a width in characters. A word that
// is longer, such as a path, has a line for itself, so that it can be copied.
func wrapped(text string, width int) (lines []string) {
	var line string
	for _, word := range strings.Fields(text) {
		switch {
		case line == "":
			line = word
		case len([]rune(line))+1+len([]rune(word)) <= width:
			line += " " + word
		default:
			lines, line = append(lines, line), word
		}
	}
	return append(lines, line)
}

// failedError says that checks have failed: podfsm doctor itself has not.
type failedError struct{ failed int }

func (e failedError) Error() string {
	if e.failed == 1 {
		return "1 check has failed"
	}
	return fmt.Sprintf("%d checks have failed", e.failed)
}

// failures is an error unless nothing has failed.
func failures(findings []*podfsmv1.Finding) error {
	var e failedError
	for _, f := range findings {
		if f.GetVerdict() == string(doctor.Fail) {
			e.failed++
		}
	}
	if e.failed == 0 {
		return nil
	}
	return e
}
