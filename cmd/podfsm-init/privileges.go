package main

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// label is a label of a Linux security module. The kernel applies it at the next execve(2).
type label struct {
	file *os.File
	text string
}

// openLabels opens the files to which the process's labels are written. It needs the host's /proc.
// A task may write only its own files (proc_pid_attr(5)).
func openLabels(process *specs.Process) ([]label, error) {
	var all []label
	for _, l := range []struct{ file, text string }{
		{"/proc/thread-self/attr/exec", process.SelinuxLabel},
		{"/proc/thread-self/attr/apparmor/exec", apparmorExec(process.ApparmorProfile)},
	} {
		if l.text == "" {
			continue
		}
		file, err := os.OpenFile(l.file, os.O_WRONLY, 0)
		if err != nil {
			return nil, fmt.Errorf("failed to label the process: %w", err)
		}
		all = append(all, label{file, l.text})
	}
	return all, nil
}

func apparmorExec(profile string) string {
	if profile == "" {
		return ""
	}
	return "exec " + profile
}

func (l label) set() error {
	if _, err := l.file.WriteString(l.text); err != nil {
		return fmt.Errorf("failed to label the process %q: %w", l.text, err)
	}
	return nil
}

// dropPrivileges sets the user, and drops every capability from every set: pause needs none,
// whatever its user.
func dropPrivileges(user specs.User) error {
	for capability := uintptr(0); ; capability++ {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0)
		if err == unix.EINVAL && capability > unix.CAP_AUDIT_READ {
			break // the kernel has no more capabilities
		}
		if err != nil {
			return fmt.Errorf("failed to drop capability %d: %w", capability, err)
		}
	}
	unix.Umask(0o022)
	// Raw system calls change this thread only. Go's wrappers stop all threads and change each of
	// them.
	groups, uid, gid := user.AdditionalGids, uintptr(user.UID), uintptr(user.GID)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(unsafe.SliceData(groups))), 0); errno != 0 {
		return fmt.Errorf("failed to set the groups %v: %w", groups, errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, gid, gid, gid); errno != 0 {
		return fmt.Errorf("failed to set the group %d: %w", gid, errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uid, uid, uid); errno != 0 {
		return fmt.Errorf("failed to set the user %d: %w", uid, errno)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		return fmt.Errorf("failed to drop the capabilities: %w", err)
	}
	return nil
}

// confine sets no_new_privs and then the seccomp filter. An unprivileged thread may not set a
// filter without no_new_privs (seccomp(2)).
func confine(filter []byte) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("failed to set no_new_privs: %w", err)
	}
	program := unix.SockFprog{
		Len:    uint16(len(filter) / int(unsafe.Sizeof(unix.SockFilter{}))),
		Filter: (*unix.SockFilter)(unsafe.Pointer(unsafe.SliceData(filter))),
	}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0); err != nil {
		return fmt.Errorf("failed to set the seccomp filter: %w", err)
	}
	runtime.KeepAlive(filter)
	return nil
}
