package main

import (
	"strings"
	"time"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

// barWidth is the width of a timeline in characters.
const barWidth = 30

// period is the time from start to end.
type period struct {
	start, end time.Time
}

func (p period) length() time.Duration {
	return p.end.Sub(p.start)
}

// stepPeriod is when s ran, up to now when it still runs. It is false for a step
// that was never started.
func stepPeriod(s *podfsmv1.Step, now time.Time) (period, bool) {
	if s.GetStartedAt() == nil {
		return period{}, false
	}
	start := s.GetStartedAt().AsTime()
	if s.GetDuration() == nil {
		return period{start, now}, true
	}
	return period{start, start.Add(s.GetDuration().AsDuration())}, true
}

// periodOf is the time from the first start of all steps to the last end.
func periodOf(steps []*podfsmv1.Step, now time.Time) period {
	var whole period
	for _, s := range steps {
		p, ok := stepPeriod(s, now)
		if !ok {
			continue
		}
		if whole.start.IsZero() || p.start.Before(whole.start) {
			whole.start = p.start
		}
		if p.end.After(whole.end) {
			whole.end = p.end
		}
	}
	return whole
}

// bar draws where in the whole part lies, as "[   ===     ]"; however short,
// it has a mark.
func (whole period) bar(part period) string {
	from := whole.column(part.start)
	to := max(whole.column(part.end), from+1)
	if to > barWidth {
		from, to = barWidth-1, barWidth
	}
	return "[" + strings.Repeat(" ", from) + strings.Repeat("=", to-from) + strings.Repeat(" ", barWidth-to) + "]"
}

// column is the character of a bar that t falls on, from 0 to barWidth.
func (whole period) column(t time.Time) int {
	if whole.length() <= 0 {
		return 0
	}
	fraction := float64(t.Sub(whole.start)) / float64(whole.length())
	return min(max(int(fraction*barWidth+0.5), 0), barWidth)
}
