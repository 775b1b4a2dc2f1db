package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/pause"
	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// attachNetwork runs the pod's CNI chains.
type attachNetwork struct{ *node }

var (
	_ lifecycle.Checker = (*attachNetwork)(nil)
	_ lifecycle.Parted  = (*attachNetwork)(nil)
)

// AttachNetwork is the step of attachNetwork.
const AttachNetwork states.Event = "attach_network"

func (s *attachNetwork) Declaration() lifecycle.Declaration {
	return lifecycle.Declaration{
		Step: states.Step{
			Name:    AttachNetwork,
			Done:    "The CNI chain was run.",
			State:   "NetworkReady",
			Meaning: "Every CNI plugin of its chain has succeeded.",
		},
		// A DEL without the namespace would miss what is only found inside: the bridge plugin takes the addresses whose
		// masquerade rules it removes from there.
		Holds:        []states.Event{CaptureNetNS},
		AtStop:       true,
		Lasting:      true,
		Foreign:      true,
		Deadline:     2 * s.limits.cniAdd, // the driver ends each plugin in time; this ends a chain of many slow ones
		UndoDeadline: 2 * s.limits.cniDel,
	}
}

// networkConfig is where the networks of a pod are configured.
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

// networkReady fails unless a pod has networks to be attached to that take pods now. Of the node's own networks containerd's service
// says that with every status, and the kubelet sends no pods meanwhile; a handler's are asked by nobody else.
func (c *Controller) networkReady(ctx context.Context, spec *Spec) error {
	config := networkConfig(c.stock, spec)
	networks, err := cni.Load(config)
	if err != nil || !c.stock.hasOwnCNIConf(spec.Handler) {
		return err
	}
	return c.node.driver.Status(ctx, config, networks)
}

// pluginTimes are how long the plugins took, in the order of the chains.
func pluginTimes(attachment *cni.Attachment) []records.PluginTime {
	var times []records.PluginTime
	for _, plugin := range attachment.Plugins {
		times = append(times, records.PluginTime{Network: attachment.Networks[plugin.Network].Name, Type: plugin.Type, Took: plugin.Took})
	}
	return times
}

// Reserve returns the *cni.Attachment that ADD is going to make, and DEL to take back, whatever the configuration is by then.
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

// result is what a pod that is attached has got.
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

// Find makes the result again from the plan and the notes, which last.
func (s *attachNetwork) Find(_ context.Context, r *lifecycle.Run) (any, error) {
	if !r.Spec.(*Spec).NetworkIsOurs() {
		return &lifecycle.Skipped{Reason: networkNotOurs}, nil
	}
	if r.Plan() == nil {
		return nil, fmt.Errorf("it is not on record how sandbox %q was attached to its networks: %w", r.Key.ID, errdefs.ErrNotFound)
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
	if err := s.keepPinForDel(ctx, r); err != nil { // pause of a sandbox that is rolled back still runs
		return err
	}
	attachment.NetNSPath = s.netNSAtDel(r, attachment.NetNSPath)
	err = s.driver.Del(ctx, attachment, recorder(r))
	if errors.As(err, new(*cni.RunningError)) {
		return lifecycle.StillInUse(err)
	}
	return err
}

// netNSAtDel is where DEL finds the pod's namespace, which was pinned at path; "" if it isn't there. DEL must not look into another one that
// is, after pause has ended.
func (n *node) netNSAtDel(r *lifecycle.Run, path string) string {
	if captured, ok := n.pinOf(r); ok && !isPinned(captured) {
		return ""
	}
	return path
}

// WriteOff gives up the DEL of a CNI plugin.
func (s *attachNetwork) WriteOff(ctx context.Context, r *lifecycle.Run, name, reason string) ([]string, error) {
	if r.Plan() == nil {
		return nil, fmt.Errorf("the plan of the network of sandbox %q is lost, write off the whole cleanup: %w", r.Key.ID, errdefs.ErrNotFound)
	}
	attachment, err := s.attachment(r)
	if err != nil {
		return nil, err
	}
	return attachment.WriteOff(ctx, name, reason, func(ctx context.Context, p cni.Progress) error { return r.Announce(ctx, &p) })
}

// detachUnrecorded detaches a pod whose plan is lost from the networks as they are configured today: the best guess there is. Without
// any configuration nothing more can be done for it, and what it has is left to the next GC.
func (s *attachNetwork) detachUnrecorded(ctx context.Context, r *lifecycle.Run) error {
	spec := r.Spec.(*Spec)
	if !spec.Guessed || !spec.NetworkIsOurs() {
		return nil
	}
	plan, err := s.Reserve(ctx, r)
	if err != nil {
		log.G(ctx).WithField(tracing.LogSandbox, r.Key.ID).WithError(err).Warn("podfsm: the records of a pod's network are lost, and it can't be detached from any of today")
		return nil
	}
	attachment := plan.(*cni.Attachment)
	attachment.Suspect()
	return s.driver.Del(ctx, attachment, func(context.Context, cni.Progress) error { return nil }) // there is no plan to keep notes for
}

// Check asks the plugins, where their specification has a command for it. They would take an interface for damaged whose IPv6 addresses
// the pod's own sysctls have taken away.
func (s *attachNetwork) Check(ctx context.Context, r *lifecycle.Run) error {
	if pause.DisablesIPv6(r.Spec.(*Spec).Config) {
		return nil
	}
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

// recorder puts what the driver does on record, plugin by plugin.
func recorder(r *lifecycle.Run) cni.Record {
	return func(ctx context.Context, p cni.Progress) error {
		if p.Announces() {
			return r.Announce(ctx, &p)
		}
		return r.Note(ctx, &p)
	}
}

// attachment is the plan with everything that has been noted since, in an own copy. Its plugins are looked for in today's directories, too.
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
