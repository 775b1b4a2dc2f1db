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
	// maxText bounds what is kept of stderr and of the texts of errors, in bytes.
	maxText = 4 << 10
)

// executor makes one run of a plugin for libcni's invoke package, as its RawExec does, except for the group and the bounds.
type executor struct {
	version.PluginDecoder
	driver *Driver
	run    run

	// Of a plugin that has succeeded:
	left           *host.Group // what it has left running
	stdout, stderr *tail
}

var _ invoke.Exec = (*executor)(nil)

// notStartedError is that of a plugin that the kernel didn't execute, so that it can't have done anything.
type notStartedError struct{ error }

func (e *notStartedError) Unwrap() error { return e.error }

// FindInPath implements invoke.Exec.
func (*executor) FindInPath(plugin string, paths []string) (string, error) {
	return invoke.FindInPath(plugin, paths)
}

// ExecPlugin implements invoke.Exec: it returns the plugin's stdout. When the plugin fails, or ctx ends first, all its processes are
// killed; what a plugin that succeeds leaves running stays, without its pipes, and is for [executor.keep].
//
// Errors: *notStartedError; what ended ctx when the plugin was killed for it; else a *types.Error, the plugin's own where it has
// printed one; beside each, that processes don't end.
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
		err := fmt.Errorf("its result has more than %d bytes: %w", maxStdout, errdefs.ErrResourceExhausted)
		return nil, errors.Join(err, endGroup(ctx, group))
	}
	e.left, e.stdout, e.stderr = &group, stdout, stderr
	return stdout.kept, nil
}

// unread adds to an error what the plugin has printed, if the plugin itself has succeeded: the error is about that.
func (e *executor) unread(err error) error {
	if e.stdout == nil {
		return err
	}
	return fmt.Errorf("it succeeded, but %w%s", err, printed(e.stdout, e.stderr))
}

// printed quotes what a plugin has printed, as the end of an error's text.
func printed(stdout, stderr *tail) string {
	text := fmt.Sprintf("; stdout: %q", clip(string(stdout.kept)))
	if len(stderr.kept) > 0 {
		text += fmt.Sprintf("; stderr: %q", stderr)
	}
	return text
}

// logStderr logs what a plugin has written to stderr, at a level that is shown by default: with containerd's own handlers it goes to the
// daemon's stderr as it is.
func logStderr(ctx context.Context, path string, stderr *tail) {
	if len(stderr.kept) > 0 {
		tracing.Log(ctx).Infof("CNI plugin %q wrote to stderr: %q", path, stderr)
	}
}

// keep is called once the plugin's success is on record: what it has left running is left alone from then on.
func (e *executor) keep(ctx context.Context) {
	if e.left == nil {
		return
	}
	if err := keep(ctx, *e.left); err != nil {
		log.G(ctx).WithError(err).Warn("failed to note what a CNI plugin has left running")
	}
}

// withoutResult runs a command whose success needs no record to be told from its failure.
func (e *executor) withoutResult(ctx context.Context, path string, conf []byte, args invoke.CNIArgs) error {
	if err := invoke.ExecPluginWithoutResult(ctx, path, conf, args, e); err != nil {
		return err
	}
	e.keep(ctx)
	return nil
}

// start starts the plugin in its group, again every second for a while if somebody is just writing its file: network add-ons install
// their plugins from a pod, at any time.
func (e *executor) start(ctx context.Context, group host.Group, command func() *exec.Cmd) (*exec.Cmd, error) {
	for try := 0; ; try++ {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		cmd := command()
		err := group.Start(func(cgroupFD int) error {
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a signal to the daemon's process group is none for plugins
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

// wait returns how a plugin has ended. When ctx ends first, the group is killed and removed, and the error is the cause of that.
//
// A process that hangs in the kernel can't be killed. It stays in its group, where the next DEL finds it, and the goroutine that is to
// reap it waits for it.
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
	<-ended // WaitDelay bounds what it still waits for
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

// pluginError makes the error of a plugin that has failed, with libcni's texts: from the JSON on its stdout if that is an error. Otherwise
// the text quotes all that the plugin has printed.
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
