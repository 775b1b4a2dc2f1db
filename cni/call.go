package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"go.opentelemetry.io/otel/attribute"

	"github.com/podfsm/podfsm/tracing"
)

// call is one command to one plugin of one network, for one pod.
type call struct {
	driver     *Driver
	attachment *Attachment
	record     Record
	network    int
	plugin     int
	sysctls    map[string]string // of the pod; only for CHECK
	list       *libcni.NetworkConfigList
	netns      string // CNI_NETNS
	gone       bool   // the pod's namespace has gone, and netns is an empty one instead
}

// add runs the plugin's ADD with the result of the plugin before it. It returns the plugin's own
// result, in the version of the list.
func (c call) add(ctx context.Context, prev types.Result) (_ types.Result, retErr error) {
	ctx, end := c.begin(ctx, tracing.SpanCNIAdd, "ADD")
	defer func() { end(retErr) }()

	path, conf, err := c.prepare(prev)
	if err != nil {
		return nil, c.failed("add", err)
	}
	began := time.Now()
	if err := c.advance(ctx, Progress{Phase: Adding, Command: "ADD", Began: began}); err != nil {
		return nil, err
	}
	exec := c.executor("ADD")
	result, raw, err := c.execAdd(ctx, exec, path, conf)

	// Record the outcome even if the caller has gone: DEL needs it.
	ctx = context.WithoutCancel(ctx)
	if err != nil {
		outcome := Progress{Phase: Adding, Error: err.Error(), Command: "ADD", Began: began, Took: time.Since(began)}
		if errors.As(err, new(*notStartedError)) {
			outcome.Phase = Pending
		}
		return nil, errors.Join(c.failed("add", err), c.advance(ctx, outcome))
	}
	if err := c.advance(ctx, Progress{Phase: Added, Result: raw, Command: "ADD", Began: began, Took: time.Since(began)}); err != nil {
		return nil, err
	}
	exec.keep(ctx)
	return result, nil
}

// execAdd returns the result as an object and as it is recorded.
func (c call) execAdd(ctx context.Context, exec *executor, path string, conf []byte) (types.Result, json.RawMessage, error) {
	ctx, cancel := withTimeout(ctx, c.driver.addTimeout)
	defer cancel()
	result, err := invoke.ExecPluginWithResult(ctx, path, conf, c.environment("ADD"), exec)
	if err != nil {
		return nil, nil, exec.unread(err)
	}
	if result, err = result.GetAsVersion(c.list.CNIVersion); err != nil {
		return nil, nil, exec.unread(err)
	}
	raw, err := json.Marshal(result)
	if err != nil {
		return nil, nil, fmt.Errorf("failed to encode its result: %w", err)
	}
	return result, raw, nil
}

// del runs the plugin's DEL with the result of ADD.
func (c call) del(ctx context.Context, prev types.Result) (retErr error) {
	ctx, end := c.begin(ctx, tracing.SpanCNIDel, "DEL")
	defer func() { end(retErr) }()

	began := time.Now()
	err := c.execDel(ctx, prev)
	if c.gone && wantsNetNS(err) {
		err = c.delWithoutNetNS(ctx, prev, err)
	}
	if c.state().Phase == Adding && speaksAnotherVersion(err) {
		err = nil // it refused ADD for the same reason, so there is nothing to undo
	}
	ctx = context.WithoutCancel(ctx) // as in add
	if err != nil {
		// No times: repeated failures must be equal records, which the ledger keeps once.
		outcome := Progress{Phase: c.state().Phase, Command: "DEL", Error: err.Error()}
		return errors.Join(c.failed("delete", err), c.advance(ctx, outcome))
	}
	return c.advance(ctx, Progress{Phase: Deleted, Command: "DEL", Began: began, Took: time.Since(began)})
}

// speaksAnotherVersion reports whether a plugin, or a plugin that it delegates to, doesn't know the
// CNI version of the network.
func speaksAnotherVersion(err error) bool {
	var refused *types.Error
	return errors.As(err, &refused) && refused.Code == types.ErrIncompatibleCNIVersion
}

func (c call) execDel(ctx context.Context, prev types.Result) error {
	path, conf, err := c.prepare(prev)
	if err != nil {
		return err
	}
	left, err := c.driver.dels.enter(ctx, c.state().Type)
	if err != nil {
		return err
	}
	defer left()
	ctx, cancel := withTimeout(ctx, c.driver.delTimeout)
	defer cancel()
	run := func() error {
		return c.executor("DEL").withoutResult(ctx, path, conf, c.environment("DEL"))
	}
	if !c.masquerades() {
		return run()
	}
	c.restore(ctx)
	if err := run(); !lacksChain(err) {
		return err
	}
	return run()
}

// check runs the plugin's CHECK with the result of ADD.
func (c call) check(ctx context.Context, prev types.Result) (retErr error) {
	ctx, end := c.begin(ctx, tracing.SpanCNICheck, "CHECK")
	defer func() { end(retErr) }()

	path, conf, err := c.prepareCheck(prev)
	if err != nil {
		return c.failed("check", err)
	}
	ctx, cancel := withTimeout(ctx, checkTimeout)
	defer cancel()
	if err := c.executor("CHECK").withoutResult(ctx, path, conf, c.environment("CHECK")); err != nil {
		return c.failed("check", err)
	}
	return nil
}

// prepare finds the plugin and derives its request configuration. It runs nothing: a failure leaves
// the network untouched.
func (c call) prepare(prev types.Result) (path string, conf []byte, err error) {
	return c.prepareWith(prev, map[string]any{})
}

// prepareWith is prepare with additional values in the request configuration.
func (c call) prepareWith(prev types.Result, values map[string]any) (path string, conf []byte, err error) {
	plugin := c.list.Plugins[c.plugin]
	if prev != nil {
		values["prevResult"] = prev
	}
	if given := c.attachment.capabilities(plugin.Network); len(given) > 0 {
		values["runtimeConfig"] = given
	}
	return prepare(c.list, plugin, c.attachment.BinDirs, values)
}

// prepare finds a plugin of a list in binDirs and derives its request configuration, with
// additional values (CNI specification, section 3, "Deriving request configuration").
func prepare(list *libcni.NetworkConfigList, plugin *libcni.PluginConfig, binDirs []string, values map[string]any) (path string, conf []byte, err error) {
	path, err = invoke.FindInPath(plugin.Network.Type, binDirs)
	if err != nil {
		return "", nil, fmt.Errorf("%w: install it there: %w", err, errdefs.ErrFailedPrecondition)
	}
	injected := map[string]any{"name": list.Name, "cniVersion": list.CNIVersion}
	maps.Copy(injected, values)
	request, err := libcni.InjectConf(plugin, injected)
	if err != nil {
		return "", nil, fmt.Errorf("failed to derive its configuration: %w", err)
	}
	return path, request.Bytes, nil
}

// advance records an event of the plugin and applies it.
func (c call) advance(ctx context.Context, p Progress) error {
	p.Network, p.Plugin, p.Began = c.network, c.plugin, p.Began.UTC()
	if err := c.record(ctx, p); err != nil {
		return fmt.Errorf("failed to record CNI plugin %q as %q: %w", c.state().Type, p.Phase, err)
	}
	return c.attachment.Apply(p)
}

func (c call) state() *PluginState { return c.attachment.state(c.network, c.plugin) }

func (c call) failed(command string, err error) error {
	return failed(c.list, c.state().Type, command, err)
}

// failed wraps the error of a plugin in libcni's text, which operators know from other runtimes.
func failed(list *libcni.NetworkConfigList, plugin, command string, err error) error {
	return fmt.Errorf("plugin type=%q name=%q failed (%s): %w", plugin, list.Name, command, err)
}

// begin starts the span of a command. The returned function ends the span with the command's error.
func (c call) begin(ctx context.Context, spanName, command string) (context.Context, func(error)) {
	return c.driver.begin(ctx, spanName, Command{Name: command, Plugin: c.state().Type, Network: c.list.Name},
		tracing.CNIIfName.String(c.attachment.Networks[c.network].IfName))
}

// begin starts the span of a command. The returned function ends the span and calls [Options.Ran].
func (d *Driver) begin(ctx context.Context, spanName string, c Command, attrs ...attribute.KeyValue) (context.Context, func(error)) {
	ctx, span := tracing.Start(ctx, spanName, append(attrs,
		tracing.CNICommand.String(c.Name),
		tracing.CNIPlugin.String(c.Plugin),
		tracing.CNINetwork.String(c.Network),
	)...)
	begun := time.Now()
	return ctx, func(err error) {
		tracing.End(span, err)
		c.Took, c.Err = time.Since(begun), err
		d.ran(c)
	}
}

// executor returns the executor of a command.
func (c call) executor(command string) *executor {
	return &executor{driver: c.driver, run: run{c.attachment.ContainerID, c.network, c.plugin, command}}
}

// environment returns the CNI variables. Plugins get them beside the daemon's own environment.
func (c call) environment(command string) *invoke.Args {
	return &invoke.Args{
		Command:     command,
		ContainerID: c.attachment.ContainerID,
		NetNS:       c.netns,
		IfName:      c.attachment.Networks[c.network].IfName,
		PluginArgs:  c.attachment.Args,
		Path:        pathOf(c.attachment.BinDirs),
	}
}

// pathOf returns the value of CNI_PATH.
func pathOf(binDirs []string) string { return strings.Join(binDirs, string(os.PathListSeparator)) }

// withTimeout is context.WithTimeout whose cause names the timeout.
func withTimeout(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no answer within %s: %w", timeout, context.DeadlineExceeded))
}
