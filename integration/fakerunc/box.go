package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	// endTimeout is how long a killed process may take to end, and its cgroup to be empty.
	endTimeout  = 10 * time.Second
	endInterval = 2 * time.Millisecond
)

// box is one container and what is on record of it, in a file of runc's root directory.
type box struct {
	root, id string
	state
}

type state struct {
	Bundle string
	Pid    int
	// Started is the process's field of this name in proc_pid_stat(5): with the pid, it tells a process from a later one.
	Started string
	Cgroup  string // below each hierarchy's mount point
}

func (b *box) dir() string  { return filepath.Join(b.root, b.id) }
func (b *box) file() string { return filepath.Join(b.dir(), "state.json") }

func (b *box) load() error {
	content, err := os.ReadFile(b.file())
	if errors.Is(err, os.ErrNotExist) {
		return errGone
	}
	if err != nil {
		return err
	}
	return json.Unmarshal(content, &b.state)
}

func (b *box) save() error {
	content, err := json.Marshal(b.state)
	if err != nil {
		return err
	}
	return os.WriteFile(b.file(), content, 0o600)
}

// create starts the process. What was made is taken back when it fails.
func (b *box) create(bundle, pidFile string) (err error) {
	var spec specs.Spec
	content, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(content, &spec); err != nil {
		return err
	}
	if spec.Linux == nil {
		return errors.New("the bundle has no Linux section")
	}
	if err := os.MkdirAll(b.root, 0o711); err != nil {
		return err
	}
	if err := os.Mkdir(b.dir(), 0o711); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.clean())
		}
	}()
	b.Bundle, b.Cgroup = bundle, spec.Linux.CgroupsPath
	if err := b.start(spec.Linux); err != nil {
		return err
	}
	if err := b.save(); err != nil {
		return err
	}
	return os.WriteFile(pidFile, []byte(strconv.Itoa(b.Pid)), 0o644)
}

func (b *box) start(linux *specs.Linux) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(filepath.Join(filepath.Dir(self), "pause"))
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	for _, ns := range linux.Namespaces {
		if err := enter(cmd.SysProcAttr, ns, linux); err != nil {
			return err
		}
	}
	runtime.LockOSThread() // which may be in the pod's network namespace; it ends with the program
	if err := cmd.Start(); err != nil {
		return err
	}
	b.Pid = cmd.Process.Pid
	_, b.Started = b.look()
	for _, dir := range b.cgroups() {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(b.Pid)), 0); err != nil {
			return err
		}
	}
	return nil
}

// enter has a process start in one of the bundle's namespaces: a new user or network namespace, or a network namespace that is
// there. The other kinds are left out.
func enter(attr *syscall.SysProcAttr, ns specs.LinuxNamespace, linux *specs.Linux) error {
	switch {
	case ns.Type == specs.NetworkNamespace && ns.Path != "":
		f, err := os.Open(ns.Path)
		if err != nil {
			return err
		}
		defer f.Close()
		runtime.LockOSThread()
		return unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
	case ns.Type == specs.NetworkNamespace:
		attr.Cloneflags |= unix.CLONE_NEWNET
	case ns.Type == specs.UserNamespace && ns.Path != "":
		return fmt.Errorf("fakerunc can't enter the user namespace %q", ns.Path)
	case ns.Type == specs.UserNamespace:
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings, attr.GidMappings = mappings(linux.UIDMappings), mappings(linux.GIDMappings)
	}
	return nil
}

func mappings(of []specs.LinuxIDMapping) []syscall.SysProcIDMap {
	all := make([]syscall.SysProcIDMap, len(of))
	for i, m := range of {
		all[i] = syscall.SysProcIDMap{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size)}
	}
	return all
}

// cgroups are the container's cgroup in one hierarchy, with which a process can be known as the container's: the others would
// cost the kernel much, and limit nothing.
func (b *box) cgroups() []string {
	for _, hierarchy := range []string{"/sys/fs/cgroup/pids", "/sys/fs/cgroup"} {
		if _, err := os.Stat(filepath.Join(hierarchy, "cgroup.procs")); err == nil && b.Cgroup != "" {
			return []string{filepath.Join(hierarchy, b.Cgroup)}
		}
	}
	return nil
}

// look returns the process's state in the letters of proc_pid_stat(5), and when it was started; neither if there is none.
func (b *box) look() (letter, started string) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", b.Pid))
	if err != nil {
		return "", ""
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	return fields[0], fields[19] // fields 3 and 22
}

func (b *box) running() bool {
	letter, started := b.look()
	return b.Pid > 0 && letter != "" && letter != "Z" && started == b.Started
}

func (b *box) printState() error {
	if err := b.load(); err != nil {
		return err
	}
	status := specs.StateStopped
	if b.running() {
		status = specs.StateRunning
	}
	return json.NewEncoder(os.Stdout).Encode(specs.State{Version: specs.Version, ID: b.id, Status: status, Pid: b.Pid, Bundle: b.Bundle})
}

// kill takes a signal as a number or by its name.
func (b *box) kill(signal string) error {
	if err := b.load(); err != nil {
		return err
	}
	if !b.running() {
		return errNotRunning
	}
	number, err := strconv.Atoi(signal)
	if err != nil {
		number = int(unix.SignalNum(signal))
	}
	return unix.Kill(b.Pid, unix.Signal(number))
}

// delete removes a container that has ended; with force it ends it, and finds it no error that there is none.
func (b *box) delete(force bool) error {
	err := b.load()
	switch {
	case errors.Is(err, errGone) && force:
		return nil
	case err != nil:
		return err
	case b.running() && !force:
		return errors.New("container is not stopped")
	}
	return b.clean()
}

// clean ends the process and removes its cgroup, which the kernel allows once nobody is in there, and the record.
func (b *box) clean() error {
	for deadline := time.Now().Add(endTimeout); ; time.Sleep(endInterval) {
		if b.running() {
			_ = unix.Kill(b.Pid, unix.SIGKILL) // it may have ended meanwhile
		}
		err := b.removeCgroups()
		if err == nil && !b.running() {
			return os.RemoveAll(b.dir())
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("container %q does not end: %w", b.id, err)
		}
	}
}

func (b *box) removeCgroups() error {
	var errs []error
	for _, dir := range b.cgroups() {
		if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
