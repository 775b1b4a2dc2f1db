// Package cni attaches pods to networks and detaches them. It uses libcni's parts with its own driver.
//
// The driver differs from libcni's AddNetworkList and DelNetworkList, and from go-cni:
//   - The ADD of each plugin is recorded before it starts and when it has ended. DEL runs for exactly
//     the plugins whose ADD was started, with the configuration, arguments and plugin directories of ADD.
//   - When a DEL fails, the plugins before it in the chain still get their DEL. The CNI specification
//     (section 3, "Deleting an attachment") halts there, and an IPAM plugin at the start of the chain
//     would never free its address.
//   - A failed DEL is pending until it succeeds, whatever its error says.
//   - DEL gets the last result of ADD, also when the chain failed. libcni gives no result then, and
//     plugins such as firewall conclude that there is nothing to do.
//   - DEL gets an empty network namespace if the pod's has gone, as after a reboot. libcni gives no
//     namespace then: plugins such as host-device free no address, and others, such as sbr, fail.
//   - The bridge and ptp plugins find the pod's addresses on its interface at DEL, whatever the pod or
//     an earlier DEL has done: they leave the masquerade rules of missing addresses forever.
//   - At most 32 DELs of a plugin run at a time. A drained node deletes all its pods at once.
//   - A plugin runs in its own cgroup and with a deadline. If it fails, all processes in the cgroup are
//     killed, also after a restart, and always before DEL. Processes that a successful plugin leaves
//     running are daemons, and stay.
//   - There is no cache directory: the ledger has all of it.
package cni

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/host"
)

// Options bound the plugins. Zero values stand for the defaults.
type Options struct {
	// AddTimeout bounds one plugin's ADD, 3 minutes by default. The kubelet waits 4 minutes for
	// RunPodSandbox, so that a hanging plugin can be killed, rolled back and named in the answer.
	AddTimeout time.Duration
	// DelTimeout bounds one plugin's DEL, 90 seconds by default. The kubelet waits 2 minutes for
	// StopPodSandbox.
	DelTimeout time.Duration
	// PipeTimeout bounds the wait for processes that hold the stdout or stderr of a plugin that has
	// ended, 2 seconds by default. The pipes are closed then.
	PipeTimeout time.Duration
	// Groups are the cgroups for plugins. Two drivers must not use the same groups at a time.
	Groups host.Groups
	// Ran, if set, is called at the end of each run of a plugin, also if the plugin could not be
	// started. Networks are attached in parallel, so it must be safe for concurrent use, and must
	// return soon.
	Ran func(Command)
}

// Command is one run of one plugin.
type Command struct {
	Name    string // as in CNI_COMMAND
	Plugin  string // its type
	Network string
	Took    time.Duration
	Err     error
}

// Record records an event before the driver goes on. It must be safe for concurrent use, since
// networks are attached in parallel. If it fails before ADD, the plugin is not run; any error fails
// the command. Only an event that [Progress.Announces] an ADD must survive a reboot at once, with
// all events before it. Other events may be lost: a DEL without a record is repeated, and an ADD
// without a result gets its DEL.
type Record func(context.Context, Progress) error

// Driver runs CNI plugins. It is safe for concurrent use on different attachments.
type Driver struct {
	addTimeout, delTimeout, pipeTimeout time.Duration
	groups                              host.Groups
	ran                                 func(Command)
	answers                             answers // of STATUS
	dels                                limits
}

// NewDriver returns a driver.
func NewDriver(o Options) *Driver {
	if o.Ran == nil {
		o.Ran = func(Command) {}
	}
	return &Driver{
		addTimeout:  cmp.Or(o.AddTimeout, 3*time.Minute),
		delTimeout:  cmp.Or(o.DelTimeout, 90*time.Second),
		pipeTimeout: cmp.Or(o.PipeTimeout, 2*time.Second),
		groups:      o.Groups,
		ran:         o.Ran,
	}
}

// Add brings the pod's loopback up and attaches the pod to its networks. The plugins of a network
// run one after the other; networks are attached in parallel unless Serial is set. Events are
// recorded and applied to a. After an error, Del undoes what was done.
//
// Errors: FailedPrecondition when a was added before, a plugin is missing, or eth0 got no address;
// DeadlineExceeded or Canceled when a plugin was killed; otherwise the plugin's own, a
// *types.Error.
func (d *Driver) Add(ctx context.Context, a *Attachment, record Record) error {
	if slices.ContainsFunc(a.Plugins, func(s PluginState) bool { return s.Phase != Pending }) {
		return fmt.Errorf("failed to attach sandbox %q: it was attached to its CNI networks before: %w", a.ContainerID, errdefs.ErrFailedPrecondition)
	}
	if err := BringUpLoopback(a.NetNSPath); err != nil {
		return err
	}
	if err := d.addNetworks(ctx, a, record); err != nil {
		return err
	}
	_, _, err := a.IPs("") // as in containerd, a pod without an address on eth0 is not attached
	return err
}

func (d *Driver) addNetworks(ctx context.Context, a *Attachment, record Record) error {
	if a.Serial {
		for n := range a.Networks {
			if err := d.addNetwork(ctx, a, n, record); err != nil {
				return err
			}
		}
		return nil
	}
	errs := make([]error, len(a.Networks))
	var networks sync.WaitGroup
	for n := range a.Networks {
		networks.Go(func() {
			defer func() {
				if p := recover(); p != nil { // a panic would end the daemon
					errs[n] = fmt.Errorf("panic: %v: %w", p, errdefs.ErrInternal)
				}
			}()
			errs[n] = d.addNetwork(ctx, a, n, record)
		})
	}
	networks.Wait()
	return errors.Join(errs...)
}

func (d *Driver) addNetwork(ctx context.Context, a *Attachment, network int, record Record) error {
	list, err := a.list(network)
	if err != nil {
		return err
	}
	var result types.Result
	for p := range list.Plugins {
		c := call{driver: d, attachment: a, record: record, network: network, plugin: p, list: list, netns: a.NetNSPath}
		if result, err = c.add(ctx, result); err != nil {
			return err
		}
	}
	return nil
}

// Del undoes Add: in reverse order, it runs DEL for the plugins whose ADD was started and whose DEL
// has not succeeded. It continues after a plugin's error, is idempotent, and works without the
// network namespace. Events are recorded and applied to a. Once a is [Attachment.Settled], nothing
// is left to do.
//
// Errors: those of all plugins joined, as for Add.
func (d *Driver) Del(ctx context.Context, a *Attachment, record Record) error {
	// A DEL beside a running ADD may free what the ADD then takes. A written-off DEL may still run,
	// too.
	if err := end(ctx, d.groups, a.ContainerID, d.delTimeout, a.succeeded); err != nil {
		return err
	}
	if a.Settled() {
		return nil
	}
	netns, err := a.livingNetNS()
	if err != nil {
		return err
	}
	if netns == "" {
		return d.delGone(ctx, a, record)
	}
	return d.delNetworks(ctx, a, netns, false, record)
}

func (d *Driver) delNetworks(ctx context.Context, a *Attachment, netns string, gone bool, record Record) error {
	var errs []error
	for n := len(a.Networks) - 1; n >= 0; n-- {
		errs = append(errs, d.delNetwork(ctx, a, n, netns, gone, record))
	}
	return errors.Join(errs...)
}

// succeeded reports whether a run is an ADD that has succeeded on record.
func (a *Attachment) succeeded(r run) bool {
	state := a.state(r.network, r.plugin)
	return r.command == "ADD" && state != nil && (state.Phase == Added || state.Phase == Deleted)
}

func (d *Driver) delNetwork(ctx context.Context, a *Attachment, network int, netns string, gone bool, record Record) error {
	list, err := a.list(network)
	if err != nil {
		return err
	}
	result, err := a.lastResult(network, list)
	if err != nil {
		return err
	}
	var errs []error
	for p := len(list.Plugins) - 1; p >= 0; p-- {
		if !a.state(network, p).pending() {
			continue
		}
		c := call{driver: d, attachment: a, record: record, network: network, plugin: p, list: list, netns: netns, gone: gone}
		errs = append(errs, c.del(ctx, result))
	}
	return errors.Join(errs...)
}

// livingNetNS returns the path of the network namespace, or "" if the namespace has gone.
func (a *Attachment) livingNetNS() (string, error) {
	var st unix.Statfs_t
	err := unix.Statfs(a.NetNSPath, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
		return "", nil
	case err != nil:
		return "", fmt.Errorf("failed to find network namespace %q: %w", a.NetNSPath, err)
	case st.Type != unix.NSFS_MAGIC: // a mount point without its mount, as after a reboot
		return "", nil
	}
	return a.NetNSPath, nil
}
