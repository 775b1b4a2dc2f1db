package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"go.opentelemetry.io/otel/propagation"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/tracing"
)

const (
	// maxStdout bounds a result, in bytes. Real ones have a few KiB.
	maxStdout = 1 << 20
	// maxText bounds the kept part of stderr and of error texts, in bytes.
	maxText = 4 << 10
)

// executor runs a plugin for libcni's invoke package, as its RawExec does, but in a group and with
// bounds.
type executor struct {
	version.PluginDecoder
	driver *Driver
	run    run

	// Set when the plugin has succeeded:
	left           *host.Group // the processes that it has left running
	stdout, stderr *tail
}

var _ invoke.Exec = (*executor)(nil)

// notStartedError is the error of a plugin that the kernel didn't execute: it can't have done
// anything.
type notStartedError struct{ error }

func (e *notStartedError) Unwrap() error { return e.error }

// FindInPath implements invoke.Exec.
func (*executor) FindInPath(plugin string, paths []string) (string, error) {
	return invoke.FindInPath(plugin, paths)
}

// ExecPlugin implements invoke.Exec: it returns the plugin's stdout. If the plugin fails or ctx
// ends, all its processes are killed. Processes that a successful plugin leaves running lose its
// pipes and stay, for [executor.keep].
//
// Errors: *notStartedError; the cause of ctx if ctx ended first; else a *types.Error, the plugin's
// own if it printed one. Each may be joined with an error about processes that can't be killed.
func (e *executor) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	group, err := makeGroup(e.driver.groups, e.run)
	if err != nil {
		return nil, &notStartedError{err}
	}
	stdout, stderr := &tail{limit: maxStdout}, &tail{limit: maxText}
	cmd, err := e.start(ctx, group, func() *exec.Cmd {
		cmd := exec.Command(path)
		cmd.Env = append(environ, traceEnv(ctx)...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), stdout, stderr
		cmd.WaitDelay = e.driver.pipeTimeout
		return cmd
	})
	if err != nil {
		return nil, &notStartedError{errors.Join(err, removeGroup(ctx, group))}
	}
	killed, err := wait(ctx, cmd, group)
	switch {
	case killed:
		return nil, err
	case errors.As(err, new(*exec.ExitError)):
		logStderr(ctx, path, stderr)
		err = pluginError(err, stdout, stderr)
	}
	if err != nil {
		return nil, errors.Join(err, endGroup(ctx, group))
	}
	logStderr(ctx, path, stderr)
	if stdout.dropped > 0 {
		err := fmt.Errorf("the plugin printed more than %d bytes: %w", maxStdout, errdefs.ErrResourceExhausted)
		return nil, errors.Join(err, endGroup(ctx, group))
	}
	e.left, e.stdout, e.stderr = &group, stdout, stderr
	return stdout.kept, nil
}

// unread adds the output of a plugin that succeeded to an error about that output.
func (e *executor) unread(err error) error {
	if e.stdout == nil {
		return err
	}
	return fmt.Errorf("the plugin exited with status 0, but its output is invalid: %w%s", err, printed(e.stdout, e.stderr))
}

// printed quotes what a plugin has printed, as the end of an error's text.
func printed(stdout, stderr *tail) string {
	text := fmt.Sprintf("; stdout: %q", clip(string(stdout.kept)))
	if len(stderr.kept) > 0 {
		text += fmt.Sprintf("; stderr: %q", stderr)
	}
	return text
}

// logStderr logs what a plugin has written to stderr, at a level that is shown by default. With
// containerd's own handlers this goes to the daemon's stderr.
func logStderr(ctx context.Context, path string, stderr *tail) {
	if len(stderr.kept) > 0 {
		tracing.Log(ctx).Infof("CNI plugin %q wrote to stderr: %q", path, stderr)
	}
}

// keep leaves the processes that a plugin has left running alone from now on. It is called once the
// plugin's success is on record.
func (e *executor) keep(ctx context.Context) {
	if e.left == nil {
		return
	}
	if err := keep(ctx, *e.left); err != nil {
		log.G(ctx).WithError(err).Warn("failed to record the processes that a CNI plugin left running")
	}
}

// withoutResult runs a command without a result. Its processes are kept without a record of its
// success: it can be repeated.
func (e *executor) withoutResult(ctx context.Context, path string, conf []byte, args invoke.CNIArgs) error {
	if err := invoke.ExecPluginWithoutResult(ctx, path, conf, args, e); err != nil {
		return err
	}
	e.keep(ctx)
	return nil
}

// start starts the plugin in its group. If the file is being written, start tries again every
// second for a while: network add-ons install their plugins from a pod, at any time.
func (e *executor) start(ctx context.Context, group host.Group, command func() *exec.Cmd) (*exec.Cmd, error) {
	for try := 0; ; try++ {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		cmd := command()
		err := group.Start(func(cgroupFD int) error {
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a signal to the daemon's process group must not reach plugins
			if cgroupFD >= 0 {
				cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, cgroupFD
			}
			return cmd.Start()
		})
		if try == 5 || !errors.Is(err, unix.ETXTBSY) {
			return cmd, err
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(err, context.Cause(ctx))
		case <-time.After(time.Second):
		}
	}
}

// wait returns the error of a plugin that has ended. If ctx ends first, the group is killed and
// removed, and the error has the cause of ctx.
//
// A process that hangs in the kernel can't be killed. It stays in its group, where the next DEL
// finds it, and the goroutine below waits until it can reap the process.
func wait(ctx context.Context, cmd *exec.Cmd, group host.Group) (killed bool, err error) {
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		if errors.Is(err, exec.ErrWaitDelay) {
			return false, nil // the plugin itself has succeeded
		}
		return false, err
	case <-ctx.Done():
	}
	cause := fmt.Errorf("killed: %w", context.Cause(ctx))
	if err := endGroup(ctx, group); err != nil {
		return true, errors.Join(cause, err)
	}
	<-ended // WaitDelay bounds this wait
	return true, cause
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

// pluginError returns the error of a plugin that has failed, with libcni's texts: the error that it
// printed as JSON to stdout, or else a text that quotes its output.
func pluginError(err error, stdout, stderr *tail) error {
	failure := &types.Error{}
	switch {
	case len(stdout.kept) == 0 && len(stderr.kept) == 0:
		failure.Msg = fmt.Sprintf("netplugin failed with no error message: %v", err)
	case len(stdout.kept) == 0:
		failure.Msg = fmt.Sprintf("netplugin failed: %q: %v", stderr, err)
	default:
		parseErr := json.Unmarshal(stdout.kept, failure)
		failure.Msg, failure.Details = clip(failure.Msg), clip(failure.Details)
		switch {
		case parseErr != nil:
			*failure = types.Error{Msg: fmt.Sprintf("netplugin failed but error parsing its diagnostic message: %v%s: %v", parseErr, printed(stdout, stderr), err)}
		case failure.Msg == "" && failure.Details == "": // a result, for example
			failure.Msg = fmt.Sprintf("netplugin failed with no error message%s: %v", printed(stdout, stderr), err)
		}
	}
	return failure
}

// clip bounds a text that becomes part of gRPC answers and Kubernetes events.
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

// Write never fails, so that output never stops a plugin.
func (t *tail) Write(p []byte) (int, error) {
	t.kept = append(t.kept, p...)
	if excess := len(t.kept) - t.limit; excess > 0 {
		t.dropped += int64(excess)
		t.kept = append(t.kept[:0], t.kept[excess:]...)
	}
	return len(p), nil
}

// String returns the kept text, after the number of bytes that are missing.
func (t *tail) String() string {
	if t.dropped == 0 {
		return string(t.kept)
	}
	return fmt.Sprintf("(%d bytes)…%s", t.dropped, t.kept)
}
