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
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/host"
)

const (
	// InitName is the file name of the program that becomes pause.
	InitName = "podfsm-init"

	// protocol is the version of podfsm-init's arguments and descriptors that this package speaks.
	protocol = "1"

	// maxReport bounds what is read of podfsm-init's report, in bytes.
	maxReport = 4 << 10
)

// Processes starts the pause processes of sandboxes, ends them, and tells when one has ended. A process is known by its pidfd, which is
// held from its birth or, after a restart, compared with what is on record of the process.
//
// Its methods are safe for concurrent use. Close it when nothing calls it any more; the processes live on.
type Processes struct {
	init   *os.File // podfsm-init, see sealed
	null   *os.File // see openNull
	exits  *exits
	exited func(key string, exit Exit)
	late   sync.WaitGroup // exits that nobody has been told of yet

	mu      sync.Mutex
	running map[string]*process // by key, until it is forgotten

	close func() error // once
}

// process is one pause.
type process struct {
	*host.Process
	child bool          // of this daemon, so there is an exit status to collect, and a zombie until that is done
	done  chan struct{} // closed once exit is set
	exit  Exit

	killed atomic.Bool // by us
}

// Record is what has to be on record of a pause, to find it again after a restart.
type Record struct {
	Pid       int    // in the daemon's pid namespace
	StartTime uint64 // in clock ticks since the boot, field 22 of proc_pid_stat(5)
	NetNS     uint64 // the inode of its network namespace, for [Processes.Adopt]; 0 when nobody has noted it
}

// matches says whether the process that is held is the one on record.
func (r Record) matches(ctx context.Context, held *host.Process) (bool, error) {
	started, err := held.StartTime(ctx)
	if err != nil || started != r.StartTime {
		return false, err
	}
	if r.NetNS != 0 {
		netns, err := host.Readlink(ctx, held.Pid(), "ns/net")
		if err != nil || netns != fmt.Sprintf("net:[%d]", r.NetNS) {
			return false, err
		}
	}
	return held.Alive(), nil
}

// Exit tells how pause ended. Status follows the shell's convention: 128 + the signal for a process that a signal has ended.
type Exit struct {
	Status uint32
	At     time.Time
}

// UnknownStatus is the exit status where nobody knows it any more, containerd's own choice.
const UnknownStatus = 255

// NewProcesses reads podfsm-init, and begins to watch for exits, of which it tells exited, one after the other; the key is that of
// [StartRequest]. While exited runs no other exit is noticed, and Close waits for it. A failure to read the program is a
// FailedPrecondition error with the remedy.
//
// The program is kept in memory and sealed: no process of a pod can write to the file that the next pod starts from, and an upgrade
// of the package does not mix two releases.
func NewProcesses(initPath string, exited func(key string, exit Exit)) (*Processes, error) {
	program, err := loadInit(initPath)
	if err == nil {
		if err = checkProtocol(program); err != nil {
			program.Close()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("failed to load %q; install the %s of this release there, or set init_path in podfsm's section of containerd's configuration: %w: %w",
			initPath, InitName, err, errdefs.ErrFailedPrecondition)
	}
	null, err := openNull()
	if err != nil {
		return nil, errors.Join(err, program.Close())
	}
	p := &Processes{init: program, null: null, exited: exited, running: map[string]*process{}}
	if p.exits, err = watchExits(p.ended); err != nil {
		return nil, errors.Join(err, program.Close(), null.Close())
	}
	p.close = sync.OnceValue(p.closeAll)
	return p, nil
}

// FindInit returns the path of podfsm-init as containerd finds a shim: beside the executable of the daemon, then in PATH. Without one
// it is a NotFound error with the remedy.
func FindInit() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("failed to find %s: %w", InitName, err)
	}
	beside := filepath.Join(filepath.Dir(self), InitName)
	if _, err := os.Stat(beside); err == nil {
		return beside, nil
	}
	inPath, err := exec.LookPath(InitName)
	if err != nil {
		return "", fmt.Errorf("there is no %s beside %q nor in PATH; install the one of this release there, or set init_path in podfsm's section of containerd's configuration: %w",
			InitName, self, errdefs.ErrNotFound)
	}
	return inPath, nil
}

func loadInit(path string) (*os.File, error) {
	source, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer source.Close()
	return sealed(InitName, source)
}

// versionTimeout is how long podfsm-init may take to tell its version, which takes a few milliseconds.
const versionTimeout = 10 * time.Second

// checkProtocol refuses a podfsm-init of another release, before a pod is started with it.
func checkProtocol(program *os.File) error {
	ctx, cancel := context.WithTimeout(context.Background(), versionTimeout)
	defer cancel()
	_, err := versionOf(ctx, program, nil)
	return err
}

// versionOf asks a podfsm-init what it is. It is executed by its descriptor: the path to it may be closed to the ids of a user namespace.
func versionOf(ctx context.Context, program *os.File, attr *syscall.SysProcAttr) (string, error) {
	cmd := exec.CommandContext(ctx, "/proc/self/fd/3", "--version")
	cmd.ExtraFiles, cmd.SysProcAttr = []*os.File{program}, attr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("failed to ask for its version: %w", err)
	}
	version := strings.TrimSpace(string(out))
	if !strings.HasSuffix(version, " protocol "+protocol) {
		return "", fmt.Errorf("it is %.100q, which is not of this release: the protocol is not %s: %w", version, protocol, errdefs.ErrFailedPrecondition)
	}
	return version, nil
}

// sealed copies a file into memory that nobody can change any more, whoever gets hold of a descriptor (memfd_create(2),
// fcntl_sealing).
func sealed(name string, source io.Reader) (*os.File, error) {
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate(name, flags|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate(name, flags) // Linux before 6.3
	}
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), name)
	defer file.Close()
	if _, err := io.Copy(file, source); err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE); err != nil {
		return nil, err
	}
	return os.Open(fdPath(file)) // what is open for writing can't be executed (ETXTBSY)
}

// openNull opens /dev/null by a mount that is read-only. A container that shares pause's pid namespace reaches pause's descriptors, and
// must not change the owner or the mode of the host's device by them.
func openNull() (*os.File, error) {
	mount, err := detached(os.DevNull, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return nil, err
	}
	defer mount.Close()
	return os.OpenFile(fdPath(mount), os.O_RDWR, 0)
}

func fdPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// Close stops watching for exits. It is idempotent.
func (p *Processes) Close() error { return p.close() }

func (p *Processes) closeAll() error {
	p.exits.close()
	p.late.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	for key, process := range p.running {
		process.Close()
		delete(p.running, key)
	}
	return errors.Join(p.init.Close(), p.null.Close())
}

// StartRequest is what a pause process is started with.
type StartRequest struct {
	// Key names the process among all others.
	Key string

	// Spec is the OCI runtime specification, complete. Its mounts are a tmpfs and binds.
	Spec *specs.Spec

	// Rootfs mounts the root filesystem, see [Files.MountRootfs], in the user namespace that pause was cloned in; nil for the host's.
	Rootfs func(userns *os.File) (*os.File, error)

	// Seccomp is a seccomp filter from [SeccompFilter].
	Seccomp *os.File

	// NetNS is a network namespace that the process joins; nil where the specification has a new one made, or none.
	NetNS *os.File

	// Cgroup is where the process is born.
	Cgroup *host.PodCgroup
}

// Start starts pause and returns when its program is executed. On an error nothing of it runs any more; the cgroup may be left.
//
// Errors: AlreadyExists for a key that is in use, InvalidArgument for a specification that this package can't fulfil. What
// podfsm-init has failed at is in the error's text. A ctx that ends kills the process and is the error.
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
			exit, reapErr := child.reap(ctx)
			if errors.Is(err, errSilent) {
				err = fmt.Errorf("%w; it ended with status %d: %s", err, exit.Status, exit.hint())
			}
			err = errors.Join(err, reapErr)
		}
	}()
	if err != nil {
		return Record{}, err
	}
	record := Record{Pid: child.Pid()}
	if record.StartTime, err = child.StartTime(ctx); err != nil {
		return Record{}, err
	}
	// It waits for the specification, and is our child that nobody has reaped, so until then its pid is its own.
	if score := r.Spec.Process.OOMScoreAdj; score != nil {
		file := fmt.Sprintf("/proc/%d/oom_score_adj", record.Pid)
		if err := os.WriteFile(file, []byte(strconv.Itoa(*score)), 0); err != nil {
			return Record{}, fmt.Errorf("failed to set the OOM score adjustment to %d; set restrict_oom_score_adj where the daemon lacks CAP_SYS_RESOURCE: %w", *score, err)
		}
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

// mounts are what podfsm-init attaches: the root filesystem, and the sources of the bind mounts. On an error it returns those that it
// has opened, too.
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

// socketPair returns the daemon's end of a connection with podfsm-init, and the other one.
func socketPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "daemon"), os.NewFile(uintptr(fds[1]), InitName)
	defer ours.Close() // net.FileConn has one of its own
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn.(*net.UnixConn), theirs, nil
}

func inUse(key string) error {
	return fmt.Errorf("there is a pause of %q: %w", key, errdefs.ErrAlreadyExists)
}

// check refuses what would have pause in a namespace of the host's where the specification asks for another, or change the host's.
func (r StartRequest) check() error {
	own := map[specs.LinuxNamespaceType]bool{}
	for _, namespace := range r.Spec.Linux.Namespaces {
		_, known := cloneFlag[namespace.Type]
		joined := namespace.Type == specs.NetworkNamespace && r.NetNS != nil
		if !known || (namespace.Path != "") != joined {
			return fmt.Errorf("the %s namespace with the path %q can't be given to pause: %w", namespace.Type, namespace.Path, errdefs.ErrInvalidArgument)
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

// instructions are the specification for podfsm-init, of whose sysctls it sets those of the IPC namespace.
func instructions(spec *specs.Spec) (_ []byte, err error) {
	all, linux := *spec, *spec.Linux
	all.Linux = &linux
	linux.Seccomp, linux.Resources, all.Annotations = nil, nil, nil // which make most of the text, and are none of podfsm-init's business
	if linux.Sysctl, err = ipcSysctlsOf(spec); err != nil {
		return nil, err
	}
	return json.Marshal(all)
}

// initFD is podfsm-init's own descriptor.
const initFD = 5

// clone makes the process that becomes pause, in its namespaces and its cgroup. With an error it may return a process, too, to be
// ended.
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
		return held.Pid(), started.Release() // it is reaped by its exit, see ended; what is released has no pid any more
	}
	startIn := r.Cgroup.Start
	if len(r.Spec.Linux.UIDMappings) == 0 { // then os.StartProcess waits until podfsm-init is executed, which then waits for us
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

// instruct sends the mounts and the specification, and waits until pause is executed or what becomes pause has failed.
func instruct(ctx context.Context, conn *net.UnixConn, mounts []*os.File, text []byte) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) }) // which ends what waits
	defer stop()
	var fds []int
	for _, mount := range mounts {
		fds = append(fds, int(mount.Fd()))
	}
	_, _, writeErr := conn.WriteMsgUnix([]byte{0}, unix.UnixRights(fds...), nil) // EPIPE: it has failed before it has read all
	if writeErr == nil {
		_, writeErr = conn.Write(text)
	}
	writeErr = errors.Join(writeErr, conn.CloseWrite())
	report, err := io.ReadAll(io.LimitReader(conn, maxReport))
	if errors.Is(err, unix.ECONNRESET) { // it has failed before it has read all
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

var errSilent = errors.New(InitName + " ended before it executed pause, and has reported nothing")

// hint is what may have ended podfsm-init without a report.
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

// cloneFlag are the flags of the namespaces that pause can have. The cgroup namespace is made when it is in its cgroup.
var cloneFlag = map[specs.LinuxNamespaceType]uintptr{
	specs.UserNamespace: unix.CLONE_NEWUSER, specs.MountNamespace: unix.CLONE_NEWNS, specs.PIDNamespace: unix.CLONE_NEWPID,
	specs.NetworkNamespace: unix.CLONE_NEWNET, specs.IPCNamespace: unix.CLONE_NEWIPC, specs.UTSNamespace: unix.CLONE_NEWUTS,
	specs.CgroupNamespace: 0,
}

// cloneFlags are those of the namespaces that are made with the process. One with a path is joined.
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

// reapTimeout bounds the wait for the end of a process that was killed before it was pause.
const reapTimeout = 10 * time.Second

// reap ends a child that has not become pause, and says how it ended. One that doesn't end in time is reaped when it does.
func (c *process) reap(ctx context.Context) (Exit, error) {
	wait := func(ctx context.Context) (Exit, error) {
		if err := c.Wait(ctx); err != nil {
			return Exit{}, err
		}
		return c.collect(), c.Close()
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reapTimeout)
	defer cancel()
	killErr := c.Kill()
	exit, err := wait(ctx)
	if err != nil {
		go func() { _, _ = wait(context.Background()) }()
		return Exit{}, fmt.Errorf("process %d was killed and has not ended: %w", c.Pid(), errors.Join(killErr, err))
	}
	return exit, nil
}

// watch has the process's exit noticed.
func (p *Processes) watch(key string, process *process) error {
	p.mu.Lock()
	_, taken := p.running[key]
	if !taken {
		p.running[key] = process
	}
	p.mu.Unlock()
	if taken {
		return inUse(key)
	}
	if err := p.exits.add(key, process); err != nil {
		p.mu.Lock()
		delete(p.running, key)
		p.mu.Unlock()
		return fmt.Errorf("failed to watch for the exit of pause: %w", err)
	}
	return nil
}

// ended is told of an exit.
func (p *Processes) ended(key string, process *process) {
	if process.child || process.killed.Load() {
		p.tell(key, process)
		return
	}
	p.late.Go(func() {
		process.AwaitReaper(reaperTimeout)
		p.tell(key, process)
	})
}

// reaperTimeout bounds the wait for the parent of a process that has ended.
const reaperTimeout = time.Second

// tell collects how a process has ended.
func (p *Processes) tell(key string, process *process) {
	process.exit = process.collect()
	close(process.done)
	if known, ok := p.find(key); ok && known == process {
		p.exited(key, process.exit)
	} else {
		process.Close() // it was forgotten
	}
}

// collect reaps a child that has ended, and says how it ended as far as the kernel tells.
func (c *process) collect() Exit {
	exit := Exit{Status: UnknownStatus, At: time.Now()}
	if c.child {
		var status unix.WaitStatus
		for {
			// It is a zombie until now, so the pid is its own.
			_, err := unix.Wait4(c.Pid(), &status, 0, nil)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err == nil {
				exit.Status = exitStatus(status)
			}
			return exit
		}
	}
	if status, err := c.ExitStatus(); err == nil {
		exit.Status = exitStatus(status)
	} else if c.killed.Load() {
		exit.Status = 128 + uint32(unix.SIGKILL)
	}
	return exit
}

func exitStatus(status unix.WaitStatus) uint32 {
	if status.Signaled() {
		return 128 + uint32(status.Signal())
	}
	return uint32(status.ExitStatus())
}

// Adopt takes over a pause that an earlier daemon has started: its exit is noticed from now on. It returns false when that process has
// ended, or another one has its pid. One that is known already is true, and its exit is told in any case.
func (p *Processes) Adopt(ctx context.Context, key string, record Record) (bool, error) {
	if _, ok := p.find(key); ok {
		return true, nil
	}
	held, err := host.Open(record.Pid)
	if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("failed to find pause: %w", err)
	}
	same, err := record.matches(ctx, held)
	switch {
	case same:
		err := p.watch(key, &process{Process: held, done: make(chan struct{})})
		if err != nil {
			err = errors.Join(err, held.Close())
		}
		return err == nil, err
	case err == nil || errdefs.IsNotFound(err):
		return false, held.Close()
	default:
		return false, errors.Join(fmt.Errorf("failed to find pause: %w", err), held.Close())
	}
}

func (p *Processes) find(key string) (*process, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	process, ok := p.running[key]
	return process, ok
}

// Process is the pause of a sandbox that was started or adopted, ended or not; a NotFound error where there is none. It is the
// Processes' to close.
func (p *Processes) Process(key string) (*host.Process, error) {
	process, ok := p.find(key)
	if !ok {
		return nil, fmt.Errorf("pause does not run: %w", errdefs.ErrNotFound)
	}
	return process.Process, nil
}

// End kills pause and waits for its end. Of one that is unknown it says that nobody knows how it ended.
func (p *Processes) End(ctx context.Context, key string) (Exit, error) {
	process, ok := p.find(key)
	if !ok {
		return Exit{Status: UnknownStatus, At: time.Now()}, nil
	}
	process.killed.Store(true)
	if err := process.Kill(); err != nil {
		return Exit{}, fmt.Errorf("failed to kill pause: %w", err)
	}
	select {
	case <-process.done:
		return process.exit, nil
	case <-ctx.Done():
		return Exit{}, fmt.Errorf("pause, process %d, was killed and has not ended: %w", process.Pid(), context.Cause(ctx))
	}
}

// Forget lets go of a pause. If it runs, nobody is told of its exit any more, but a child is reaped all the same. It is idempotent.
func (p *Processes) Forget(key string) {
	p.mu.Lock()
	process, ok := p.running[key]
	delete(p.running, key)
	p.mu.Unlock()
	if !ok {
		return
	}
	select {
	case <-process.done:
		process.Close()
	default: // its exit closes it
	}
}

func closeAll(files []*os.File) {
	for _, file := range files {
		file.Close() // a second time, too
	}
}

// Examine runs podfsm-init once, in new namespaces of every kind as a pause is, and returns what it says of itself. It changes nothing.
//
// Errors: NotFound for a program that isn't there, FailedPrecondition for one of another release; those of clone(2).
func Examine(ctx context.Context, initPath string) (version string, err error) {
	program, err := loadInit(initPath)
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return "", err
	}
	defer program.Close()
	version, err = versionOf(ctx, program, &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		// Nothing is mapped to the ids that it runs under, so it needs none.
	})
	if err != nil {
		return "", fmt.Errorf("failed to run %q in namespaces of its own: %w", initPath, err)
	}
	return version, nil
}
