package pause

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
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
	init   *os.File // podfsm-init, sealed
	null   *os.File
	exits  *exits
	exited func(key string, exit Exit)

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
}

// Record is what has to be on record of a pause, to find it again after a restart.
type Record struct {
	Pid       int    // in the daemon's pid namespace
	StartTime uint64 // in clock ticks since the boot, field 22 of proc_pid_stat(5)
}

// Exit tells how pause ended. Status follows the shell's convention: 128 + the signal for a process that a signal has ended.
type Exit struct {
	Status uint32
	At     time.Time
}

// UnknownStatus is the exit status where nobody knows it any more, containerd's own choice.
const UnknownStatus = 255

// NewProcesses reads podfsm-init, and begins to watch for exits, of which it tells exited, one after the other; the key is that of
// [StartRequest]. A failure to find the program is a FailedPrecondition error with the remedy.
//
// The program is kept in memory and sealed: no process of a pod can write to the file that the next pod starts from, and an upgrade
// of the package does not mix two releases.
func NewProcesses(initPath string, exited func(key string, exit Exit)) (*Processes, error) {
	program, err := sealed(initPath)
	if err != nil {
		return nil, fmt.Errorf("failed to load %q: %w: %w", initPath, err, errdefs.ErrFailedPrecondition)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
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

// highDescriptor is above the descriptors that a process is started with, which would take its place otherwise.
const highDescriptor = 100

// sealed copies a program into memory that nobody can change any more (memfd_create(2), fcntl_sealing).
func sealed(path string) (*os.File, error) {
	source, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer source.Close()
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate(InitName, flags|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate(InitName, flags) // Linux before 6.3
	}
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), InitName)
	defer file.Close()
	if _, err := io.Copy(file, source); err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE); err != nil {
		return nil, err
	}
	// A file that is open for writing can't be executed (ETXTBSY), so it is opened anew.
	readable, err := os.Open(fdPath(file))
	if err != nil {
		return nil, err
	}
	defer readable.Close()
	high, err := unix.FcntlInt(readable.Fd(), unix.F_DUPFD_CLOEXEC, highDescriptor)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(high), InitName), nil
}

func fdPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// Close stops watching for exits. It is idempotent.
func (p *Processes) Close() error { return p.close() }

func (p *Processes) closeAll() error {
	p.exits.close()
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

	// Rootfs is the root filesystem, see [MountRootfs].
	Rootfs *os.File

	// Seccomp is a seccomp filter from [SeccompFilter].
	Seccomp *os.File

	// NetNS is a network namespace that the process joins; nil where the specification has a new one made, or none.
	NetNS *os.File

	// Cgroup is where the process is born.
	Cgroup *host.PodCgroup
}

// Start starts pause and returns when its program is executed. On an error nothing of it runs any more; the cgroup may be left.
//
// What podfsm-init has failed at is in the error's text. A ctx that ends kills the process and is the error.
func (p *Processes) Start(ctx context.Context, r StartRequest) (Record, error) {
	record, err := p.start(ctx, r)
	if err != nil {
		return Record{}, fmt.Errorf("failed to start pause: %w", err)
	}
	return record, nil
}

func (p *Processes) start(ctx context.Context, r StartRequest) (_ Record, err error) {
	text, err := json.Marshal(r.Spec)
	if err != nil {
		return Record{}, err
	}
	binds, err := openBinds(r.Spec.Mounts)
	defer closeAll(binds)
	if err != nil {
		return Record{}, err
	}
	specIn, specOut, err := os.Pipe()
	if err != nil {
		return Record{}, err
	}
	defer closeAll([]*os.File{specIn, specOut})
	reportIn, reportOut, err := os.Pipe()
	if err != nil {
		return Record{}, err
	}
	defer closeAll([]*os.File{reportIn, reportOut})

	child, err := p.clone(r, append([]*os.File{p.null, p.null, p.null, specIn, reportOut, r.Rootfs, r.Seccomp}, binds...))
	if err != nil {
		if child != nil {
			child.reap(ctx)
		}
		return Record{}, err
	}
	defer func() {
		if err != nil {
			child.reap(ctx)
		}
	}()
	closeAll([]*os.File{specIn, reportOut})
	record := Record{Pid: child.Pid()}
	if record.StartTime, err = child.StartTime(ctx); err != nil {
		return Record{}, err
	}
	if score := r.Spec.Process.OOMScoreAdj; score != nil {
		// It waits for the specification, and is our child that nobody has reaped, so the pid is its own.
		file := fmt.Sprintf("/proc/%d/oom_score_adj", record.Pid)
		if err := os.WriteFile(file, []byte(strconv.Itoa(*score)), 0); err != nil {
			return Record{}, fmt.Errorf("failed to set the OOM score adjustment to %d; set restrict_oom_score_adj where the daemon lacks CAP_SYS_RESOURCE: %w", *score, err)
		}
	}
	if err := instruct(ctx, specOut, text, reportIn); err != nil {
		return Record{}, err
	}
	return record, p.watch(r.Key, child)
}

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
		started, err := os.StartProcess(fdPath(p.init), []string{InitName, protocol}, attr)
		if err != nil {
			return 0, fmt.Errorf("failed to clone: %w", err)
		}
		pid := started.Pid
		if err := started.Release(); err != nil { // it is reaped by its exit, see ended
			return 0, err
		}
		held, err := host.FromPidfd(pid, pidfd)
		if err != nil {
			return 0, err
		}
		child = &process{Process: held, child: true, done: make(chan struct{})}
		return pid, nil
	}
	err := r.Cgroup.Start(func(cgroupFD int) (pid int, err error) {
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

// instruct sends the specification, and waits until pause is executed or what becomes pause has failed.
func instruct(ctx context.Context, specOut *os.File, text []byte, reportIn *os.File) error {
	past := time.Unix(1, 0) // ends what waits
	stop := context.AfterFunc(ctx, func() { _, _ = specOut.SetWriteDeadline(past), reportIn.SetReadDeadline(past) })
	defer stop()
	_, writeErr := specOut.Write(text) // EPIPE: it has failed before it has read all
	writeErr = errors.Join(writeErr, specOut.Close())
	report, err := io.ReadAll(io.LimitReader(reportIn, maxReport))
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case len(report) > 0:
		return fmt.Errorf("%s: %s", InitName, bytes.TrimSpace(report))
	default:
		return errors.Join(writeErr, err)
	}
}

// cloneFlags are those of the namespaces that are made with the process. The cgroup namespace is made when it is in its cgroup, and
// one with a path is joined.
func cloneFlags(namespaces []specs.LinuxNamespace) (flags uintptr) {
	of := map[specs.LinuxNamespaceType]uintptr{
		specs.UserNamespace: unix.CLONE_NEWUSER, specs.MountNamespace: unix.CLONE_NEWNS, specs.PIDNamespace: unix.CLONE_NEWPID,
		specs.NetworkNamespace: unix.CLONE_NEWNET, specs.IPCNamespace: unix.CLONE_NEWIPC, specs.UTSNamespace: unix.CLONE_NEWUTS,
	}
	for _, namespace := range namespaces {
		if namespace.Path == "" {
			flags |= of[namespace.Type]
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

// reap ends a child that has not become pause.
func (c *process) reap(ctx context.Context) {
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reapTimeout)
	defer cancel()
	if c.Kill() == nil && c.Wait(ctx) == nil {
		c.collect()
	}
}

// watch has the process's exit noticed.
func (p *Processes) watch(key string, process *process) error {
	p.mu.Lock()
	p.running[key] = process
	p.mu.Unlock()
	if err := p.exits.add(key, process); err != nil {
		p.Forget(key)
		return fmt.Errorf("failed to watch for the exit of pause: %w", err)
	}
	return nil
}

// ended is told of an exit.
func (p *Processes) ended(key string, process *process) {
	process.exit = process.collect()
	close(process.done)
	p.exited(key, process.exit)
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
// ended, or another one has its pid. It is idempotent.
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
	started, err := held.StartTime(ctx)
	switch {
	case err == nil && started == record.StartTime && held.Alive():
		return true, p.watch(key, &process{Process: held, done: make(chan struct{})})
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

// Forget lets go of a pause; if it runs, nobody is told of its exit any more. It is idempotent.
func (p *Processes) Forget(key string) {
	p.mu.Lock()
	process, ok := p.running[key]
	delete(p.running, key)
	p.mu.Unlock()
	if ok {
		process.Close() // which takes it out of the watch, epoll(7)
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
	cmd := exec.CommandContext(ctx, initPath, "--version")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		// Nothing is mapped to the ids that it runs under, so it needs none.
	}
	out, err := cmd.Output()
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return "", fmt.Errorf("failed to run %q in namespaces of its own: %w", initPath, err)
	}
	version = strings.TrimSpace(string(out))
	if !strings.HasSuffix(version, " protocol "+protocol) {
		return "", fmt.Errorf("%q is %q, the daemon needs protocol %s: %w", initPath, version, protocol, errdefs.ErrFailedPrecondition)
	}
	return version, nil
}
