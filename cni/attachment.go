package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"
)

// Attachment is one pod on its networks: all that ADD was given and DEL needs. The ledger keeps it
// as JSON. DEL must not read the configuration of the day, which may have changed since ADD.
//
// It is not safe for concurrent use: don't read or change it while [Driver.Add] or [Driver.Del]
// runs on it.
type Attachment struct {
	ContainerID  string       `json:"containerID"`
	NetNSPath    string       `json:"netns"`
	Networks     []Network    `json:"networks"`
	Args         Args         `json:"args,omitempty"`
	Capabilities Capabilities `json:"capabilities,omitempty"`
	BinDirs      []string     `json:"binDirs"`
	Serial       bool         `json:"serial,omitempty"`
	// Plugins has one state per plugin, by network and place in the network's list.
	Plugins []PluginState `json:"plugins"`
}

// PluginState is the progress of one plugin of one network.
type PluginState struct {
	Network int             `json:"network"` // index into Networks
	Plugin  int             `json:"plugin"`  // index into the network's list
	Type    string          `json:"type"`
	Phase   Phase           `json:"phase,omitempty"`
	Result  json.RawMessage `json:"result,omitempty"` // of ADD, in the CNI version of the list
	Error   string          `json:"error,omitempty"`  // of the last command, if it failed
	Took    time.Duration   `json:"took,omitempty"`   // of ADD, in nanoseconds, when it has succeeded
	// DelFailed says that the last command was a DEL, and failed. No process of ADD is left then:
	// Del ends them before it runs a DEL.
	DelFailed bool `json:"delFailed,omitempty"`
}

// Phase is how far a plugin has come.
type Phase string

const (
	Pending Phase = ""        // ADD was never started
	Adding  Phase = "adding"  // ADD was started and has not succeeded: it may have done anything
	Added   Phase = "added"   // ADD has succeeded
	Deleted Phase = "deleted" // DEL has succeeded
)

// transitions are the legal changes of phase.
var transitions = map[Phase][]Phase{
	Pending: {Adding},
	Adding:  {Pending, Added, Deleted}, // Pending again: the plugin could not be executed
	Added:   {Deleted},
}

// Progress is one event of one plugin, recorded when it happens. An event that keeps the phase
// reports a failure.
type Progress struct {
	Network int             `json:"network"`
	Plugin  int             `json:"plugin"`
	Phase   Phase           `json:"phase"`
	Result  json.RawMessage `json:"result,omitempty"`
	Error   string          `json:"error,omitempty"`
	// Command is "ADD", "DEL" or [WriteOff]. Began is its start, and Took its duration in
	// nanoseconds, which is zero while the plugin runs. A failed DEL has neither. With [WriteOff],
	// no plugin was run: an operator gave the DEL up, for Reason.
	Command string        `json:"command,omitempty"`
	Began   time.Time     `json:"began,omitzero"`
	Took    time.Duration `json:"took,omitempty"`
	Reason  string        `json:"reason,omitempty"`
}

// WriteOff is the command of an event that gives a DEL up. The CNI specification has no such
// command.
const WriteOff = "write-off"

// Announces reports whether an ADD is about to start, so that the event has to be recorded first.
// Every other event reports what has happened.
func (p Progress) Announces() bool { return p.Phase == Adding && p.Error == "" }

// NewAttachment prepares the attachment of a pod to networks, and does nothing else. netnsPath is
// where the pod's network namespace is pinned.
//
// Errors: InvalidArgument for an id that CNI doesn't accept, or without a network;
// FailedPrecondition for an invalid network.
func NewAttachment(config Config, networks []Network, id, netnsPath string, args Args, capabilities Capabilities) (*Attachment, error) {
	if err := utils.ValidateContainerID(id); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if netnsPath == "" || len(networks) == 0 {
		return nil, fmt.Errorf("failed to attach network namespace %q to %d networks: both are required: %w", netnsPath, len(networks), errdefs.ErrInvalidArgument)
	}
	a := &Attachment{
		ContainerID:  id,
		NetNSPath:    netnsPath,
		Networks:     networks,
		Args:         args,
		Capabilities: capabilities,
		BinDirs:      config.BinDirs,
		Serial:       config.Serial,
	}
	for n, network := range networks {
		list, err := network.list()
		if err != nil {
			return nil, fmt.Errorf("configuration of CNI network %q is invalid: %w: %w", network.Name, err, errdefs.ErrFailedPrecondition)
		}
		for p, plugin := range list.Plugins {
			a.Plugins = append(a.Plugins, PluginState{Network: n, Plugin: p, Type: plugin.Network.Type})
		}
	}
	return a, nil
}

// Apply folds an event into the attachment, when it happens and when the ledger is replayed. To
// apply the last event again changes nothing. Concurrent calls for different plugins are safe.
//
// Errors: DataLoss when there is no such plugin, or its phase can't change like that.
func (a *Attachment) Apply(p Progress) error {
	state := a.state(p.Network, p.Plugin)
	if state == nil {
		return fmt.Errorf("sandbox %q has no CNI plugin %d on a network %d: %w", a.ContainerID, p.Plugin, p.Network, errdefs.ErrDataLoss)
	}
	if p.Phase != state.Phase && !slices.Contains(transitions[state.Phase], p.Phase) {
		return fmt.Errorf("CNI plugin %q of sandbox %q can't become %q from %q: %w", state.Type, a.ContainerID, p.Phase, state.Phase, errdefs.ErrDataLoss)
	}
	state.Phase = p.Phase
	state.Error, state.DelFailed = p.Error, p.Command == "DEL" && p.Error != ""
	if p.Result != nil {
		state.Result, state.Took = p.Result, p.Took
	}
	return nil
}

// LookIn appends directories to those of ADD in which plugins are looked for: an upgrade may have
// moved the plugins.
func (a *Attachment) LookIn(binDirs []string) {
	for _, dir := range binDirs {
		if !slices.Contains(a.BinDirs, dir) {
			a.BinDirs = append(a.BinDirs, dir)
		}
	}
}

// WriteOff gives up the failed DELs of the plugins that name matches, which is a plugin's type or
// "network/type". It records and applies an event for each, runs no plugin, and returns their names
// as "network/type".
//
// Errors: NotFound when name matches no plugin whose last DEL failed. The error names those
// plugins.
func (a *Attachment) WriteOff(ctx context.Context, name, reason string, record Record) (written []string, _ error) {
	var others []string
	for _, state := range a.Plugins {
		if !state.pending() || !state.DelFailed {
			continue
		}
		full := a.Networks[state.Network].Name + "/" + state.Type
		if name != state.Type && name != full {
			others = append(others, full)
			continue
		}
		given := Progress{Network: state.Network, Plugin: state.Plugin, Phase: Deleted, Command: WriteOff, Began: time.Now().UTC(), Reason: reason}
		if err := record(ctx, given); err != nil {
			return written, fmt.Errorf("failed to record that the DEL of CNI plugin %q is written off: %w", full, err)
		}
		if err := a.Apply(given); err != nil {
			return written, err
		}
		written = append(written, full)
	}
	if len(written) == 0 {
		return nil, fmt.Errorf("CNI plugin %q of sandbox %q has no failed DEL to write off; those that have one: %q: %w", name, a.ContainerID, others, errdefs.ErrNotFound)
	}
	return written, nil
}

// Settled reports whether no DEL is pending: the DEL of every ADD that was started has succeeded.
func (a *Attachment) Settled() bool {
	return !slices.ContainsFunc(a.Plugins, PluginState.pending)
}

// Complete reports whether every ADD has succeeded and no DEL has.
func (a *Attachment) Complete() bool {
	return !slices.ContainsFunc(a.Plugins, func(s PluginState) bool { return s.Phase != Added })
}

// Suspect marks the ADD of every plugin as started, so that Del runs all DELs. It is for
// attachments whose events were lost.
func (a *Attachment) Suspect() {
	for i := range a.Plugins {
		a.Plugins[i].Phase = Adding
	}
}

// pending reports whether the DEL of the plugin has yet to succeed.
func (s PluginState) pending() bool {
	return s.Phase == Adding || s.Phase == Added
}

// state returns nil when there is no such plugin.
func (a *Attachment) state(network, plugin int) *PluginState {
	for i := range a.Plugins {
		if s := &a.Plugins[i]; s.Network == network && s.Plugin == plugin {
			return s
		}
	}
	return nil
}

// list parses the configuration list of a network, and checks that each plugin has a state.
func (a *Attachment) list(network int) (*libcni.NetworkConfigList, error) {
	name := a.Networks[network].Name
	list, err := a.Networks[network].list()
	if err != nil {
		return nil, fmt.Errorf("failed to read the recorded configuration of CNI network %q: %w: %w", name, err, errdefs.ErrDataLoss)
	}
	for p := range list.Plugins {
		if a.state(network, p) == nil {
			return nil, fmt.Errorf("plugin %d of CNI network %q has no recorded state: %w", p, name, errdefs.ErrDataLoss)
		}
	}
	return list, nil
}

// capabilities returns the capabilities of the pod that the plugin declares.
func (a *Attachment) capabilities(plugin *types.PluginConf) Capabilities {
	given := Capabilities{}
	for name, declared := range plugin.Capabilities {
		if value, ok := a.Capabilities[name]; ok && declared {
			given[name] = value
		}
	}
	return given
}
