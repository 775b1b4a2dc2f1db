// Package cni attaches pods to networks and detaches them, by libcni's parts but with a driver of its own.
//
// It differs from libcni's AddNetworkList and DelNetworkList, and from go-cni, in this:
//   - Every plugin's ADD is journaled before it starts and when it has ended. DEL runs for exactly the plugins whose ADD was
//     started, with the configuration, the arguments and the plugin directories that ADD was given.
//   - A DEL that fails does not keep the plugins before it in the chain from their DEL. The CNI specification (section 3, "Deleting
//     an attachment") halts there, and an IPAM plugin at the start of a chain would never free its address.
//   - A DEL that fails has failed, whatever its text says; it is owed until it succeeds.
//   - DEL gets the last result that ADD had, also when the chain has failed. libcni then gives none, and plugins such as firewall
//     take that for nothing to do.
//   - DEL gets an empty network namespace where the pod's has gone, as after a reboot. libcni then gives none: plugins such as
//     host-device free no address, and others, such as sbr, fail.
//   - At most 32 DELs of a plugin run at a time. When a node is drained, those of all its pods come at once.
//   - A plugin runs in a cgroup of its own, under a deadline. When it fails, all processes that it has left are ended by that cgroup,
//     after a restart, too, and before DEL; what it has left when it succeeds is a daemon, and stays.
//   - No cache directory is written; the ledger has it all.
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

// Options bound what a plugin may take; zero values stand for the defaults.
type Options struct {
	// AddTimeout is how long one plugin's ADD may run, 3 minutes by default. The kubelet waits 4 minutes for RunPodSandbox: a
	// plugin that hangs is ended while there is time left to roll back and to name it in the answer.
	AddTimeout time.Duration
	// DelTimeout is how long one plugin's DEL may run, 90 seconds by default. The kubelet waits 2 minutes for StopPodSandbox.
	DelTimeout time.Duration
	// PipeTimeout is how long to wait, after a plugin has ended, for processes it has left behind that hold its stdout or stderr, 2
	// seconds by default. They lose the pipe then.
	PipeTimeout time.Duration
	// Groups are the cgroups for plugins. No other driver may use the same while this one does.
	Groups host.Groups
	// Ran is told of each run of a plugin when it has ended, also of one that could not be started; nil for nobody. Networks are
	// attached in parallel, so it is called by many goroutines, and must return soon.
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

// Record journals a fact before the driver goes on. It must be safe for concurrent use, since networks are attached in parallel.
// An error before ADD keeps the plugin from being run, and any error fails the command. Only a fact that [Progress.Announces] has to
// outlive a reboot at once, with all before it: a DEL that isn't on record is only made again, and an ADD without a result gets its DEL.
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

// Add brings the pod's loopback up and attaches the pod to its networks: the plugins of a network one after the other, the
// networks at the same time unless Serial. Facts are recorded and applied to a. After an error, Del takes back what was done.
//
// Errors: FailedPrecondition when a was added before, a plugin is missing, or eth0 got no address; DeadlineExceeded or Canceled when
// a plugin was ended; otherwise a plugin's own error is a *types.Error of the CNI project.
func (d *Driver) Add(ctx context.Context, a *Attachment, record Record) error {
	if slices.ContainsFunc(a.Plugins, func(s PluginState) bool { return s.Phase != Pending }) {
		return fmt.Errorf("sandbox %q was attached to its CNI networks before: %w", a.ContainerID, errdefs.ErrFailedPrecondition)
	}
	if err := BringUpLoopback(a.NetNSPath); err != nil {
		return err
	}
	if err := d.addNetworks(ctx, a, record); err != nil {
		return err
	}
	_, _, err := a.IPs("") // as containerd: a pod without an address on eth0 is not attached
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
				if p := recover(); p != nil { // which would end the daemon
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

// Del takes back what Add has done or begun: in reverse order, the plugins whose ADD was started and whose DEL has not succeeded.
// It goes on after a plugin's error, is idempotent, and works after the network namespace has gone. Facts are recorded and applied
// to a; once [Attachment.Settled], there is nothing more to do.
//
// Errors: those of all plugins joined, as for Add.
func (d *Driver) Del(ctx context.Context, a *Attachment, record Record) error {
	// A DEL beside an ADD that still runs may free what the ADD then takes. What was written off may still run, too.
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

// succeeded says whether a run is an ADD that has succeeded on record.
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
		if !a.state(network, p).owed() {
			continue
		}
		c := call{driver: d, attachment: a, record: record, network: network, plugin: p, list: list, netns: netns, gone: gone}
		errs = append(errs, c.del(ctx, result))
	}
	return errors.Join(errs...)
}

// livingNetNS returns the path of the network namespace, or "" when it has gone.
func (a *Attachment) livingNetNS() (string, error) {
	var st unix.Statfs_t
	err := unix.Statfs(a.NetNSPath, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
		return "", nil
	case err != nil:
		return "", fmt.Errorf("failed to look for network namespace %q: %w", a.NetNSPath, err)
	case st.Type != unix.NSFS_MAGIC: // a mount point without its mount, as after a reboot
		return "", nil
	}
	return a.NetNSPath, nil
}
