package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/states"
)

func statusCommand() *cli.Command {
	return &cli.Command{
		Name:  "status",
		Usage: "summarize podfsm and its sandboxes on this node",
		Description: "The exit status is 0 if nothing needs an operator. It is 2 if podfsm is degraded, a check of the doctor fails, a cleanup is\n" +
			"pending or a sandbox is quarantined. It is 3 if no daemon with podfsm answers. While the daemon is\n" +
			"down, podfsm shows the ledger.",
		HideHelpCommand: true,
		Flags:           []cli.Flag{outputFlag("json")},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := noArguments(cmd); err != nil {
				return err
			}
			response, failed := call(ctx, cmd, podfsmv1.SandboxesClient.Status, &podfsmv1.StatusRequest{})
			response, err := orLedger(ctx, cmd, response, failed, func(l *savedLedger) (*podfsmv1.StatusResponse, error) { return l.status(), nil })
			if err != nil {
				return err
			}
			w := cmd.Root().Writer
			if cmd.String("output") == "json" {
				err = writeJSON(w, response)
			} else {
				err = writeStatus(w, response, time.Now())
			}
			switch {
			case err != nil:
				return err
			case failed != nil:
				return downError{fmt.Errorf("the daemon is down")}
			default:
				return troubles(response)
			}
		},
	}
}

// troubleError says that podfsm runs and that something needs an operator.
type troubleError struct{ error }

// troubles returns an error if something needs an operator.
func troubles(r *podfsmv1.StatusResponse) error {
	var all []string
	switch {
	case r.GetDegraded() != "": // the same command shows failed checks
		all = append(all, "podfsm is degraded: podfsm doctor")
	case len(r.GetFailedChecks()) > 0:
		all = append(all, "checks fail: podfsm doctor")
	}
	if r.GetPendingCleanups() > 0 {
		all = append(all, "cleanups are pending: podfsm cleanups")
	}
	if r.GetSandboxes()[string(states.Quarantined)] > 0 {
		all = append(all, "sandboxes are quarantined: podfsm ps --state Quarantined")
	}
	if len(all) == 0 {
		return nil
	}
	return troubleError{fmt.Errorf("%s", strings.Join(all, "; "))}
}

func writeStatus(w io.Writer, r *podfsmv1.StatusResponse, now time.Time) error {
	var b bytes.Buffer
	t := newTable(&b)
	t.coloured = coloured(w)
	addDaemonState(t, r, now)
	if since := r.GetDrainingSince(); since != nil {
		t.styled(yellow, "Draining:", "for "+age(since, now)+", no new pods are taken (podfsm drain --cancel ends that)")
	}
	t.row("Sandboxes:", sandboxesByState(r.GetSandboxes()))
	if n := r.GetPendingCleanups(); n > 0 {
		t.styled(red, "Pending cleanups:", fmt.Sprintf("%d (podfsm cleanups)", n))
	} else {
		t.row("Pending cleanups:", "none")
	}
	t.row("Slowest step:", slowestOf(r.GetSlowestStep(), now))
	if pool := r.GetIdPool(); pool != nil {
		t.row("ID pool:", fmt.Sprintf("%d held, %d free, %d in quarantine", pool.GetHeld(), pool.GetFree(), pool.GetQuarantined()))
	}
	if last := r.GetLastRecovery(); last != nil {
		t.row("Last recovery:", recoveryOf(last, now))
	}
	t.flush()
	_, err := w.Write(b.Bytes())
	return err
}

func addDaemonState(t *table, r *podfsmv1.StatusResponse, now time.Time) {
	if r.GetStartedAt() == nil {
		t.styled(red, "Daemon:", "down; what follows is its ledger")
		return
	}
	t.row("Daemon:", fmt.Sprintf("podfsm %s, containerd %s, up for %s", r.GetVersion(), r.GetContainerdVersion(), age(r.GetStartedAt(), now)))
	if r.GetDegraded() != "" {
		t.styled(red, "Degraded:", r.GetDegraded())
	} else {
		t.row("Degraded:", "no")
	}
	if failed := r.GetFailedChecks(); len(failed) > 0 {
		t.styled(red, "Failed checks:", strings.Join(failed, ", ")+" (podfsm doctor)")
	} else {
		t.row("Failed checks:", "none")
	}
}

// sandboxesByState returns a text such as "3: 2 Ready, 1 NotReady", in the order of the table of
// states.
func sandboxesByState(count map[string]uint32) string {
	var total uint32
	var parts []string
	left := maps.Clone(count)
	for _, state := range records.Table().States() {
		if n := count[string(state)]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, state))
		}
		delete(left, string(state))
	}
	for _, state := range slices.Sorted(maps.Keys(left)) { // of a later release
		parts = append(parts, fmt.Sprintf("%d %s", left[state], state))
	}
	for _, n := range count {
		total += n
	}
	if total == 0 {
		return "none"
	}
	return fmt.Sprintf("%d: %s", total, strings.Join(parts, ", "))
}

func slowestOf(s *podfsmv1.SlowestStep, now time.Time) string {
	if s == nil {
		return ""
	}
	pod := podOf(&podfsmv1.Sandbox{PodName: s.GetPodName(), PodNamespace: s.GetPodNamespace()})
	if pod == "" {
		pod = "sandbox " + shorten(s.GetSandboxId())
	}
	if s.GetDuration() == nil {
		return fmt.Sprintf("%s of %s, running for %s", s.GetStep(), pod, age(s.GetStartedAt(), now))
	}
	return fmt.Sprintf("%s of %s, %s", s.GetStep(), pod, span(s.GetDuration().AsDuration()))
}

func recoveryOf(r *podfsmv1.Recovery, now time.Time) string {
	text := fmt.Sprintf("%s ago, in %s", age(r.GetStartedAt(), now), span(r.GetDuration().AsDuration()))
	for _, outcome := range slices.Sorted(maps.Keys(r.GetOutcomes())) {
		text += fmt.Sprintf(", %d %s", r.GetOutcomes()[outcome], outcome)
	}
	return text
}
