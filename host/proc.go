package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// maxFile bounds a file of /proc/PID, in bytes. The longest that is read is status, of a process with all of its 65536 groups.
	maxFile = 1 << 20

	// maxReads bounds the reads under way. Only those that hang last, so it bounds the threads that hang with them.
	maxReads = 64

	// patience is how long one read may take. Those that don't hang take microseconds.
	patience = time.Second
)

// Pids are the host's processes now, as this pid namespace numbers them.
func Pids() ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("failed to list the host's processes: %w", err)
	}
	var pids []int
	for _, entry := range entries {
		if pid, err := strconv.Atoi(entry.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Read returns a file of /proc/PID, which name is relative to. A process in an uninterruptible sleep may hold its memory map's lock
// for good: cmdline, environ, exe and maps hang then, and so does a thread for each; stat, status, cgroup and the links of ns answer.
// So a read takes a second at most, however long ctx lasts; while one hangs, others of the same file are refused at once.
//
// Errors: InvalidArgument for a pid that isn't positive, NotFound when the process has ended, ResourceExhausted for more than 1 MiB,
// DeadlineExceeded or what ended ctx, naming the pid, when the read hangs, Unavailable when too many others do.
func Read(ctx context.Context, pid int, name string) ([]byte, error) {
	return processes.read(ctx, pid, name, readFile)
}

// Readlink returns where a link of /proc/PID leads, as [Read] does.
func Readlink(ctx context.Context, pid int, name string) (string, error) {
	target, err := processes.read(ctx, pid, name, func(path string) ([]byte, error) {
		target, err := os.Readlink(path)
		return []byte(target), err
	})
	return string(target), err
}

// Stat is what is read of a /proc/PID/stat.
type Stat struct {
	State     byte   // field 3: Z and X have ended
	StartTime uint64 // field 22, in clock ticks since the boot
}

// ReadStat reads a /proc/PID/stat (proc_pid_stat(5)), as [Read] does.
func ReadStat(ctx context.Context, pid int) (Stat, error) {
	data, err := Read(ctx, pid, "stat")
	if err != nil {
		return Stat{}, err
	}
	stat, err := parseStat(data)
	if err != nil {
		return Stat{}, fmt.Errorf("failed to read the stat file of process %d: %w", pid, err)
	}
	return stat, nil
}

// parseStat counts the fields from the end of the process's name, field 2, which may hold anything.
func parseStat(data []byte) (Stat, error) {
	fields := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	if len(fields) < 20 || len(fields[0]) != 1 {
		return Stat{}, fmt.Errorf("%q has too few fields: %w", data, errdefs.ErrDataLoss)
	}
	start, err := strconv.ParseUint(string(fields[19]), 10, 64)
	if err != nil {
		return Stat{}, fmt.Errorf("invalid start time: %w: %w", err, errdefs.ErrDataLoss)
	}
	return Stat{State: fields[0][0], StartTime: start}, nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("it has more than %d bytes: %w", maxFile, errdefs.ErrResourceExhausted)
	}
	return data, err
}

// processes is the one reader of /proc, so that what hangs is bounded for the whole daemon.
var processes = newReader("/proc", patience)

// reader reads files that may hang. It is safe for concurrent use.
type reader struct {
	root     string
	patience time.Duration
	slots    chan struct{} // of the reads under way

	mu      sync.Mutex
	reading map[string]underway // by path
}

// underway is a read that has not answered.
type underway struct {
	since time.Time
	done  chan struct{} // closed when it has answered
}

func newReader(root string, patience time.Duration) *reader {
	return &reader{root: root, patience: patience, slots: make(chan struct{}, maxReads), reading: map[string]underway{}}
}

// read has get read a file of a process. The goroutine that does outlives the call when get hangs, and ends when the kernel answers.
func (r *reader) read(ctx context.Context, pid int, name string, get func(path string) ([]byte, error)) ([]byte, error) {
	if err := checkPid(pid); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	cause := fmt.Errorf("no answer within %s: process %d hangs in the kernel: %w", r.patience, pid, context.DeadlineExceeded)
	ctx, cancel := context.WithTimeoutCause(ctx, r.patience, cause)
	defer cancel()

	path := filepath.Join(r.root, strconv.Itoa(pid), name)
	end, err := r.begin(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("failed to read %q of process %d: %w", name, pid, err)
	}
	var data []byte
	answered := make(chan error, 1)
	go func() {
		var err error
		data, err = get(path)
		end()
		answered <- err
	}()
	select {
	case err = <-answered:
	case <-ctx.Done():
		return nil, fmt.Errorf("failed to read %q of process %d: %w", name, pid, context.Cause(ctx))
	}
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH):
		return nil, ended(pid)
	case err != nil:
		return nil, fmt.Errorf("failed to read %q of process %d: %w", name, pid, err)
	}
	return data, nil
}

// begin returns once no other read of the path is under way and a slot is free, and how to tell that this one has answered.
func (r *reader) begin(ctx context.Context, path string) (end func(), err error) {
	mine := underway{time.Now(), make(chan struct{})}
	for {
		other, busy := r.claim(path, mine)
		if !busy {
			break
		}
		if hung := time.Since(other.since); hung > r.patience {
			return nil, fmt.Errorf("a read of it hangs in the kernel for %s: %w", hung.Round(time.Second), context.DeadlineExceeded)
		}
		select {
		case <-other.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	release := func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.reading, path)
		close(mine.done)
	}
	select {
	case r.slots <- struct{}{}:
		return func() { <-r.slots; release() }, nil
	case <-ctx.Done():
		release()
		return nil, fmt.Errorf("%d reads of processes hang in the kernel: %w", maxReads, errdefs.ErrUnavailable)
	}
}

// claim makes mine the read of a path, unless there is another.
func (r *reader) claim(path string, mine underway) (other underway, busy bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if other, busy = r.reading[path]; !busy {
		r.reading[path] = mine
	}
	return other, busy
}
