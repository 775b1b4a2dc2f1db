// Command podfsm-init becomes the pause process of a pod.
//
// The daemon starts it with clone(2) in the pod's namespaces and cgroup. It sets up what only a process inside can set up,
// gives up every privilege, and executes the pause program of the image. It is static and knows nothing but the OCI
// specification that it is given, so that it starts in a millisecond.
//
// Its arguments and descriptors are a protocol with the daemon of the same release:
//
//	podfsm-init PROTOCOL
//
//	0, 1, 2  /dev/null
//	3        a stream socket. The daemon sends a byte with the mounts as SCM_RIGHTS (unix(7)), none of which is attached anywhere: the
//	         root filesystem, and the sources of the bind mounts of the specification in their order; then the OCI runtime
//	         specification as JSON, up to the end of the stream, with only those sysctls that are to be set here, by their files
//	         below /proc/sys. It ends the stream without a word when pause is not to be
//	         started, also by dying. Back comes a NUL byte right before pause is executed, and the reason of a failure as text.
//	         Closed without either, it says that this program was killed.
//	4        a seccomp filter: an array of struct sock_filter (seccomp(2))
//	5        this program
//
// podfsm-init --version prints the release and the protocol.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// protocol is the version of the arguments and descriptors above.
const protocol = "1"

// version is set by the linker (-X main.version=...).
var version string

// The descriptors, as in the comment above.
const (
	daemonFD  = 3
	seccompFD = 4
)

// daemon is kept, because a file that is garbage is closed.
var daemon = os.NewFile(daemonFD, "daemon")

// Credentials, the seccomp filter and no_new_privs are the thread's. execve(2) keeps those of its thread and ends the others.
func init() { runtime.LockOSThread() }

func main() {
	switch {
	case len(os.Args) == 2 && os.Args[1] == "--version":
		fmt.Printf("podfsm-init %s protocol %s\n", cmp.Or(version, "(devel)"), protocol)
		return
	case len(os.Args) != 2 || os.Args[1] != protocol:
		fmt.Fprintf(os.Stderr, "podfsm-init: the arguments are %q, want %q: the daemon starts it, and both must be of one release\n", os.Args[1:], protocol)
		os.Exit(1)
	}
	err := run() // returns only when it has failed
	_, _ = daemon.WriteString(err.Error())
	os.Exit(1)
}

func run() error {
	if err := unix.CloseRange(daemonFD, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("failed to mark descriptors close-on-exec: %w", err)
	}
	mounts, err := receiveMounts()
	if err != nil {
		return err
	}
	text, err := io.ReadAll(daemon)
	if err != nil {
		return fmt.Errorf("failed to read the specification: %w", err)
	}
	var spec specs.Spec
	if err := json.Unmarshal(text, &spec); err != nil {
		return fmt.Errorf("failed to parse the specification: %w", err)
	}
	filter, err := io.ReadAll(io.NewSectionReader(os.NewFile(seccompFD, "seccomp"), 0, math.MaxInt32)) // many share the file, but not its offset
	if err != nil {
		return fmt.Errorf("failed to read the seccomp filter: %w", err)
	}
	if len(filter) == 0 {
		return errors.New("the seccomp filter is empty")
	}
	// The cgroup namespace begins at the cgroup that the process is in: the daemon has moved it there before it sent the specification.
	if slices.ContainsFunc(spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.CgroupNamespace }) {
		if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
			return fmt.Errorf("failed to make a cgroup namespace: %w", err)
		}
	}
	if err := setSysctls(spec.Linux.Sysctl); err != nil {
		return err
	}
	labels, err := openLabels(spec.Process)
	if err != nil {
		return err
	}
	if err := enterRoot(mounts[0]); err != nil {
		return err
	}
	if err := mountAll(spec.Mounts, mounts[1:]); err != nil {
		return err
	}
	if spec.Hostname != "" {
		if err := unix.Sethostname([]byte(spec.Hostname)); err != nil {
			return fmt.Errorf("failed to set the hostname: %w", err)
		}
	}
	if err := unix.Chdir(spec.Process.Cwd); err != nil {
		return fmt.Errorf("failed to change to the working directory %q: %w", spec.Process.Cwd, err)
	}
	program, err := lookPath(spec.Process.Args[0], spec.Process.Env)
	if err != nil {
		return err
	}
	if err := dropPrivileges(spec.Process.User); err != nil {
		return err
	}
	for _, l := range labels {
		if err := l.set(); err != nil {
			return err
		}
	}
	if err := confine(filter); err != nil {
		return err
	}
	if _, err := daemon.Write([]byte{0}); err != nil {
		return fmt.Errorf("failed to report: %w", err) // the daemon is gone, and nobody knows of this process
	}
	return fmt.Errorf("failed to execute %q of the pause image: %w", program, unix.Exec(program, spec.Process.Args, spec.Process.Env))
}

// maxMounts bounds how many mounts the daemon sends.
const maxMounts = 16

// receiveMounts returns the descriptors of the mounts.
func receiveMounts() ([]int, error) {
	var first [1]byte
	control := make([]byte, unix.CmsgSpace(4*maxMounts))
	n, controls, _, _, err := unix.Recvmsg(daemonFD, first[:], control, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("failed to receive the mounts: %w", err)
	}
	if n == 0 {
		return nil, errors.New("the daemon has given up")
	}
	messages, err := unix.ParseSocketControlMessage(control[:controls])
	if err != nil {
		return nil, fmt.Errorf("failed to receive the mounts: %w", err)
	}
	if len(messages) != 1 {
		return nil, fmt.Errorf("the daemon has sent no mounts, but %d messages", len(messages))
	}
	return unix.ParseUnixRights(&messages[0])
}

// setSysctls writes sysctls of the own namespaces, as long as the host's /proc is there: it shows each process its own.
func setSysctls(values map[string]string) error {
	for _, file := range slices.Sorted(maps.Keys(values)) {
		f, err := os.OpenFile("/proc/sys/"+file, os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteString(values[file])
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			return fmt.Errorf("failed to set the sysctl %s = %q: %w", file, values[file], err)
		}
	}
	return nil
}

// enterRoot makes the rootfs the root of the mount namespace, with nothing of the host's mounts in it. pivot_root(2) describes the
// way with one directory for both roots.
func enterRoot(rootfs int) error {
	// What is unmounted here must stay on the host. What the host unmounts meanwhile must not stay here, or it is busy there.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("failed to make the mounts slaves of the host's: %w", err)
	}
	if err := unix.MoveMount(rootfs, "", unix.AT_FDCWD, "/", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("failed to attach the root filesystem: %w", err)
	}
	if err := unix.Fchdir(rootfs); err != nil {
		return fmt.Errorf("failed to enter the root filesystem: %w", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("failed to change the root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("failed to let go of the host's mounts: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("failed to enter the new root: %w", err)
	}
	return nil
}

// mountAll mounts what the specification names, and then makes all of the root but the bind mounts read-only.
func mountAll(mounts []specs.Mount, binds []int) error {
	readonly := []string{"/"}
	for _, m := range mounts {
		if err := mkdirAll(m.Destination); err != nil {
			return fmt.Errorf("failed to make the mount point %q: %w", m.Destination, err)
		}
		var err error
		if m.Type == "bind" {
			err = unix.MoveMount(binds[0], "", unix.AT_FDCWD, m.Destination, unix.MOVE_MOUNT_F_EMPTY_PATH)
			binds = binds[1:]
		} else {
			flags, data := options(m.Options)
			err = unix.Mount(m.Source, m.Destination, m.Type, flags, data)
			readonly = append(readonly, m.Destination)
		}
		if err != nil {
			return fmt.Errorf("failed to mount %q: %w", m.Destination, err)
		}
	}
	for _, dir := range readonly {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(unix.AT_FDCWD, dir, 0, &attr); err != nil {
			return fmt.Errorf("failed to make %q read-only: %w", dir, err)
		}
	}
	return nil
}

func mkdirAll(dir string) error {
	if dir == "/" {
		return nil
	}
	if err := mkdirAll(path.Dir(dir)); err != nil {
		return err
	}
	if err := unix.Mkdir(dir, 0o755); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}

// flags are the mount options that mount(2) takes as flags.
var flags = map[string]uintptr{
	"nosuid": unix.MS_NOSUID, "nodev": unix.MS_NODEV, "noexec": unix.MS_NOEXEC, "strictatime": unix.MS_STRICTATIME,
}

// options splits mount options into flags and the filesystem's own data.
func options(all []string) (flag uintptr, data string) {
	var rest []string
	for _, option := range all {
		if f, ok := flags[option]; ok {
			flag |= f
		} else {
			rest = append(rest, option)
		}
	}
	return flag, strings.Join(rest, ",")
}

// lookPath finds a program as execvp(3) does.
func lookPath(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	dirs := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, variable := range env {
		if value, ok := strings.CutPrefix(variable, "PATH="); ok {
			dirs = value
		}
	}
	for dir := range strings.SplitSeq(dirs, ":") {
		file := path.Join(dir, name)
		if unix.Access(file, unix.X_OK) == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("the pause image has no program %q in %q", name, dirs)
}

// label is a label of a Linux security module that the program gets when it is executed.
type label struct {
	file *os.File
	text string
}

// openLabels opens the files that take the process's labels, as long as the host's /proc is there. A task may write its own only
// (proc_pid_attr(5)).
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

// dropPrivileges takes on the user, and leaves no capability in any set: pause needs none, whatever the user is.
func dropPrivileges(user specs.User) error {
	for capability := uintptr(0); ; capability++ {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0)
		if err == unix.EINVAL && capability > unix.CAP_AUDIT_READ {
			break // the kernel knows no more
		}
		if err != nil {
			return fmt.Errorf("failed to drop capability %d: %w", capability, err)
		}
	}
	unix.Umask(0o022)
	// Raw calls are for this thread alone. Go's own wrappers stop all threads to make the call on each.
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

// confine sets no_new_privs, and then the seccomp filter, which an unprivileged thread may set only after it (seccomp(2)).
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
