package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// change is a change of files after which containerd is restarted. The files as
// they were are kept until containerd is ready. From the file "paths" on, which is
// written when all of them are kept, the change can be rolled back.
type change struct {
	host  *host
	dir   string
	paths []string
}

func (h *host) changeIn(paths []string) *change {
	return &change{host: h, dir: filepath.Join(h.dir, backupName), paths: slices.Compact(slices.Sorted(slices.Values(paths)))}
}

func (c *change) list() string { return filepath.Join(c.dir, "paths") }

// restarted is a file that exists if containerd may run with the change.
func (c *change) restarted() string { return filepath.Join(c.dir, "restarted") }

func (c *change) kept(path string) string { return filepath.Join(c.dir, "files", path) }

// begin keeps files. Those that don't exist are on the list, too.
func (h *host) begin(paths []string) (*change, error) {
	c := h.changeIn(paths)
	if err := os.RemoveAll(c.dir); err != nil {
		return nil, err
	}
	// A directory may have hidden what is in a file.
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return nil, err
	}
	for _, path := range c.paths {
		if err := keep(path, c.kept(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("failed to back up %q: %w", path, err)
		}
	}
	if err := syncDirs(c.dir); err != nil {
		return nil, err
	}
	text, err := json.Marshal(c.paths)
	if err != nil {
		return nil, err
	}
	return c, writeFile(c.list(), text, 0o600)
}

// end forgets the files as they were. Without its list, no change can be rolled
// back with a part of them.
func (c *change) end() error {
	if err := removeFile(c.list()); err != nil {
		return err
	}
	if err := syncDir(c.dir); err != nil {
		return err
	}
	return os.RemoveAll(c.dir)
}

// do changes the files by apply, restarts containerd and waits until it is ready,
// with or without podfsm. If that fails, all is as it was before. Otherwise the
// caller has to end the change.
func (c *change) do(ctx context.Context, apply func() error, podfsm bool) error {
	err := apply()
	if err == nil {
		err = c.restart(ctx, podfsm)
	}
	if err == nil && podfsm {
		err = c.makePermanent(ctx)
	}
	if err != nil {
		return errors.Join(err, c.undo(ctx))
	}
	return nil
}

func (c *change) restart(ctx context.Context, podfsm bool) error {
	h := c.host
	if err := writeFile(c.restarted(), nil, 0o600); err != nil {
		return err
	}
	if err := h.run(ctx, "systemctl", "daemon-reload"); err != nil {
		return err
	}
	h.say("restarting containerd; pods keep running")
	ctx, cancel := context.WithTimeout(ctx, h.readyTimeout)
	defer cancel()
	if err := h.run(ctx, "systemctl", "restart", "containerd"); err != nil {
		return err
	}
	return h.awaitReady(ctx, func(s state) error { return s.require(podfsm) })
}

// makePermanent has containerd run with podfsm after a reboot, too.
func (c *change) makePermanent(ctx context.Context) error {
	if err := errors.Join(copyFile(trialDropIn, dropIn), remove(trialDropIn)); err != nil {
		return err
	}
	return c.host.run(ctx, "systemctl", "daemon-reload")
}

// undo brings the files back, and containerd if it was restarted. It goes on when
// the switch is told to stop.
func (c *change) undo(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	h := c.host
	h.say("rolling back")
	for _, path := range c.paths {
		if err := c.restore(path); err != nil {
			return fmt.Errorf("failed to roll back %q: %w; the node's files are in %q", path, err, c.dir)
		}
	}
	if err := h.run(ctx, "systemctl", "daemon-reload"); err != nil {
		return err
	}
	if _, err := os.Stat(c.restarted()); err == nil {
		if err := c.restartAsBefore(ctx); err != nil {
			return err
		}
	}
	h.say("rolled back: containerd is as it was")
	return c.end()
}

func (c *change) restore(path string) error {
	if err := removeFile(temporary(path)); err != nil {
		return err
	}
	err := bringBack(c.kept(path), path)
	if errors.Is(err, fs.ErrNotExist) {
		return remove(path)
	}
	return err
}

func (c *change) restartAsBefore(ctx context.Context) error {
	h := c.host
	ctx, cancel := context.WithTimeout(ctx, h.readyTimeout)
	defer cancel()
	// After many failures, systemd refuses to start it.
	_ = h.run(ctx, "systemctl", "reset-failed", "containerd")
	if err := h.run(ctx, "systemctl", "restart", "containerd"); err != nil {
		return fmt.Errorf("failed to restart containerd after the rollback: %w; see journalctl --unit containerd", err)
	}
	if err := h.awaitReady(ctx, func(state) error { return nil }); err != nil {
		return fmt.Errorf("failed to see containerd ready after the rollback: %w; see journalctl --unit containerd", err)
	}
	return nil
}

// rollback rolls back a change that a SIGKILL or a power cut has ended.
func (h *host) rollback(ctx context.Context) error {
	c := h.changeIn(nil)
	text, err := os.ReadFile(c.list())
	if errors.Is(err, fs.ErrNotExist) { // it had not begun, or had ended
		return os.RemoveAll(c.dir)
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, &c.paths); err != nil {
		return fmt.Errorf("failed to read %q: %w; the node's files are in %q", c.list(), err, c.dir)
	}
	h.say("an earlier switch was interrupted")
	return c.undo(ctx)
}
