package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// attachNetwork runs the pod's CNI chains.
type attachNetwork struct{ *node }

var (
	_ lifecycle.Checker = (*attachNetwork)(nil)
	_ lifecycle.Parted  = (*attachNetwork)(nil)
)

// AttachNetwork is the name of the step attachNetwork.
const AttachNetwork states.Event = "attach_network"

func (s *attachNetwork) Declaration() lifecycle.Declaration {
	return lifecycle.Declaration{
		Step: states.Step{
			Name:    AttachNetwork,
			Done:    "The CNI chain was run.",
			State:   "NetworkReady",
			Meaning: "Every CNI plugin of its chain has succeeded.",
		},
		// CNI DEL needs the namespace: the bridge plugin reads the addresses there whose masquerade
		// rules it removes.
		Holds:        []states.Event{CaptureNetNS},
		AtStop:       true,
		Lasting:      true,
		Foreign:      true,
		Deadline:     2 * s.limits.cniAdd, // the driver bounds each plugin; this bounds a long chain of slow plugins
		UndoDeadline: 2 * s.limits.cniDel,
	}
}

// networkConfig returns where the networks of a pod are configured.
func networkConfig(stock *stockConfig, spec *Spec) cni.Config {
	dir, max := stock.cniConf(spec.Handler)
	return cni.Config{
		BinDirs:      stock.CNI.BinDirs,
		ConfDir:      dir,
		MaxConfNum:   max,
		Serial:       stock.CNI.SetupSerially,
		IPPreference: stock.CNI.IPPreference,
	}
}

// networkReady fails if the networks of a handler with its own CNI configuration directory are not
// ready. For the node's networks, containerd's service reports that with every status, and the
// kubelet sends no pods meanwhile. Nothing else checks a handler's networks.
func (c *Controller) networkReady(ctx context.Context, spec *Spec) error {
	config := networkConfig(c.stock, spec)
	networks, err := cni.Load(config)
	if err != nil || !c.stock.hasOwnCNIConf(spec.Handler) {
		return err
	}
	return c.node.driver.Status(ctx, config, networks)
}

// pluginTimes are the durations of the plugins, in the order of the chains.
func pluginTimes(attachment *cni.Attachment) []records.PluginTime {
	var times []records.PluginTime
	for _, plugin := range attachment.Plugins {
		times = append(times, records.PluginTime{Network: attachment.Networks[plugin.Network].Name, Type: plugin.Type, Took: plugin.Took})
	}
	return times
}

// Reserve returns the *cni.Attachment for ADD. DEL uses it too, even if the configuration has
// changed by then.
func (s *attachNetwork) Reserve(_ context.Context, r *lifecycle.Run) (any, error) {
	spec := r.Spec.(*Spec)
	if !spec.NetworkIsOurs() {
		return nil, nil
	}
	config := networkConfig(s.stock, spec)
	networks, err := cni.Load(config)
	if err != nil {
		return nil, err
	}
	args, capabilities, err := cni.PodArgs(r.Key.ID, spec.Config)
	if err != nil {
		return nil, err
	}
	return cni.NewAttachment(config, networks, r.Key.ID, s.netNSPath(r.Key.ID), args, capabilities)
}

const networkNotOurs = "the pod's network isn't podfsm's to attach"

// Do returns the *Network.
func (s *attachNetwork) Do(ctx context.Context, r *lifecycle.Run) (any, error) {
	if r.Plan() == nil {
		return &lifecycle.Skipped{Reason: networkNotOurs}, nil
	}
	attachment, err := s.attachment(r)
	if err != nil {
		return nil, err
	}
	if err := s.driver.Add(ctx, attachment, recorder(r)); err != nil {
		return nil, err
	}
	return s.result(attachment)
}

// result returns the network of an attached pod.
func (s *attachNetwork) result(attachment *cni.Attachment) (*Network, error) {
	result, err := attachment.GoCNIResult()
	if err != nil {
		return nil, err
	}
	ip, additional, err := attachment.IPs(s.stock.CNI.IPPreference)
	if err != nil {
		return nil, err
	}
	return &Network{IP: ip, AdditionalIPs: additional, Result: result, Plugins: pluginTimes(attachment)}, nil
}

// Find rebuilds the result from the plan and the notes, which outlive a reboot.
func (s *attachNetwork) Find(_ context.Context, r *lifecycle.Run) (any, error) {
	if !r.Spec.(*Spec).NetworkIsOurs() {
		return &lifecycle.Skipped{Reason: networkNotOurs}, nil
	}
	if r.Plan() == nil {
		return nil, fmt.Errorf("no record of the networks of sandbox %q: %w", r.Key.ID, errdefs.ErrNotFound)
	}
	attachment, err := s.attachment(r)
	if err != nil {
		return nil, err
	}
	if !attachment.Complete() {
		return nil, fmt.Errorf("sandbox %q is not attached to all of its networks: %w", r.Key.ID, errdefs.ErrNotFound)
	}
	return s.result(attachment)
}

func (s *attachNetwork) Undo(ctx context.Context, r *lifecycle.Run) error {
	if r.Plan() == nil {
		return s.detachUnrecorded(ctx, r)
	}
	attachment, err := s.attachment(r)
	if err != nil {
		return err
	}
	if err := s.keepPinForDel(ctx, r); err != nil { // in a rollback, pause may still run
		return err
	}
	attachment.NetNSPath = s.netNSAtDel(r, attachment.NetNSPath)
	err = s.driver.Del(ctx, attachment, recorder(r))
	if errors.As(err, new(*cni.RunningError)) {
		return lifecycle.StillInUse(err)
	}
	return err
}

// netNSAtDel returns the path of the pod's namespace for DEL, "" if the namespace is gone. After
// pause has ended, another namespace may be at the path, and DEL must not look into that.
func (n *node) netNSAtDel(r *lifecycle.Run, path string) string {
	if captured, ok := n.pinOf(r); ok && !isPinned(captured) {
		return ""
	}
	return path
}

// WriteOff writes off the DEL of a CNI plugin.
func (s *attachNetwork) WriteOff(ctx context.Context, r *lifecycle.Run, name, reason string) ([]string, error) {
	if r.Plan() == nil {
		return nil, fmt.Errorf("no record of the network plan of sandbox %q; write off the whole cleanup: %w", r.Key.ID, errdefs.ErrNotFound)
	}
	attachment, err := s.attachment(r)
	if err != nil {
		return nil, err
	}
	return attachment.WriteOff(ctx, name, reason, func(ctx context.Context, p cni.Progress) error { return r.Announce(ctx, &p) })
}

// detachUnrecorded detaches a pod without a plan from the networks of today's configuration, the
// best guess. Without a configuration it does nothing, and the next CNI GC frees what the pod has.
func (s *attachNetwork) detachUnrecorded(ctx context.Context, r *lifecycle.Run) error {
	spec := r.Spec.(*Spec)
	if !spec.Guessed || !spec.NetworkIsOurs() {
		return nil
	}
	plan, err := s.Reserve(ctx, r)
	if err != nil {
		log.G(ctx).WithField(tracing.LogSandbox, r.Key.ID).WithError(err).Warn("records of the pod's networks are lost, no configured network can detach it")
		return nil
	}
	attachment := plan.(*cni.Attachment)
	attachment.Suspect()
	return s.driver.Del(ctx, attachment, func(context.Context, cni.Progress) error { return nil }) // without a plan, notes are not recorded
}

// Check runs CNI CHECK, for the plugins whose specification version has it.
func (s *attachNetwork) Check(ctx context.Context, r *lifecycle.Run) error {
	attachment, err := s.attachment(r)
	if err != nil {
		return err
	}
	return s.driver.Check(ctx, attachment, r.Spec.(*Spec).Config.GetLinux().GetSysctls())
}

func (s *attachNetwork) Probe(_ context.Context, r *lifecycle.Run) (bool, error) {
	if r.Plan() == nil {
		return false, nil
	}
	attachment, err := s.attachment(r)
	if err != nil {
		return false, err
	}
	return !attachment.Settled(), nil
}

// recorder records the progress of the driver, plugin by plugin.
func recorder(r *lifecycle.Run) cni.Record {
	return func(ctx context.Context, p cni.Progress) error {
		if p.Announces() {
			return r.Announce(ctx, &p)
		}
		return r.Note(ctx, &p)
	}
}

// attachment returns a copy of the plan with all notes recorded since. Its plugins are looked for
// in today's directories, too.
func (s *attachNetwork) attachment(r *lifecycle.Run) (*cni.Attachment, error) {
	text, err := json.Marshal(r.Plan())
	if err != nil {
		return nil, fmt.Errorf("failed to copy the network plan of sandbox %q: %w", r.Key.ID, err)
	}
	attachment := &cni.Attachment{}
	if err := json.Unmarshal(text, attachment); err != nil {
		return nil, fmt.Errorf("failed to copy the network plan of sandbox %q: %w", r.Key.ID, err)
	}
	for _, note := range r.Notes() {
		progress, ok := note.(*cni.Progress)
		if !ok {
			return nil, fmt.Errorf("the network record of sandbox %q holds an unknown %T: %w", r.Key.ID, note, errdefs.ErrDataLoss)
		}
		if err := attachment.Apply(*progress); err != nil {
			return nil, fmt.Errorf("the network record of sandbox %q doesn't fit its plan: %w", r.Key.ID, err)
		}
	}
	attachment.LookIn(s.stock.CNI.BinDirs)
	return attachment, nil
}
