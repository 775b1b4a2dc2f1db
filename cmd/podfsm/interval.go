package main

import (
	"strings"
	"time"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

// barWidth is the width of the bars in characters.
const barWidth = 30

// interval is the time from start to end.
type interval struct {
	start, end time.Time
}

func (p interval) length() time.Duration {
	return p.end.Sub(p.start)
}

// stepInterval returns when s ran, up to now if it still runs. It is false for a step that was never
// started.
func stepInterval(s *podfsmv1.Step, now time.Time) (interval, bool) {
	if s.GetStartedAt() == nil {
		return interval{}, false
	}
	start := s.GetStartedAt().AsTime()
	if s.GetDuration() == nil {
		return interval{start, now}, true
	}
	return interval{start, start.Add(s.GetDuration().AsDuration())}, true
}

// intervalOf returns the time from the first start of a step to the last end.
func intervalOf(steps []*podfsmv1.Step, now time.Time) interval {
	var whole interval
	for _, s := range steps {
		p, ok := stepInterval(s, now)
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

// bar draws the position of part in whole, as "[ === ]". Even the shortest part has a mark.
func (whole interval) bar(part interval) string {
	return whole.draw(part, barWidth, "=")
}

// draw is bar with another width and mark.
func (whole interval) draw(part interval, width int, mark string) string {
	from := whole.column(part.start, width)
	to := max(whole.column(part.end, width), from+1)
	if to > width {
		from, to = width-1, width
	}
	return "[" + strings.Repeat(" ", from) + strings.Repeat(mark, to-from) + strings.Repeat(" ", width-to) + "]"
}

// column returns the character of a bar for the time t, from 0 to width.
func (whole interval) column(t time.Time, width int) int {
	return min(max(int(whole.fraction(t)*float64(width)+0.5), 0), width)
}

// fraction returns the position of t in whole, from 0 to 1 unless t is outside.
func (whole interval) fraction(t time.Time) float64 {
	if whole.length() <= 0 {
		return 0
	}
	return float64(t.Sub(whole.start)) / float64(whole.length())
}
