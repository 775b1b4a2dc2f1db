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

// Attachment is everything that ADD began with and DEL needs: one pod on its networks. It is kept in the ledger as JSON, because
// DEL never looks at the configuration of its own day.
//
// It is not safe for concurrent use: nobody else may read or change it while [Driver.Add] or [Driver.Del] runs on it.
type Attachment struct {
	ContainerID  string       `json:"containerID"`
	NetNSPath    string       `json:"netns"`
	Networks     []Network    `json:"networks"`
	Args         Args         `json:"args,omitempty"`
	Capabilities Capabilities `json:"capabilities,omitempty"`
	BinDirs      []string     `json:"binDirs"`
	Serial       bool         `json:"serial,omitempty"`
	// Plugins has one state a plugin, by network and place in the network's list.
	Plugins []PluginState `json:"plugins"`
}

// PluginState is how far one plugin of one network has come.
type PluginState struct {
	Network int             `json:"network"` // index into Networks
	Plugin  int             `json:"plugin"`  // index into the network's list
	Type    string          `json:"type"`
	Phase   Phase           `json:"phase,omitempty"`
	Result  json.RawMessage `json:"result,omitempty"` // of ADD, in the CNI version of the list
	Error   string          `json:"error,omitempty"`  // of the last command, if it failed
	Took    time.Duration   `json:"took,omitempty"`   // of ADD, in nanoseconds, when it has succeeded
	// DelFailed says that the last command was a DEL, which failed: no ADD runs any more, for a DEL ends it.
	DelFailed bool `json:"delFailed,omitempty"`
}

// Phase is what has happened to a plugin.
type Phase string

const (
	Pending Phase = ""        // ADD was never started
	Adding  Phase = "adding"  // ADD was started and has not succeeded: it may have done anything
	Added   Phase = "added"   // ADD has succeeded
	Deleted Phase = "deleted" // DEL has succeeded
)

// transitions are the changes of phase that may happen.
var transitions = map[Phase][]Phase{
	Pending: {Adding},
	Adding:  {Pending, Added, Deleted}, // Pending again: the plugin could not be executed
	Added:   {Deleted},
}

// Progress is one fact about one plugin, journaled when it happens. A fact that keeps the phase tells of a failure.
type Progress struct {
	Network int             `json:"network"`
	Plugin  int             `json:"plugin"`
	Phase   Phase           `json:"phase"`
	Result  json.RawMessage `json:"result,omitempty"`
	Error   string          `json:"error,omitempty"`
	// Command is what the plugin was run for, "ADD" or "DEL", since Began. It took as long as Took, in nanoseconds; while that is zero, it
	// runs. A DEL that has failed has no times.
	// With the command WriteOff, nothing was run: somebody has given the DEL up, for Reason.
	Command string        `json:"command,omitempty"`
	Began   time.Time     `json:"began,omitzero"`
	Took    time.Duration `json:"took,omitempty"`
	Reason  string        `json:"reason,omitempty"`
}

// WriteOff is the command of a fact which says that a DEL was given up. It is none of the CNI specification.
const WriteOff = "write-off"

// Announces says that the fact is of an ADD that is about to start, and so has to be on record before; the others are of what has
// happened.
func (p Progress) Announces() bool { return p.Phase == Adding && p.Error == "" }

// NewAttachment prepares an attachment of a pod to the networks; nothing is done yet. netnsPath is where the pod's network
// namespace is pinned.
//
// Errors: InvalidArgument for an id that isn't one for CNI, or no network; FailedPrecondition for an invalid network.
func NewAttachment(config Config, networks []Network, id, netnsPath string, args Args, capabilities Capabilities) (*Attachment, error) {
	if err := utils.ValidateContainerID(id); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if netnsPath == "" || len(networks) == 0 {
		return nil, fmt.Errorf("network namespace %q can't be attached to %d networks: %w", netnsPath, len(networks), errdefs.ErrInvalidArgument)
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

// Apply folds a fact into the attachment, when it happens and when the ledger is replayed. Applying the last fact again changes
// nothing. It may run at the same time for different plugins.
//
// Errors: DataLoss when there is no such plugin or the fact can't follow what is known.
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

// LookIn adds directories to those in which plugins are looked for, behind those of ADD: an upgrade may have moved the plugins.
func (a *Attachment) LookIn(binDirs []string) {
	for _, dir := range binDirs {
		if !slices.Contains(a.BinDirs, dir) {
			a.BinDirs = append(a.BinDirs, dir)
		}
	}
}

// WriteOff gives up the failed DEL of each plugin that name fits, a plugin's type or "network/type", and returns which they are, as
// "network/type". Facts are recorded and applied. No plugin is run.
//
// Errors: NotFound, naming those whose last DEL has failed, when name fits none of them.
func (a *Attachment) WriteOff(ctx context.Context, name, reason string, record Record) (written []string, _ error) {
	var others []string
	for _, state := range a.Plugins {
		if !state.owed() || !state.DelFailed {
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
		return nil, fmt.Errorf("no DEL of a CNI plugin %q has failed for sandbox %q, only of %q: %w", name, a.ContainerID, others, errdefs.ErrNotFound)
	}
	return written, nil
}

// Settled reports whether there is nothing to delete: no ADD was started whose DEL has not succeeded.
func (a *Attachment) Settled() bool {
	return !slices.ContainsFunc(a.Plugins, PluginState.owed)
}

// Complete reports whether every ADD has succeeded and no DEL has.
func (a *Attachment) Complete() bool {
	return !slices.ContainsFunc(a.Plugins, func(s PluginState) bool { return s.Phase != Added })
}

// Suspect makes an attachment that nothing is known of one whose every ADD may have been started: DEL runs for all plugins.
func (a *Attachment) Suspect() {
	for i := range a.Plugins {
		a.Plugins[i].Phase = Adding
	}
}

// owed tells whether the plugin's DEL has to succeed yet.
func (s PluginState) owed() bool {
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

// list parses the configuration list of a network, whose every plugin must have a state.
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

// capabilities are those that the plugin declares and the runtime has.
func (a *Attachment) capabilities(plugin *types.PluginConf) Capabilities {
	given := Capabilities{}
	for name, declared := range plugin.Capabilities {
		if value, ok := a.Capabilities[name]; ok && declared {
			given[name] = value
		}
	}
	return given
}
