package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// patienceEnv is how many times slower this machine is than a usual one, such as a virtual machine
// without hardware virtualization.
const patienceEnv = "PODFSM_PATIENCE"

var patience, _ = strconv.Atoi(os.Getenv(patienceEnv))

// Patience returns how long to wait on this machine for something that takes up to d on a usual
// one.
func Patience(d time.Duration) time.Duration { return d * time.Duration(max(1, patience)) }

// final wraps an error that ends a poll at once.
type final struct{ error }

func (f final) Unwrap() error { return f.error }

// poll calls try at intervals until it succeeds. If ctx ends first, the error has the last error of
// try.
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
