package pause

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/host"
)

// Processes starts the pause processes of sandboxes, ends them, and reports their exits. It knows a process by its
// pidfd, which it holds from the clone on. After a restart, it compares the process behind a new pidfd with the
// process's [Record].
//
// Its methods are safe for concurrent use. Close it after the last call. The processes live on.
type Processes struct {
	init   *os.File // podfsm-init, see Load; nil before
	null   *os.File // see openNull
	exits  *exits
	exited func(key string, exit Exit)
	late   sync.WaitGroup     // exits that are not yet reported, and children that another process traces
	open   context.Context    // ends with Close
	cancel context.CancelFunc // ends open

	mu      sync.Mutex
	running map[string]*process // by key, until Forget

	close func() error // once
}

// process is one pause.
type process struct {
	*host.Process
	child bool          // of this daemon, which reaps it and gets its exit status
	done  chan struct{} // closed once exit is set
	exit  Exit

	killed atomic.Bool // by End
}

// Record is what a restart needs to find a pause again.
type Record struct {
	Pid       int    // in the daemon's pid namespace
	StartTime uint64 // in clock ticks since the boot, field 22 of proc_pid_stat(5)
	NetNS     uint64 // the inode of its network namespace, for [Processes.Adopt]; 0 if it is not on record
}

// Exit tells how pause ended. As in a shell, Status is 128 + the signal for a process that a signal ended.
type Exit struct {
	Status uint32
	At     time.Time
}

// UnknownStatus is the exit status if it is unknown. It is containerd's own choice.
const UnknownStatus = 255

// NewProcesses begins to watch for exits. It calls exited for each exit, with the key of [StartRequest]. Calls may be
// concurrent. While exited runs, no other exit may be noticed, and Close waits. Start needs a call of Load before.
func NewProcesses(exited func(key string, exit Exit)) (*Processes, error) {
	null, err := openNull()
	if err != nil {
		return nil, err
	}
	p := &Processes{null: null, exited: exited, running: map[string]*process{}}
	p.open, p.cancel = context.WithCancel(context.Background())
	if p.exits, err = watchExits(p.ended); err != nil {
		return nil, errors.Join(err, null.Close())
	}
	p.close = sync.OnceValue(p.closeAll)
	return p, nil
}

// Load reads podfsm-init. If it can't, it fails with FailedPrecondition and the remedy. Call it once, before the
// first Start.
//
// It keeps the program in memory and sealed. So no process of a pod can write to the file that the next pod starts
// from, and an upgrade of the package doesn't mix two releases.
func (p *Processes) Load(initPath string) error {
	program, err := loadInit(initPath)
	if err == nil {
		if err = checkProtocol(program); err != nil {
			program.Close()
		}
	}
	if err != nil {
		return fmt.Errorf("failed to load %q; install the %s of this release there, or set init_path in podfsm's section of containerd's configuration: %w: %w",
			initPath, InitName, err, errdefs.ErrFailedPrecondition)
	}
	p.init = program
	return nil
}

// openNull opens /dev/null through a read-only mount. A container that shares pause's pid namespace reaches pause's
// descriptors. It must not change the owner or the mode of the host's device through them.
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
	p.cancel()
	p.late.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	for key, process := range p.running {
		process.Close()
		delete(p.running, key)
	}
	if p.init == nil {
		return p.null.Close()
	}
	return errors.Join(p.init.Close(), p.null.Close())
}

// Adopt takes over a pause that an earlier daemon started, and reports its exit from now on. It returns false if that
// process has ended, or if another process has its pid. For a key that is known already, it returns true.
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

// matches says whether a process is the one on record.
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

// Process returns the pause of a sandbox that was started or adopted, also after its end. It fails with NotFound for an
// unknown key. Processes closes it.
func (p *Processes) Process(key string) (*host.Process, error) {
	process, ok := p.find(key)
	if !ok {
		return nil, fmt.Errorf("pause does not run: %w", errdefs.ErrNotFound)
	}
	return process.Process, nil
}

// End kills pause and waits for its end. For an unknown key, the exit status is [UnknownStatus].
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

// Forget drops a pause. If it runs, its exit is not reported any more, but a child is still reaped. It is idempotent.
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

func (p *Processes) find(key string) (*process, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	process, ok := p.running[key]
	return process, ok
}

// watch registers a process and watches for its exit.
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

func inUse(key string) error {
	return fmt.Errorf("there is a pause of %q: %w", key, errdefs.ErrAlreadyExists)
}

// ended handles the exit of a process. It doesn't wait, because meanwhile no other exit is noticed.
func (p *Processes) ended(key string, process *process) {
	at := time.Now()
	if status, ok := process.reapNow(); ok {
		p.tell(key, process, Exit{status, at})
		return
	}
	p.late.Go(func() {
		status, known := process.lateStatus(p.open)
		p.tell(key, process, Exit{status, at})
		if process.child && !known {
			process.reap(p.open)
		}
	})
}

// tell reports the exit of a process.
func (p *Processes) tell(key string, process *process, exit Exit) {
	process.exit = exit
	close(process.done)
	if known, ok := p.find(key); ok && known == process {
		p.exited(key, exit)
	} else {
		process.Close() // after Forget
	}
}

// reaperTimeout bounds the wait for a process that reaps another daemon's pause, or that traces a child.
const reaperTimeout = time.Second

// lateStatus returns the exit status of a process that has ended and that reapNow didn't reap. known is false if the
// kernel doesn't tell it within reaperTimeout.
func (c *process) lateStatus(ctx context.Context) (status uint32, known bool) {
	killed := c.killed.Load()
	if c.child {
		ctx, cancel := context.WithTimeout(ctx, reaperTimeout)
		defer cancel()
		if status, ok := c.reap(ctx); ok {
			return status, true
		}
	} else {
		if !killed {
			c.AwaitReaper(reaperTimeout)
		}
		if status, err := c.ExitStatus(); err == nil {
			return exitStatus(status), true
		}
	}
	if killed {
		return 128 + uint32(unix.SIGKILL), false
	}
	return UnknownStatus, false
}

// reap repeats reapNow until it succeeds or ctx ends.
func (c *process) reap(ctx context.Context) (status uint32, ok bool) {
	for wait := time.Millisecond; ; wait = min(2*wait, time.Second) {
		if status, ok := c.reapNow(); ok {
			return status, true
		}
		select {
		case <-ctx.Done():
			return UnknownStatus, false
		case <-time.After(wait):
		}
	}
}

// reapNow reaps a child that has ended, and returns its exit status. ok is false for the child of another process, and
// for a child that another process traces: the kernel hands out the child once its tracer has waited for it or ended.
func (c *process) reapNow() (status uint32, ok bool) {
	if !c.child {
		return UnknownStatus, false
	}
	var wait unix.WaitStatus
	// The child is a zombie, so its pid can't be another process's.
	switch pid, err := unix.Wait4(c.Pid(), &wait, unix.WNOHANG, nil); {
	case err != nil:
		return UnknownStatus, true // somebody else has reaped it
	case pid == 0:
		return UnknownStatus, false
	default:
		return exitStatus(wait), true
	}
}

func exitStatus(status unix.WaitStatus) uint32 {
	if status.Signaled() {
		return 128 + uint32(status.Signal())
	}
	return uint32(status.ExitStatus())
}
