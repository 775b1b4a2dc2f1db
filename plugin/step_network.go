package plugin

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/lifecycle"
)

// attachNetwork runs the pod's CNI chains.
type attachNetwork struct {
	*node
	facts lifecycle.Facts
}

func (s *attachNetwork) Facts() lifecycle.Facts { return s.facts }

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

// Plan returns the *cni.Attachment that ADD is going to make, and DEL to take back, whatever the configuration is by then.
func (s *attachNetwork) Plan(_ context.Context, r *lifecycle.Run) (any, error) {
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

// Do returns the *Network.
func (s *attachNetwork) Do(ctx context.Context, r *lifecycle.Run) (any, error) {
	if r.Plan() == nil {
		return &lifecycle.Skipped{Reason: "the pod's network isn't podfsm's to attach"}, nil
	}
	attachment, err := s.attachment(r)
	if err != nil {
		return nil, err
	}
	if err := s.driver.Add(ctx, attachment, recorder(r)); err != nil {
		return nil, err
	}
	result, err := attachment.GoCNIResult()
	if err != nil {
		return nil, err
	}
	ip, additional, err := attachment.IPs(s.stock.CNI.IPPreference)
	if err != nil {
		return nil, err
	}
	return &Network{IP: ip, AdditionalIPs: additional, Result: result}, nil
}

func (s *attachNetwork) Undo(ctx context.Context, r *lifecycle.Run) error {
	if r.Plan() == nil {
		return nil
	}
	attachment, err := s.attachment(r)
	if err != nil {
		return err
	}
	return s.driver.Del(ctx, attachment, recorder(r))
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
	return func(ctx context.Context, p cni.Progress) error { return r.Note(ctx, &p) }
}

// attachment is the plan with everything that has been noted since, in an own copy.
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
		if err := attachment.Apply(*note.(*cni.Progress)); err != nil {
			return nil, fmt.Errorf("the network record of sandbox %q doesn't fit its plan: %w", r.Key.ID, err)
		}
	}
	return attachment, nil
}
