package pause

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/host"
)

// StartRequest says how to start a pause process.
type StartRequest struct {
	// Key identifies the process. It is unique among the running ones.
	Key string

	// Spec is the complete OCI runtime specification. Its mounts are a tmpfs and binds.
	Spec *specs.Spec

	// Rootfs mounts the root filesystem, see [Files.MountRootfs], for pause's user namespace; nil for the host's.
	Rootfs func(userns *os.File) (*os.File, error)

	// Seccomp is a seccomp filter from [SeccompFilter].
	Seccomp *os.File

	// NetNS is the network namespace that the process joins; nil if the specification asks for a new one or none.
	NetNS *os.File

	// Cgroup is the cgroup that the process is cloned into.
	Cgroup *host.PodCgroup
}

// Start starts pause and returns when its program is executed. After an error no process is left; the cgroup may
// be.
//
// Errors: AlreadyExists for a key in use, FailedPrecondition before [Processes.Load] has succeeded, InvalidArgument
// for a specification that this package can't fulfil. The
// error's text has podfsm-init's own error. If ctx ends, the process is killed and ctx is the error.
func (p *Processes) Start(ctx context.Context, r StartRequest) (Record, error) {
	record, err := p.start(ctx, r)
	if err != nil {
		return Record{}, fmt.Errorf("failed to start pause: %w", err)
	}
	return record, nil
}

func (p *Processes) start(ctx context.Context, r StartRequest) (_ Record, err error) {
	if _, ok := p.find(r.Key); ok {
		return Record{}, inUse(r.Key)
	}
	if p.init == nil {
		return Record{}, fmt.Errorf("%s is not loaded: %w", InitName, errdefs.ErrFailedPrecondition)
	}
	if err := r.check(); err != nil {
		return Record{}, err
	}
	text, err := instructions(r.Spec)
	if err != nil {
		return Record{}, err
	}
	ours, theirs, err := socketPair()
	if err != nil {
		return Record{}, err
	}
	defer ours.Close()
	child, err := p.clone(r, []*os.File{p.null, p.null, p.null, theirs, r.Seccomp, p.init})
	theirs.Close()
	defer func() {
		if err != nil && child != nil {
			exit, discardErr := p.discard(ctx, child)
			if errors.Is(err, errSilent) {
				err = fmt.Errorf("%w; it ended with status %d: %s", err, exit.Status, exit.hint())
			}
			err = errors.Join(err, discardErr)
		}
	}()
	if err != nil {
		return Record{}, err
	}
	record := Record{Pid: child.Pid()}
	if record.StartTime, err = child.StartTime(ctx); err != nil {
		return Record{}, err
	}
	// The child waits for the specification, and only this daemon reaps it. So its pid can't be another process's yet.
	if err := setOOMScoreAdj(record.Pid, r.Spec.Process.OOMScoreAdj); err != nil {
		return Record{}, err
	}
	mounts, err := r.mounts(record.Pid)
	defer closeAll(mounts)
	if err != nil {
		return Record{}, err
	}
	if err := instruct(ctx, ours, mounts, text); err != nil {
		return Record{}, err
	}
	return record, p.watch(r.Key, child)
}

// setOOMScoreAdj sets the OOM score adjustment of a process; nil leaves the daemon's own.
func setOOMScoreAdj(pid int, score *int) error {
	if score == nil {
		return nil
	}
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte(strconv.Itoa(*score)), 0); err != nil {
		return fmt.Errorf("failed to set the OOM score adjustment to %d; set restrict_oom_score_adj where the daemon lacks CAP_SYS_RESOURCE: %w", *score, err)
	}
	return nil
}

// mounts returns what podfsm-init attaches: the root filesystem, and the sources of the bind mounts. The caller
// closes them, also after an error.
func (r StartRequest) mounts(pid int) (mounts []*os.File, err error) {
	var userns *os.File
	if len(r.Spec.Linux.UIDMappings) > 0 {
		if userns, err = os.Open(fmt.Sprintf("/proc/%d/ns/user", pid)); err != nil {
			return nil, err
		}
		defer userns.Close()
	}
	rootfs, err := r.Rootfs(userns)
	if err != nil {
		return nil, err
	}
	binds, err := openBinds(r.Spec.Mounts)
	return append([]*os.File{rootfs}, binds...), err
}

// socketPair returns the daemon's end of a connection with podfsm-init, and podfsm-init's end.
func socketPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "daemon"), os.NewFile(uintptr(fds[1]), InitName)
	defer ours.Close() // net.FileConn duplicates the descriptor
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn.(*net.UnixConn), theirs, nil
}

// check refuses a specification that would put pause into a namespace of the host's instead of its own, or that
// would change the host's.
func (r StartRequest) check() error {
	own := map[specs.LinuxNamespaceType]bool{}
	for _, namespace := range r.Spec.Linux.Namespaces {
		_, known := cloneFlag[namespace.Type]
		joined := namespace.Type == specs.NetworkNamespace && r.NetNS != nil
		if !known || (namespace.Path != "") != joined {
			return fmt.Errorf("unsupported %s namespace with the path %q: %w", namespace.Type, namespace.Path, errdefs.ErrInvalidArgument)
		}
		own[namespace.Type] = true
	}
	switch {
	case own[specs.UserNamespace] != (len(r.Spec.Linux.UIDMappings) > 0) || own[specs.UserNamespace] != (len(r.Spec.Linux.GIDMappings) > 0):
		return fmt.Errorf("a user namespace needs maps of uids and gids, and they need one: %w", errdefs.ErrInvalidArgument)
	case !own[specs.MountNamespace]:
		return fmt.Errorf("pause has no mount namespace of its own: %w", errdefs.ErrInvalidArgument)
	case r.Spec.Hostname != "" && !own[specs.UTSNamespace]:
		return fmt.Errorf("the hostname %q would be the host's, pause has no UTS namespace of its own: %w", r.Spec.Hostname, errdefs.ErrInvalidArgument)
	case r.NetNS != nil && !own[specs.NetworkNamespace]:
		return fmt.Errorf("the specification names no network namespace to join: %w", errdefs.ErrInvalidArgument)
	default:
		return r.checkUser()
	}
}

// checkUser refuses ids that pause's user namespace doesn't map.
func (r StartRequest) checkUser() error {
	user := r.Spec.Process.User
	if !mapped(r.Spec.Linux.UIDMappings, user.UID) {
		return fmt.Errorf("the user %d isn't in the pod's user namespace: %w", user.UID, errdefs.ErrInvalidArgument)
	}
	for _, gid := range append([]uint32{user.GID}, user.AdditionalGids...) {
		if !mapped(r.Spec.Linux.GIDMappings, gid) {
			return fmt.Errorf("the group %d isn't in the pod's user namespace: %w", gid, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func mapped(mappings []specs.LinuxIDMapping, id uint32) bool {
	return len(mappings) == 0 || slices.ContainsFunc(mappings, func(m specs.LinuxIDMapping) bool {
		return id >= m.ContainerID && id-m.ContainerID < m.Size
	})
}

// instructions returns the specification for podfsm-init. Of the sysctls, podfsm-init sets those of the IPC
// namespace.
func instructions(spec *specs.Spec) (_ []byte, err error) {
	all, linux := *spec, *spec.Linux
	all.Linux = &linux
	linux.Seccomp, linux.Resources, all.Annotations = nil, nil, nil // most of the text; podfsm-init doesn't use them
	if linux.Sysctl, err = ipcSysctlsOf(spec); err != nil {
		return nil, err
	}
	return json.Marshal(all)
}

// initFD is podfsm-init's descriptor in the new process.
const initFD = 5

// clone makes the process that becomes pause, in its namespaces and its cgroup. The caller ends a process that is
// returned along with an error.
func (p *Processes) clone(r StartRequest, files []*os.File) (*process, error) {
	pidfd := -1
	attr := &os.ProcAttr{Dir: "/", Env: []string{}, Files: files, Sys: &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: cloneFlags(r.Spec.Linux.Namespaces),
		PidFD:      &pidfd,
	}}
	if len(r.Spec.Linux.UIDMappings) > 0 {
		attr.Sys.UidMappings = sysMappings(r.Spec.Linux.UIDMappings)
		attr.Sys.GidMappings = sysMappings(r.Spec.Linux.GIDMappings)
		attr.Sys.GidMappingsEnableSetgroups = true
		attr.Sys.Credential = &syscall.Credential{}
	}
	var child *process
	start := func(cgroupFD int) (int, error) {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = cgroupFD >= 0, max(cgroupFD, 0)
		started, err := os.StartProcess("/proc/self/fd/"+strconv.Itoa(initFD), []string{InitName, protocol}, attr)
		if err != nil {
			return 0, fmt.Errorf("failed to clone: %w", err)
		}
		held, err := host.FromPidfd(started.Pid, pidfd)
		if err != nil {
			_ = started.Kill()
			_, waitErr := started.Wait()
			return 0, errors.Join(err, waitErr)
		}
		child = &process{Process: held, child: true, done: make(chan struct{})}
		return held.Pid(), started.Release() // Release drops only os.Process; reapNow reaps the child
	}
	startIn := r.Cgroup.Start
	if len(r.Spec.Linux.UIDMappings) == 0 { // os.StartProcess returns once podfsm-init is executed, which then waits for instruct
		startIn = r.Cgroup.StartThenMove
	}
	err := startIn(func(cgroupFD int) (pid int, err error) {
		if r.NetNS == nil {
			return start(cgroupFD)
		}
		return pid, host.InNetNS(r.NetNS, func() error {
			pid, err = start(cgroupFD)
			return err
		})
	})
	return child, err
}

// maxReport bounds podfsm-init's report, in bytes.
const maxReport = 4 << 10

// instruct sends the mounts and the specification to podfsm-init, and waits until podfsm-init executes pause or
// fails.
func instruct(ctx context.Context, conn *net.UnixConn, mounts []*os.File, text []byte) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) }) // ends reads and writes
	defer stop()
	var fds []int
	for _, mount := range mounts {
		fds = append(fds, int(mount.Fd()))
	}
	_, _, writeErr := conn.WriteMsgUnix([]byte{0}, unix.UnixRights(fds...), nil) // EPIPE: podfsm-init failed before it read all
	if writeErr == nil {
		_, writeErr = conn.Write(text)
	}
	writeErr = errors.Join(writeErr, conn.CloseWrite())
	report, err := io.ReadAll(io.LimitReader(conn, maxReport))
	if errors.Is(err, unix.ECONNRESET) { // podfsm-init failed before it read all
		err = nil
	}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("failed to read the report of %s: %w", InitName, err)
	case len(report) == 0:
		return errSilent
	}
	if failure := bytes.Trim(report, "\x00"); len(failure) > 0 {
		return fmt.Errorf("%s: %s", InitName, failure)
	}
	return writeErr
}

var errSilent = errors.New(InitName + " ended before it executed pause, without a report")

// hint says what may have ended podfsm-init without a report.
func (e Exit) hint() string {
	switch {
	case e.Status == 128+uint32(unix.SIGKILL):
		return "the memory of the pod's cgroup may be exhausted"
	case e.Status == 2: // of the Go runtime
		return "the pids of the pod's cgroup may be exhausted"
	default:
		return "it may not be of the daemon's release"
	}
}

// cloneFlag has the clone(2) flags of the namespaces that pause can have. podfsm-init makes the cgroup namespace,
// once it is in its cgroup.
var cloneFlag = map[specs.LinuxNamespaceType]uintptr{
	specs.UserNamespace: unix.CLONE_NEWUSER, specs.MountNamespace: unix.CLONE_NEWNS, specs.PIDNamespace: unix.CLONE_NEWPID,
	specs.NetworkNamespace: unix.CLONE_NEWNET, specs.IPCNamespace: unix.CLONE_NEWIPC, specs.UTSNamespace: unix.CLONE_NEWUTS,
	specs.CgroupNamespace: 0,
}

// cloneFlags are the flags of the namespaces that clone makes. A namespace with a path is joined instead.
func cloneFlags(namespaces []specs.LinuxNamespace) (flags uintptr) {
	for _, namespace := range namespaces {
		if namespace.Path == "" {
			flags |= cloneFlag[namespace.Type]
		}
	}
	return flags
}

func sysMappings(mappings []specs.LinuxIDMapping) (all []syscall.SysProcIDMap) {
	for _, m := range mappings {
		all = append(all, syscall.SysProcIDMap{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size)})
	}
	return all
}

// discardTimeout bounds the wait for the end of a child that was killed before it executed pause.
const discardTimeout = 10 * time.Second

// discard kills a child that has not executed pause, and returns how it ended. A child that doesn't end in time is
// reaped in the background.
func (p *Processes) discard(ctx context.Context, child *process) (Exit, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), discardTimeout)
	defer cancel()
	killErr := child.Kill()
	if err := child.Wait(ctx); err != nil {
		p.late.Go(func() {
			defer child.Close()
			if child.Wait(p.open) == nil {
				child.reap(p.open)
			}
		})
		return Exit{}, fmt.Errorf("process %d was killed and has not ended: %w", child.Pid(), errors.Join(killErr, err))
	}
	status, known := child.lateStatus(p.open)
	if !known {
		p.late.Go(func() { child.reap(p.open) })
	}
	return Exit{Status: status, At: time.Now()}, child.Close()
}

func closeAll(files []*os.File) {
	for _, file := range files {
		file.Close()
	}
}
