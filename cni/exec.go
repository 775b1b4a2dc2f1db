package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"go.opentelemetry.io/otel/propagation"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/tracing"
)

const (
	// maxStdout bounds a result, in bytes. Real ones have a few KiB.
	maxStdout = 1 << 20
	// maxText bounds what is kept of stderr and of the texts of errors, in bytes.
	maxText = 4 << 10
)

// executor runs plugins for libcni's invoke package, as its RawExec does but for process groups and bounds.
type executor struct {
	version.PluginDecoder
	pipeTimeout time.Duration
}

var _ invoke.Exec = (*executor)(nil)

// notStartedError is that of a plugin that the kernel didn't execute, so that it can't have done anything.
type notStartedError struct{ error }

func (e *notStartedError) Unwrap() error { return e.error }

// FindInPath implements invoke.Exec.
func (*executor) FindInPath(plugin string, paths []string) (string, error) {
	return invoke.FindInPath(plugin, paths)
}

// ExecPlugin implements invoke.Exec: it returns the plugin's stdout, once no process of the plugin's group lives.
//
// Errors: *notStartedError; what ended ctx when the plugin was killed for it; else a *types.Error, the plugin's own where it has
// printed one.
func (e *executor) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	stdout, stderr := &tail{limit: maxStdout}, &tail{limit: maxText}
	g, err := e.start(ctx, path, stdin, append(environ, traceEnv(ctx)...))
	if err != nil {
		return nil, &notStartedError{err}
	}
	err = g.wait(ctx, stdout, stderr)
	if len(stderr.kept) > 0 {
		level := log.DebugLevel // a plugin that talks to itself whenever it is run is none of the log's business
		if err != nil {
			level = log.InfoLevel
		}
		tracing.Log(ctx).Logf(level, "CNI plugin %q wrote to stderr: %q", path, stderr)
	}
	switch {
	case errors.As(err, new(*exec.ExitError)):
		return nil, pluginError(err, stdout, stderr)
	case err != nil:
		return nil, err
	case stdout.dropped > 0:
		return nil, fmt.Errorf("its result has more than %d bytes: %w", maxStdout, errdefs.ErrResourceExhausted)
	}
	return stdout.kept, nil
}

// start starts the plugin, again every second for a while if somebody is just writing its file: network add-ons install
// their plugins from a pod, at any time.
func (e *executor) start(ctx context.Context, path string, stdin []byte, environ []string) (*group, error) {
	for try := 0; ; try++ {
		cmd := exec.Command(path)
		cmd.Env = environ
		cmd.Stdin = bytes.NewReader(stdin)
		cmd.WaitDelay = e.pipeTimeout
		g, err := startGroup(ctx, cmd)
		if try == 5 || !errors.Is(err, unix.ETXTBSY) {
			return g, err
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(err, context.Cause(ctx))
		case <-time.After(time.Second):
		}
	}
}

// traceEnv carries the trace context to plugins that trace, by the names of OpenTelemetry's "Environment Variables as Context
// Propagation Carriers".
func traceEnv(ctx context.Context) []string {
	carrier := propagation.MapCarrier{}
	propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{}).Inject(ctx, carrier)
	var environ []string
	for name, value := range carrier {
		environ = append(environ, strings.ToUpper(name)+"="+value)
	}
	return environ
}

// pluginError makes the error of a plugin that has failed, with libcni's texts: from the JSON on its stdout if there is any.
func pluginError(err error, stdout, stderr *tail) error {
	failure := &types.Error{}
	switch {
	case len(stdout.kept) == 0 && len(stderr.kept) == 0:
		failure.Msg = fmt.Sprintf("netplugin failed with no error message: %v", err)
	case len(stdout.kept) == 0:
		failure.Msg = fmt.Sprintf("netplugin failed: %q: %v", stderr, err)
	default:
		if parseErr := json.Unmarshal(stdout.kept, failure); parseErr != nil {
			failure.Msg = fmt.Sprintf("netplugin failed but error parsing its diagnostic message %q: %v", clip(string(stdout.kept)), parseErr)
			break
		}
		failure.Msg, failure.Details = clip(failure.Msg), clip(failure.Details)
	}
	return failure
}

// clip bounds a text, which becomes part of gRPC answers and Kubernetes events.
func clip(text string) string {
	if len(text) <= maxText {
		return text
	}
	return strings.ToValidUTF8(text[:maxText], "") + "…"
}

// tail keeps the last bytes written to it.
type tail struct {
	limit   int
	kept    []byte
	dropped int64
}

// Write never fails, so that a plugin is never stopped by what it prints.
func (t *tail) Write(p []byte) (int, error) {
	t.kept = append(t.kept, p...)
	if excess := len(t.kept) - t.limit; excess > 0 {
		t.dropped += int64(excess)
		t.kept = append(t.kept[:0], t.kept[excess:]...)
	}
	return len(p), nil
}

// String says how much of the text is missing.
func (t *tail) String() string {
	if t.dropped == 0 {
		return string(t.kept)
	}
	return fmt.Sprintf("(%d bytes)…%s", t.dropped, t.kept)
}
