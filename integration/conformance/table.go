package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
)

// deviations are the specs that podfsm fails on purpose, by their text, with the reason. There are
// none today.
var deviations = map[string]string{}

// withoutImages are the specs that fail on both sides, because the registry here lacks their
// images.
var withoutImages = map[string]string{
	"[k8s.io] Image Manager public image with digest should be pulled and removed [Conformance]": "the spec names the image by its digest",
	"[k8s.io] Security Context bucket runtime should support MaskedPaths":                        "the shell of Debian's busybox has an ls of its own, which no mask hides",
}

// races are the specs that skip themselves if containerd loses a container while an NRI plugin
// connects, and pass otherwise. This happens by chance, with both handlers.
var races = []string{
	"[k8s.io] NRI plugin synchronization should receive a callback for container created during the Synchronize call",
	"[k8s.io] NRI plugin synchronization should receive information about all containers without the race condition during initialization",
}

// fewest is the minimal number of specs that pass with stock. With fewer, the images or the machine
// are broken, and the comparison is worthless.
const fewest = 120

// row is the outcome of a spec on both sides.
type row struct {
	text          string
	stock, podfsm result
}

// differs reports whether a spec passes with stock and not with podfsm.
func (r row) differs() bool { return r.stock.state == passed && r.podfsm.state != passed }

// table lists the specs that differ first, then those that fail, then those that pass on one side
// only or are skipped.
func table(stock, podfsm map[string]result) (rows []row) {
	all := maps.Clone(stock)
	maps.Copy(all, podfsm)
	for _, text := range slices.Sorted(maps.Keys(all)) {
		rows = append(rows, row{text, stock[text], podfsm[text]})
	}
	rank := func(r row) int {
		switch {
		case r.differs():
			return 0
		case r.stock.failed() || r.podfsm.failed():
			return 1
		case r.stock.state != passed || r.podfsm.state != passed:
			return 2
		default:
			return 3
		}
	}
	slices.SortStableFunc(rows, func(a, b row) int { return rank(a) - rank(b) })
	return rows
}

func show(w io.Writer, rows []row) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "stock\tpodfsm\tspec")
	for _, r := range rows {
		fmt.Fprintf(t, "%s\t%s\t%s\n", r.stock, r.podfsm, r.text)
	}
	t.Flush()
	for _, r := range rows {
		if !r.stock.failed() && !r.podfsm.failed() {
			continue
		}
		fmt.Fprintf(w, "\n%s\n", r.text)
		if reason, ok := withoutImages[r.text]; ok {
			fmt.Fprintf(w, "  has no image: %s\n", reason)
			continue
		}
		if r.stock.failed() {
			fmt.Fprintf(w, "  stock: %s\n", begin(r.stock.message))
		}
		if r.podfsm.failed() {
			fmt.Fprintf(w, "  podfsm: %s\n", begin(r.podfsm.message))
		}
	}
}

// begin returns the beginning of a message: the rest is the structure of a gRPC error.
func begin(message string) string {
	lines := strings.Split(strings.TrimSpace(message), "\n")
	return strings.Join(lines[:min(len(lines), 5)], "\n    ")
}

// lists are the known exceptions, by the text of the spec.
type lists struct {
	deviations, withoutImages map[string]string // with the reason
	races                     []string
}

func (l lists) all() []string {
	return slices.Concat(slices.Sorted(maps.Keys(l.deviations)), slices.Sorted(maps.Keys(l.withoutImages)), l.races)
}

// check fails if podfsm does not pass what stock passes, except for the deviations, which podfsm
// has to fail. Either result of a race is accepted.
func (l lists) check(rows []row) error {
	var errs []error
	wrong := func(r row, list string) {
		errs = append(errs, fmt.Errorf("%s with stock, %s with podfsm, take it out of the %s: %s", r.stock, r.podfsm, list, r.text))
	}
	for _, r := range rows {
		_, deviates := l.deviations[r.text]
		_, without := l.withoutImages[r.text]
		lost := r.podfsm.state == skipped && slices.Contains(l.races, r.text)
		switch {
		case r.differs() && !deviates && !lost:
			errs = append(errs, fmt.Errorf("%s with stock, %s with podfsm: %s", r.stock, r.podfsm, r.text))
		case !r.differs() && deviates:
			wrong(r, "deviations")
		case without && !r.stock.failed():
			wrong(r, "specs without images")
		}
	}
	for _, text := range l.all() {
		if !slices.ContainsFunc(rows, func(r row) bool { return r.text == text }) {
			errs = append(errs, fmt.Errorf("listed, but critest has no such spec: %s", text))
		}
	}
	return errors.Join(errs...)
}

// enough fails if fewer specs than least pass with stock.
func enough(stock map[string]result, least int) error {
	if n := count(stock, passed); n < least {
		return fmt.Errorf("%d specs pass with stock, fewer than %d: find out why the others fail or are skipped", n, least)
	}
	return nil
}

func count(results map[string]result, state string) (n int) {
	for _, r := range results {
		if r.state == state {
			n++
		}
	}
	return n
}
