package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// uninstall drains the node and makes containerd its own again.
func (h *host) uninstall(ctx context.Context) error {
	if err := h.rollback(ctx); err != nil {
		return err
	}
	i, found, err := h.read()
	if err != nil {
		return err
	}
	if !found {
		h.say("podfsm-deploy has not installed podfsm on this node")
		return h.leave()
	}
	if err := h.drain(ctx, i); err != nil {
		return err
	}
	if err := h.giveBack(ctx, i); err != nil {
		return err
	}
	return h.leave()
}

// giveBack makes containerd the node's own again. An interruption before its end
// brings podfsm back.
func (h *host) giveBack(ctx context.Context, i installation) error {
	ledgers, err := ledgers(ctx)
	if err != nil {
		return err
	}
	config, err := resolve(configFile)
	if err != nil {
		return err
	}
	change, err := h.begin(slices.Concat(i.Files, []string{config, trialDropIn, h.recordFile()}))
	if err != nil {
		return err
	}
	if err := change.do(ctx, func() error { return h.remove(i, config) }, false); err != nil {
		return err
	}
	for _, dir := range ledgers {
		err = errors.Join(err, os.RemoveAll(dir), syncDir(filepath.Dir(dir)))
	}
	return errors.Join(err, change.end())
}

// leave removes what the pod has brought.
func (h *host) leave() error {
	return errors.Join(os.RemoveAll(filepath.Join(h.dir, payloadName)), os.Remove(filepath.Join(h.dir, programName)))
}

// drain waits until podfsm has no pods, and ends them if that is wanted.
func (h *host) drain(ctx context.Context, i installation) error {
	i.Draining = true
	if err := h.write(i); err != nil {
		return err
	}
	args := []string{tool, "drain"}
	if h.force {
		args = append(args, "--force")
	}
	if err := h.run(ctx, args...); err != nil {
		return err
	}
	return h.run(ctx, tool, "drain", "--check")
}

// takePods ends the drain of an uninstallation that was given up.
func (h *host) takePods(ctx context.Context, i installation) error {
	if !i.Draining {
		return nil
	}
	if err := h.run(ctx, tool, "drain", "--cancel"); err != nil {
		return err
	}
	i.Draining = false
	return h.write(i)
}

// remove removes all of an installation, directories of its own included.
func (h *host) remove(i installation, config string) error {
	for _, file := range append(i.inOrder(), h.recordFile()) {
		if err := remove(file); err != nil {
			return err
		}
	}
	text, err := os.ReadFile(config)
	if err == nil && i.Config != "" && digestOf(text) == i.Config {
		return remove(config)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// ledgers are podfsm's directories in containerd's root and state.
func ledgers(ctx context.Context) (dirs []string, err error) {
	config, err := readConfig(ctx)
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{config.Root, config.State} {
		if !filepath.IsAbs(dir) {
			return nil, fmt.Errorf("failed to find podfsm's records: containerd's directory %q is not an absolute path", dir)
		}
		dirs = append(dirs, filepath.Join(dir, "io.containerd.podsandbox.controller.v1.podfsm"))
	}
	return dirs, nil
}
