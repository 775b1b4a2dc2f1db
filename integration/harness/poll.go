package harness

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// final wraps an error that ends a poll at once.
type final struct{ error }

func (f final) Unwrap() error { return f.error }

// poll calls try, at intervals, until it succeeds. When ctx ends first, the error is that of
// the last try.
func poll(ctx context.Context, interval time.Duration, try func() error) error {
	for {
		err := try()
		if err == nil || errors.As(err, &final{}) {
			return err
		}
		select {
		case <-time.After(interval):
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}

// tail returns the last lines of text.
func tail(text string, lines int) string {
	all := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
