package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v3"
	"google.golang.org/protobuf/types/known/timestamppb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/show"
	"github.com/podfsm/podfsm/states"
)

func psCommand() *cli.Command {
	return &cli.Command{
		Name:  "ps",
		Usage: "list the sandboxes, those in trouble first",
		Description: `Without --sort-by, sandboxes in trouble come first, then those that are not ready, those that are being made or
ended, and the rest. Within each group the oldest comes first. With a pending cleanup, SINCE is the time of the first
failure.

podfsm ps                                         all sandboxes that have not ended
podfsm ps -n default --state CleanupOwed          those of pods in a namespace, in a state
podfsm ps -w                                      and each one again whenever it changes
podfsm ps -q --state NotReady | xargs -n1 podfsm describe`,
		HideHelpCommand: true,
		Flags: []cli.Flag{
			outputFlag("wide", "json"),
			&cli.BoolFlag{Name: "all", Aliases: []string{"a"}, Usage: "also those that have ended: the last 200, failed creations among them"},
			&cli.BoolFlag{Name: "watch", Aliases: []string{"w"}, Usage: "list, and then print each sandbox that changes"},
			&cli.StringFlag{Name: "namespace", Aliases: []string{"n"}, Usage: "only pods in this `NAMESPACE` of Kubernetes"},
			&cli.StringSliceFlag{Name: "state", Usage: "only sandboxes in this `STATE`; may be repeated", Validator: knownStates},
			&cli.StringFlag{Name: "sort-by", Usage: "sort by age, name, namespace, since or state", Validator: knownOrder},
			&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "print ids alone"},
			&cli.BoolFlag{Name: "no-headers", Usage: "print no header"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := noArguments(cmd); err != nil {
				return err
			}
			p := newListing(cmd)
			if cmd.Bool("watch") {
				return p.watch(ctx, cmd)
			}
			response, err := list(ctx, cmd, p.all)
			if err != nil {
				return err
			}
			if !p.json && !p.quiet {
				tellDrain(cmd, response)
			}
			return p.write(cmd.Root().Writer, response)
		},
	}
}

// tellDrain reports a drain on stderr.
func tellDrain(cmd *cli.Command, response *podfsmv1.ListResponse) {
	if since := response.GetDrainingSince(); since != nil {
		complain(cmd.Root().ErrWriter, "no new pods are taken since %s ago (podfsm drain --cancel ends that)", age(since, time.Now()))
	}
}

func knownStates(names []string) error {
	for _, name := range names {
		if !slices.ContainsFunc(records.Table().States(), func(s states.State) bool { return strings.EqualFold(string(s), name) }) {
			return fmt.Errorf("invalid state %q; podfsm graph shows the states", name)
		}
	}
	return nil
}

// orders are the sort orders by name.
var orders = map[string]func(a, b *podfsmv1.Sandbox) int{
	"":    byTrouble,
	"age": byAge,
	"name": func(a, b *podfsmv1.Sandbox) int {
		return cmp.Or(cmp.Compare(a.GetPodName(), b.GetPodName()), byAge(a, b))
	},
	"namespace": func(a, b *podfsmv1.Sandbox) int { return cmp.Or(cmp.Compare(podOf(a), podOf(b)), byAge(a, b)) },
	"since": func(a, b *podfsmv1.Sandbox) int {
		return cmp.Or(sinceOf(a).AsTime().Compare(sinceOf(b).AsTime()), byAge(a, b))
	},
	"state": func(a, b *podfsmv1.Sandbox) int { return cmp.Or(cmp.Compare(a.GetState(), b.GetState()), byAge(a, b)) },
}

func knownOrder(name string) error {
	if _, ok := orders[name]; !ok || name == "" {
		return errors.New("must be age, name, namespace, since or state")
	}
	return nil
}

// sinceOf returns when the sandbox entered its state. Retries leave CleanupOwed and enter it again, so
// with a pending cleanup it is the time of the first failure.
func sinceOf(s *podfsmv1.Sandbox) *timestamppb.Timestamp {
	since := s.GetSince()
	for _, c := range s.GetPendingCleanups() {
		if c.GetSince() != nil && c.GetSince().AsTime().Before(since.AsTime()) {
			since = c.GetSince()
		}
	}
	return since
}

// byAge puts the oldest sandbox first.
func byAge(a, b *podfsmv1.Sandbox) int {
	return cmp.Or(a.GetCreatedAt().AsTime().Compare(b.GetCreatedAt().AsTime()), cmp.Compare(a.GetId(), b.GetId()))
}

func byTrouble(a, b *podfsmv1.Sandbox) int {
	return cmp.Or(cmp.Compare(conditionOf(a), conditionOf(b)), byAge(a, b))
}

// condition is the health of a sandbox; a smaller value is worse.
type condition int

const (
	inTrouble condition = iota // needs an operator
	notReady
	underway // being made or ended
	readyNow
	over // stopped or ended
)

func conditionOf(s *podfsmv1.Sandbox) condition {
	state := states.State(s.GetState())
	switch {
	case state.Terminal() || state == states.Stopped:
		return over
	case len(s.GetPendingCleanups()) > 0 || state == states.CleanupOwed || state == states.Quarantined:
		return inTrouble
	case state == states.NotReady || s.GetError() != "":
		return notReady
	case state == states.Ready:
		return readyNow
	default:
		return underway
	}
}

func isEnded(state string) bool { return states.State(state).Terminal() }

// styleOf returns the colour of the row of a sandbox.
func styleOf(s *podfsmv1.Sandbox) style {
	switch conditionOf(s) {
	case inTrouble:
		return red
	case notReady, underway:
		return yellow
	default:
		return plain
	}
}

// listing is what a list of sandboxes shows.
type listing struct {
	all, wide, json, quiet, noHeader bool

	namespace string
	states    []string
	order     func(a, b *podfsmv1.Sandbox) int
}

func newListing(cmd *cli.Command) listing {
	output := cmd.String("output")
	return listing{
		all: cmd.Bool("all"), wide: output == "wide", json: output == "json", quiet: cmd.Bool("quiet"), noHeader: cmd.Bool("no-headers"),
		namespace: cmd.String("namespace"), states: cmd.StringSlice("state"), order: orders[cmd.String("sort-by")],
	}
}

// shows reports whether the flags select a sandbox.
func (p listing) shows(s *podfsmv1.Sandbox) bool {
	if p.namespace != "" && s.GetPodNamespace() != p.namespace {
		return false
	}
	return len(p.states) == 0 || slices.ContainsFunc(p.states, func(name string) bool { return strings.EqualFold(name, s.GetState()) })
}

func (p listing) write(w io.Writer, response *podfsmv1.ListResponse) error {
	response.Sandboxes = slices.DeleteFunc(response.Sandboxes, func(s *podfsmv1.Sandbox) bool { return !p.shows(s) })
	slices.SortStableFunc(response.Sandboxes, p.order)
	switch {
	case p.json:
		return writeJSON(w, response)
	case p.quiet:
		return writeIDsOf(w, response.GetSandboxes())
	default:
		return p.writeTable(w, response.GetSandboxes(), time.Now())
	}
}

func writeIDsOf(w io.Writer, sandboxes []*podfsmv1.Sandbox) error {
	for _, s := range sandboxes {
		if _, err := fmt.Fprintln(w, printable(s.GetId())); err != nil {
			return err
		}
	}
	return nil
}

func (p listing) writeTable(w io.Writer, sandboxes []*podfsmv1.Sandbox, now time.Time) error {
	var b bytes.Buffer
	var header []string
	if !p.noHeader {
		header = p.header()
	}
	t := newTable(&b, header...)
	t.coloured = coloured(w)
	for _, s := range sandboxes {
		t.styled(styleOf(s), p.cells(s, now)...)
	}
	t.flush()
	_, err := w.Write(b.Bytes())
	return err
}

func (p listing) header() []string {
	header := []string{"SANDBOX", "POD", "STATE", "SINCE", "STEP", "IP", "AGE"}
	if p.all || p.wide {
		header = append(header, "ATTEMPT")
	}
	if p.all {
		header = append(header, "FAILED STEP")
	}
	if p.wide {
		header = append(header, "NAMESPACE", "HANDLER", "PID", "UIDS", "CLEANUPS", "TRACE", "ERROR")
	}
	return header
}

func (p listing) cells(s *podfsmv1.Sandbox, now time.Time) []string {
	cells := []string{shorten(s.GetId()), podOf(s), stateOf(s), age(sinceOf(s), now), s.GetStep(), s.GetIp(), age(s.GetCreatedAt(), now)}
	if p.all || p.wide {
		cells = append(cells, strconv.FormatUint(uint64(s.GetAttempt()), 10))
	}
	if p.all {
		cells = append(cells, s.GetFailedStep())
	}
	if p.wide {
		cells = append(cells,
			s.GetContainerdNamespace(),
			s.GetRuntimeHandler(),
			pidOf(s),
			mappings(s.GetUserns().GetUids()),
			strconv.Itoa(len(s.GetPendingCleanups())),
			s.GetTraceId(),
			s.GetError())
	}
	return cells
}

// writeList lists sandboxes in the format of podfsm ps.
func writeList(w io.Writer, sandboxes []*podfsmv1.Sandbox, wide bool, now time.Time) error {
	return listing{wide: wide}.writeTable(w, sandboxes, now)
}

// watch lists the sandboxes, and then prints each sandbox that changes.
func (p listing) watch(ctx context.Context, cmd *cli.Command) error {
	w := cmd.Root().Writer
	widths := make([]int, len(p.header()))
	print := func(s *podfsmv1.Sandbox) error {
		switch {
		case !p.shows(s):
			return nil
		case p.json:
			return writeJSONLine(w, s)
		case p.quiet:
			return writeIDsOf(w, []*podfsmv1.Sandbox{s})
		default:
			return writeAligned(w, styleOf(s), p.cells(s, time.Now()), widths)
		}
	}
	list := func(all []*podfsmv1.Sandbox, again bool) error {
		slices.SortStableFunc(all, p.order)
		p.widen(widths, all)
		if !again && !p.noHeader && !p.json && !p.quiet {
			if err := writeAligned(w, plain, p.header(), widths); err != nil {
				return err
			}
		}
		for _, s := range all {
			if err := print(s); err != nil {
				return err
			}
		}
		return nil
	}
	return follow(ctx, cmd, follower{all: p.all, listed: list, moved: func(ctx context.Context, t *podfsmv1.SandboxTransition) error {
		response, err := call(ctx, cmd, podfsmv1.SandboxesClient.Inspect, &podfsmv1.InspectRequest{Ref: t.GetSandboxId()})
		if errors.As(err, new(notFoundError)) {
			return nil // it has ended, and was evicted from the history
		}
		if err != nil {
			return err
		}
		return print(response.GetSandbox())
	}})
}

// widen widens columns for the existing sandboxes and for every state.
func (p listing) widen(widths []int, sandboxes []*podfsmv1.Sandbox) {
	rows := [][]string{p.header(), {2: "CleanupOwed->RolledBack"}}
	for _, s := range sandboxes {
		rows = append(rows, p.cells(s, time.Now()))
	}
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], len([]rune(printable(cell))))
		}
	}
}

// writeAligned writes a row of cells in columns of these widths.
func writeAligned(w io.Writer, s style, cells []string, widths []int) error {
	var line strings.Builder
	for i, cell := range cells {
		fmt.Fprintf(&line, "%-*s  ", widths[i], cmp.Or(printable(cell), absent))
	}
	text := strings.TrimRight(line.String(), " ")
	if coloured(w) {
		text = s.paint(text)
	}
	_, err := fmt.Fprintln(w, text)
	return err
}

// shortID is the number of characters of a sandbox id in tables: that of crictl, unique on a node.
const shortID = show.ShortID

func shorten(id string) string {
	if len(id) > shortID {
		return id[:shortID]
	}
	return id
}

// podOf returns the pod's "namespace/name", "" for a sandbox made without the CRI.
func podOf(s *podfsmv1.Sandbox) string {
	if s.GetPodName() == "" {
		return ""
	}
	return s.GetPodNamespace() + "/" + s.GetPodName()
}

func stateOf(s *podfsmv1.Sandbox) string {
	if s.GetGoal() == "" {
		return s.GetState()
	}
	return fmt.Sprintf("%s->%s", s.GetState(), s.GetGoal())
}

func pidOf(s *podfsmv1.Sandbox) string {
	if s.GetPid() == 0 {
		return ""
	}
	return strconv.FormatUint(uint64(s.GetPid()), 10)
}

// mappings returns each mapping as container_id:host_id:length.
func mappings(ms []*podfsmv1.IDMapping) string {
	texts := make([]string, 0, len(ms))
	for _, m := range ms {
		texts = append(texts, fmt.Sprintf("%d:%d:%d", m.GetContainerId(), m.GetHostId(), m.GetLength()))
	}
	return strings.Join(texts, ",")
}
