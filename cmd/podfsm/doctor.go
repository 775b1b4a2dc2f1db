package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v3"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/doctor"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/show"
	"github.com/podfsm/podfsm/userns"
)

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name:  "doctor",
		Usage: "check whether the node has what podfsm's pods need, and print remedies",
		Description: "The status of a check is ok, unknown, warn (pods run, but something is missing or will be) or fail (some or all don't run).\n" +
			"The exit status is 0 if no check fails, and 2 if one does.\n" +
			"While the daemon is down, podfsm reads its configuration, and what only the daemon knows is unknown.\n" +
			"With --preflight, podfsm examines a node before the installation, beside a containerd without podfsm or while that is down. Nothing changes.",
		HideHelpCommand: true,
		Flags: []cli.Flag{outputFlag("json"),
			&cli.BoolFlag{Name: "preflight", Usage: "check the node before podfsm is installed: what to change before containerd-podfsm replaces containerd"}},
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

// examine asks the daemon, or examines the node itself while the daemon is down.
func examine(ctx context.Context, cmd *cli.Command) (*podfsmv1.DoctorResponse, error) {
	response, err := call(ctx, cmd, podfsmv1.SandboxesClient.Doctor, &podfsmv1.DoctorRequest{})
	if !errors.As(err, new(downError)) {
		return response, err
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("%w\nwithout a daemon only root can examine the node", err)
	}
	w := cmd.Root().ErrWriter
	complain(w, "%v", err)
	complain(w, "the daemon is down; what only it knows is unknown")
	p := locate(ctx, cmd)
	config, err := readConfig(ctx, cmd.String("config"), p.root, p.state)
	if err != nil {
		complain(w, "%s; what depends on it is unknown", printable(err.Error()))
	}
	n := thisNode(p)
	n.Config = config
	d := doctor.New(n)
	defer d.Close()
	return show.Examination(d.Examine(ctx)), nil
}

// thisNode describes this machine with a containerd's directories, as far as can be seen without
// the daemon.
func thisNode(p place) doctor.Node {
	return doctor.Node{
		Proc:       "/proc",
		Sys:        "/sys",
		Etc:        "/etc",
		SystemdDir: "/run/systemd/system",
		Root:       p.root,
		State:      p.state,
		Strategies: doctor.TryStrategies,
		Tmpfs:      userns.CheckTmpfs,
		Ledger: func() (doctor.Ledger, error) {
			return closedLedger(p.rootLedger(), p.stateLedger())
		},
	}
}

// closedLedger is the ledger of a daemon that is down.
func closedLedger(rootDir, stateDir string) (doctor.Ledger, error) {
	l := doctor.Ledger{Dirs: []string{rootDir, stateDir}}
	saved, err := ledger.OpenReadOnly(rootDir, stateDir)
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
	l.Files = ledger.Files(rootDir, stateDir)
	l.Damaged = show.Damaged(saved.Damage, saved.Aside)
	l.Pending = show.Pending(views)
	return l, nil
}

// The widths of the columns in characters: status, check, and the rest of the line for the
// evidence.
const (
	pageWidth   = 80
	statusWidth = 9
	checkWidth  = 22
)

var statusStyles = map[string]style{string(doctor.Fail): red, string(doctor.Warn): yellow}

// writeFindings writes a row per finding. The evidence is wrapped, and followed by the remedy and
// the pods that are refused.
func writeFindings(w io.Writer, findings []*podfsmv1.Finding, refused string) error {
	var b bytes.Buffer
	inColour := coloured(w)
	row := func(s style, status, check, text string) {
		for i, line := range wrapped(text, pageWidth-statusWidth-checkWidth) {
			if i > 0 {
				status, check = "", ""
			}
			line = fmt.Sprintf("%-*s%-*s%s", statusWidth, status, checkWidth, check, line)
			if inColour {
				line = s.paint(line)
			}
			fmt.Fprintln(&b, line)
		}
	}
	row(plain, "STATUS", "CHECK", "EVIDENCE")
	for _, f := range findings {
		text := printable(f.GetEvidence())
		if f.GetSubject() != "" {
			text = printable(f.GetSubject()) + ": " + text
		}
		s := statusStyles[f.GetStatus()]
		row(s, f.GetStatus(), f.GetCheck(), text)
		if f.GetRemedy() != "" {
			row(s, "", "", "-> "+printable(f.GetRemedy()))
		}
		if f.GetRefusedPods() != "" {
			row(s, "", "", refused+": "+f.GetRefusedPods())
		}
	}
	_, err := w.Write(b.Bytes())
	return err
}

// wrapped returns the words of a text in lines of a width in characters. A longer word, such as a
// path, gets its own line, so that it can be copied.
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

// failedError says that checks failed, while podfsm doctor itself succeeded.
type failedError struct{ failed int }

func (e failedError) Error() string {
	if e.failed == 1 {
		return "1 check has failed"
	}
	return fmt.Sprintf("%d checks have failed", e.failed)
}

// failures returns an error if any check has failed.
func failures(findings []*podfsmv1.Finding) error {
	var e failedError
	for _, f := range findings {
		if f.GetStatus() == string(doctor.Fail) {
			e.failed++
		}
	}
	if e.failed == 0 {
		return nil
	}
	return e
}
