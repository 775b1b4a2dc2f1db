package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"golang.org/x/sys/unix"
)

const (
	programName = "podfsm-deploy"
	payloadName = "payload"
	backupName  = "backup"
	logName     = "log"

	addressVariable = "CONTAINERD_ADDRESS"
	// forceVariable has an uninstallation end pods that are left.
	forceVariable = "PODFSM_DRAIN_FORCE"

	configFile  = "/etc/containerd/config.toml"
	handlerFile = "/etc/containerd/conf.d/podfsm.toml"
	program     = "/usr/bin/containerd-podfsm"
	tool        = "/usr/bin/podfsm"
	dropIn      = "/usr/lib/systemd/system/containerd.service.d/podfsm.conf"
	// trialDropIn is the drop-in until containerd is ready. A power cut takes it away.
	trialDropIn = "/run/systemd/system/containerd.service.d/podfsm.conf"
)

// host is the half on the host.
type host struct {
	dir     string // of podfsm-deploy
	address string // of containerd's socket
	force   bool   // an uninstallation ends pods
	out     io.Writer

	readyTimeout  time.Duration // for containerd, after a restart
	verifyTimeout time.Duration // for the first pod
}

// onThisHost does what a command says. What there is to say goes to the journal,
// and to the log that the pod prints. SIGTERM rolls back.
func onThisHost(ctx context.Context, command string) error {
	unlock, err := lock(ctx, shared)
	if err != nil {
		return err
	}
	defer unlock()
	log, err := os.OpenFile(filepath.Join(shared, logName), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	h := &host{
		dir: shared, address: cmp.Or(os.Getenv(addressVariable), "/run/containerd/containerd.sock"), force: os.Getenv(forceVariable) != "",
		out: io.MultiWriter(os.Stdout, log), readyTimeout: 3 * time.Minute, verifyTimeout: 3 * time.Minute,
	}
	do := map[string]func(context.Context) error{"install": h.install, "uninstall": h.uninstall, "rollback": h.rollback}[command]
	if err = do(ctx); err != nil {
		fmt.Fprintln(log, "podfsm-deploy:", printable(err.Error()))
	}
	return err
}

// installation is what podfsm-deploy has put on the host. It is on record before
// the first file is.
type installation struct {
	// Digest is that of the payload, once it has replaced containerd.
	Digest string `json:"digest,omitempty"`
	// Files are the paths that are podfsm's.
	Files []string `json:"files"`
	// Config is the digest of the config.toml that had to be made.
	Config string `json:"config,omitempty"`
	// Draining says that an uninstallation has begun, whose drain another
	// installation ends.
	Draining bool `json:"draining,omitempty"`
}

// inOrder are all files in the order of their removal. The drop-ins go first: after a
// power cut, they must not name a program that is gone.
func (i installation) inOrder() []string {
	files := []string{trialDropIn, dropIn}
	for _, file := range i.Files {
		if file != dropIn {
			files = append(files, file)
		}
	}
	return files
}

func (h *host) recordFile() string { return filepath.Join(h.dir, "installation.json") }

func (h *host) read() (i installation, found bool, err error) {
	text, err := os.ReadFile(h.recordFile())
	if errors.Is(err, fs.ErrNotExist) {
		return i, false, nil
	}
	if err != nil {
		return i, false, err
	}
	return i, true, json.Unmarshal(text, &i)
}

func (h *host) write(i installation) error {
	text, err := json.MarshalIndent(i, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(h.recordFile(), text, 0o600)
}

// install installs the payload, or only sees that it works if it is installed
// already.
func (h *host) install(ctx context.Context) error {
	if err := h.rollback(ctx); err != nil {
		return err
	}
	old, found, err := h.read()
	if err != nil {
		return err
	}
	runs, err := h.containerd(ctx)
	if err != nil {
		return fmt.Errorf("failed to find the node's containerd: %w; nothing was changed", err)
	}
	if err := h.refuse(found, runs); err != nil {
		return err
	}
	files, digest, err := examine(filepath.Join(h.dir, payloadName))
	if err != nil {
		return err
	}
	if runs.podfsm && old.Digest == digest {
		h.say("this release runs already")
		return h.verify(ctx, old)
	}
	next := installation{Digest: digest, Files: files, Config: old.Config, Draining: old.Draining}
	if err := h.change(ctx, old, &next, runs.podfsm); err != nil {
		return err
	}
	return h.verify(ctx, next)
}

// refuse returns an error if podfsm is on the node by other means, or if the
// drop-in would start containerd otherwise than the node does.
func (h *host) refuse(found bool, runs state) error {
	_, err := os.Stat(program)
	if !found && (err == nil || runs.podfsm) {
		return errors.New("podfsm is installed already, by a package or by hand; remove that installation first, as docs/howto/leave.md says")
	}
	if !runs.podfsm && len(runs.flags) > 0 {
		return fmt.Errorf("containerd.service runs containerd with flags, which podfsm's drop-in doesn't have: %q; set them in %q", strings.Join(runs.flags, " "), configFile)
	}
	return nil
}

// change replaces an installation by the next one.
func (h *host) change(ctx context.Context, old installation, next *installation, upgrade bool) error {
	config, err := resolve(configFile)
	if err != nil {
		return err
	}
	change, err := h.begin(slices.Concat(next.Files, old.Files, []string{config, trialDropIn, h.recordFile()}))
	if err != nil {
		return err
	}
	replace := func() error { return h.replace(ctx, old, next, upgrade, config) }
	if err := change.do(ctx, replace, true); err != nil {
		return err
	}
	return errors.Join(h.write(*next), change.end())
}

// replace puts the payload in place. The drop-in comes last: without it no
// restart of containerd is the switch.
func (h *host) replace(ctx context.Context, old installation, next *installation, upgrade bool, config string) error {
	if err := h.write(installation{Files: slices.Concat(old.Files, next.Files), Config: old.Config, Draining: old.Draining}); err != nil {
		return err
	}
	for _, file := range next.Files {
		if _, err := os.Stat(file); file == dropIn || file == handlerFile && err == nil { // which is the operator's
			continue
		}
		if err := copyFile(filepath.Join(h.dir, payloadName, file), file); err != nil {
			return err
		}
	}
	for _, file := range old.Files {
		if !slices.Contains(next.Files, file) {
			if err := remove(file); err != nil {
				return err
			}
		}
	}
	if !upgrade {
		if err := h.configure(ctx, next, config); err != nil {
			return err
		}
	}
	return copyFile(filepath.Join(h.dir, payloadName, dropIn), trialDropIn)
}

// configure has containerd read podfsm's handler, and sees whether the node can
// run podfsm.
func (h *host) configure(ctx context.Context, next *installation, config string) error {
	text, err := os.ReadFile(config)
	if errors.Is(err, fs.ErrNotExist) {
		h.say("containerd has no %s: it gets one with the defaults", configFile)
		if text, err = exec.CommandContext(ctx, program, "config", "default").Output(); err != nil {
			return fmt.Errorf("failed to print containerd's default configuration: %w", err)
		}
		next.Config = digestOf(text)
	}
	if err != nil {
		return err
	}
	if text, err = withImport(text); err != nil {
		return err
	}
	if err := rewriteFile(config, text); err != nil {
		return err
	}
	if err := h.run(ctx, tool, "handler", "--write", handlerFile); err != nil {
		return err
	}
	return h.run(ctx, tool, "doctor", "--preflight")
}

// run runs a program of the host, whose output becomes this program's.
func (h *host) run(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), addressVariable+"="+h.address)
	cmd.Stdout, cmd.Stderr = h.out, h.out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("failed to run %q: %w", strings.Join(args, " "), err)
	}
	return nil
}

func (h *host) say(format string, args ...any) {
	fmt.Fprintln(h.out, printable(fmt.Sprintf(format, args...)))
}

// printable replaces characters that could control a terminal, or reorder text. Errors have texts of
// CNI plugins.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || strconv.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, text)
}

// examine lists the files of a payload, by their paths on the host, and sums them up.
func examine(payload string) (files []string, digest string, err error) {
	sum := sha256.New()
	err = fs.WalkDir(os.DirFS(payload), ".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		files = append(files, "/"+path)
		content, err := os.ReadFile(filepath.Join(payload, path))
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(sum, "%s %s\n", path, digestOf(content))
		return err
	})
	if err == nil && !slices.Contains(files, dropIn) {
		err = fmt.Errorf("%q is no payload: it lacks %q", payload, dropIn)
	}
	return files, hex.EncodeToString(sum.Sum(nil)), err
}

func digestOf(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}

// lock waits until no other process works with a directory.
func lock(ctx context.Context, dir string) (unlock func() error, err error) {
	file, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return file.Close, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(err, file.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), file.Close())
		case <-time.After(pollInterval):
		}
	}
}
