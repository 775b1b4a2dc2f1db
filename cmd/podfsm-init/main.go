// Command podfsm-init becomes the pause process of a pod.
//
// The daemon starts it with clone(2) in the namespaces and the cgroup of the pod. It sets up what only
// a process inside can set up, drops every privilege, and executes the pause program of the image. To
// start within a millisecond it is static, and knows only the OCI specification that it receives.
//
// Its arguments and descriptors are a protocol with the daemon of the same release:
//
//	podfsm-init PROTOCOL
//
//	0, 1, 2  /dev/null
//	3        a stream socket
//	4        a seccomp filter: an array of struct sock_filter (seccomp(2))
//	5        this program
//
// On the socket, the daemon sends a byte with detached mounts as SCM_RIGHTS (unix(7)): the root
// filesystem, and the sources of the specification's bind mounts in their order. The OCI runtime
// specification follows as JSON, up to the end of the stream. Its sysctls are those to set here, by
// their files below /proc/sys. If the stream ends without a specification, because the creation was
// canceled or the daemon died, pause is not started.
//
// podfsm-init answers with a NUL byte right before it executes pause, or with the text of an error.
// If the socket is closed without an answer, podfsm-init was killed.
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

// daemon is a variable of the package because a garbage-collected file is closed.
var daemon = os.NewFile(daemonFD, "daemon")

// The credentials, the seccomp filter and no_new_privs belong to a thread. execve(2) keeps those of
// the calling thread and ends the others.
func init() { runtime.LockOSThread() }

func main() {
	switch {
	case len(os.Args) == 2 && os.Args[1] == "--version":
		fmt.Printf("podfsm-init %s protocol %s\n", cmp.Or(version, "(devel)"), protocol)
		return
	case len(os.Args) != 2 || os.Args[1] != protocol:
		fmt.Fprintf(os.Stderr, "podfsm-init: the arguments are %q, want %q: only the daemon starts podfsm-init, and both must be of the same release\n", os.Args[1:], protocol)
		os.Exit(1)
	}
	err := run() // returns only after a failure
	_, _ = daemon.WriteString(err.Error())
	os.Exit(1)
}

func run() error {
	if err := unix.CloseRange(daemonFD, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("failed to mark descriptors close-on-exec: %w", err)
	}
	o, err := receive()
	if err != nil {
		return err
	}
	labels, err := openLabels(o.spec.Process)
	if err != nil {
		return err
	}
	if err := setUp(&o.spec, o.mounts); err != nil {
		return err
	}
	return execute(o.spec.Process, labels, o.filter)
}

// order is what the daemon sends.
type order struct {
	mounts []int // the root filesystem, then the bind mounts
	spec   specs.Spec
	filter []byte // of seccomp
}

// receive reads the order of the daemon.
func receive() (o order, err error) {
	if o.mounts, err = receiveMounts(); err != nil {
		return o, err
	}
	text, err := io.ReadAll(daemon)
	if err != nil {
		return o, fmt.Errorf("failed to read the specification: %w", err)
	}
	if err := json.Unmarshal(text, &o.spec); err != nil {
		return o, fmt.Errorf("failed to parse the specification: %w", err)
	}
	o.filter, err = io.ReadAll(io.NewSectionReader(os.NewFile(seccompFD, "seccomp"), 0, math.MaxInt32)) // other processes share the file and its offset
	if err != nil {
		return o, fmt.Errorf("failed to read the seccomp filter: %w", err)
	}
	if len(o.filter) == 0 {
		return o, errors.New("the seccomp filter is empty")
	}
	return o, nil
}

// setUp sets up the namespaces of this process, while it is privileged in them.
func setUp(spec *specs.Spec, mounts []int) error {
	// The root of a cgroup namespace is the cgroup of its creator. The daemon has moved this
	// process to the pod's cgroup before it sent the specification.
	if slices.ContainsFunc(spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.CgroupNamespace }) {
		if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
			return fmt.Errorf("failed to make a cgroup namespace: %w", err)
		}
	}
	if err := setSysctls(spec.Linux.Sysctl); err != nil {
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
	return nil
}

// execute drops every privilege, reports to the daemon, and executes the program of the image. It
// returns only after a failure.
func execute(process *specs.Process, labels []label, filter []byte) error {
	if err := unix.Chdir(process.Cwd); err != nil {
		return fmt.Errorf("failed to change to the working directory %q: %w", process.Cwd, err)
	}
	program, err := lookPath(process.Args[0], process.Env)
	if err != nil {
		return err
	}
	if err := dropPrivileges(process.User); err != nil {
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
		return fmt.Errorf("failed to report: %w", err) // the daemon is gone: nothing would stop pause
	}
	return fmt.Errorf("failed to execute %q of the pause image: %w", program, unix.Exec(program, process.Args, process.Env))
}

// maxMounts bounds how many mounts the daemon sends.
const maxMounts = 16

// receiveMounts returns the descriptors of the mounts in their order.
func receiveMounts() ([]int, error) {
	var first [1]byte
	control := make([]byte, unix.CmsgSpace(4*maxMounts))
	n, controls, _, _, err := unix.Recvmsg(daemonFD, first[:], control, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("failed to receive the mounts: %w", err)
	}
	if n == 0 {
		return nil, errors.New("the daemon closed the socket")
	}
	messages, err := unix.ParseSocketControlMessage(control[:controls])
	if err != nil {
		return nil, fmt.Errorf("failed to receive the mounts: %w", err)
	}
	if len(messages) != 1 {
		return nil, fmt.Errorf("failed to receive the mounts: got %d control messages, want 1", len(messages))
	}
	return unix.ParseUnixRights(&messages[0])
}

// setSysctls writes sysctls of this process's namespaces. It needs the host's /proc, which shows
// each process its own sysctls.
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

// enterRoot makes the rootfs the root of the mount namespace and detaches all mounts of the host.
// pivot_root(2) describes how one directory can be both the old and the new root.
func enterRoot(rootfs int) error {
	// An unmount here must not propagate to the host. An unmount on the host must propagate here,
	// or the mount stays busy.
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
		return fmt.Errorf("failed to detach the host's mounts: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("failed to enter the new root: %w", err)
	}
	return nil
}

// mountAll makes the mounts of the specification, and then the whole root read-only, except for
// bind mounts.
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

// flags are the mount options that mount(2) takes as bits.
var flags = map[string]uintptr{
	"nosuid": unix.MS_NOSUID, "nodev": unix.MS_NODEV, "noexec": unix.MS_NOEXEC, "strictatime": unix.MS_STRICTATIME,
}

// options splits mount options into flags and the data of the filesystem.
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
