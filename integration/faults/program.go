package faults

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// action is the effect of one hit of a point.
type action struct {
	kind  string        // "off", "error", "delay", "block" or "die"
	text  string        // of "error"
	delay time.Duration // of "delay"
}

// term is an action for its next hits, as many as times says; 0 is for all that follow.
type term struct {
	times int
	action
}

// program has the actions for the hits of a point. The package documentation has its text form.
type program []term

var termPattern = regexp.MustCompile(`^(?:(\d+)\*)?(off|block|die|error\((.*?)\)|delay\((\d+)\))(?:->\b|$)`)

func parse(text string) (program, error) {
	var p program
	for rest := text; rest != ""; {
		m := termPattern.FindStringSubmatch(rest)
		if m == nil {
			return nil, fmt.Errorf("failed to parse fault program %q at %q: want [N*](off|error(TEXT)|delay(MS)|block|die), joined by \"->\": %w",
				text, rest, errdefs.ErrInvalidArgument)
		}
		t, err := newTerm(m)
		if err != nil {
			return nil, fmt.Errorf("failed to parse fault program %q: %w", text, err)
		}
		p = append(p, t)
		rest = rest[len(m[0]):]
	}
	return p, nil
}

func newTerm(m []string) (term, error) {
	t := term{action: action{text: m[3]}}
	t.kind, _, _ = strings.Cut(m[2], "(")
	if m[1] != "" {
		n, err := strconv.Atoi(m[1])
		if err != nil || n == 0 {
			return term{}, fmt.Errorf("count %q: %w", m[1], errdefs.ErrInvalidArgument)
		}
		t.times = n
	}
	if m[4] != "" {
		ms, err := strconv.Atoi(m[4])
		if err != nil {
			return term{}, fmt.Errorf("delay %q ms: %w", m[4], errdefs.ErrInvalidArgument)
		}
		t.delay = time.Duration(ms) * time.Millisecond
	}
	return t, nil
}

// at returns the action of a hit, counted from 1. A program without a term for the hit is off.
func (p program) at(hit int) action {
	for _, t := range p {
		if t.times == 0 || hit <= t.times {
			return t.action
		}
		hit -= t.times
	}
	return action{kind: "off"}
}
