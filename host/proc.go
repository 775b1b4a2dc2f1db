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
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// maxFile bounds a file of /proc/PID, in bytes. The longest is the status of a process with all
	// of its 65536 groups.
	maxFile = 1 << 20

	// maxReads bounds the reads under way, and so the threads of reads that hang.
	maxReads = 64

	// readTimeout bounds one read. A read that doesn't hang takes microseconds.
	readTimeout = time.Second
)

// Pids returns the pids of all processes in this pid namespace.
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

// Read returns the content of the file /proc/PID/name.
//
// A process in an uninterruptible sleep may hold the lock of its memory map forever. Reads of
// cmdline, environ, exe and maps then hang, each with a thread; stat, status, cgroup and the links
// of ns answer. So a read takes at most a second, however long ctx lasts. While a read hangs,
// others of the same file fail at once.
//
// Errors: InvalidArgument for a pid that isn't positive; NotFound if the process has ended;
// ResourceExhausted for more than 1 MiB; DeadlineExceeded or the cause of ctx's end if the read
// hangs; Unavailable if too many other reads hang.
func Read(ctx context.Context, pid int, name string) ([]byte, error) {
	return processes.read(ctx, pid, name, readFile)
}

// Readlink returns the target of the link /proc/PID/name, as [Read] does.
func Readlink(ctx context.Context, pid int, name string) (string, error) {
	target, err := processes.read(ctx, pid, name, func(path string) ([]byte, error) {
		target, err := os.Readlink(path)
		return []byte(target), err
	})
	return string(target), err
}

// Args returns the arguments of a process, at least one, from /proc/PID/cmdline, as [Read] does. The
// process can change what it shows.
func Args(ctx context.Context, pid int) ([]string, error) {
	line, err := Read(ctx, pid, "cmdline")
	if err != nil {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00"), nil
}

// Stat has the fields of a /proc/PID/stat.
type Stat struct {
	State     byte   // field 3; Z or X if the process has ended
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

// parseStat counts the fields from the end of field 2, the process's name, which may have any
// characters.
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
		err = fmt.Errorf("the file has more than %d bytes: %w", maxFile, errdefs.ErrResourceExhausted)
	}
	return data, err
}

// processes is the only reader of /proc, so that maxReads bounds the whole daemon.
var processes = newReader("/proc", readTimeout)

// reader reads files whose reads may hang. It is safe for concurrent use.
type reader struct {
	root    string
	timeout time.Duration
	slots   chan struct{} // of the reads under way

	mu      sync.Mutex
	reading map[string]underway // by path
}

// underway is a read that has not answered.
type underway struct {
	since time.Time
	done  chan struct{} // closed when it has answered
}

func newReader(root string, timeout time.Duration) *reader {
	return &reader{root: root, timeout: timeout, slots: make(chan struct{}, maxReads), reading: map[string]underway{}}
}

// read calls get with the path of a process's file. If get hangs, its goroutine outlives the call
// until the kernel answers.
func (r *reader) read(ctx context.Context, pid int, name string, get func(path string) ([]byte, error)) ([]byte, error) {
	if err := checkPid(pid); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	cause := fmt.Errorf("no answer within %s: process %d hangs in the kernel: %w", r.timeout, pid, context.DeadlineExceeded)
	ctx, cancel := context.WithTimeoutCause(ctx, r.timeout, cause)
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

// begin returns once no other read of the path is under way and a slot is free. The caller calls
// end once its read has answered.
func (r *reader) begin(ctx context.Context, path string) (end func(), err error) {
	mine := underway{time.Now(), make(chan struct{})}
	for {
		other, busy := r.claim(path, mine)
		if !busy {
			break
		}
		if hung := time.Since(other.since); hung > r.timeout {
			return nil, fmt.Errorf("an earlier read hangs in the kernel for %s: %w", hung.Round(time.Second), context.DeadlineExceeded)
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

// claim makes mine the read of a path, unless another is under way.
func (r *reader) claim(path string, mine underway) (other underway, busy bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if other, busy = r.reading[path]; !busy {
		r.reading[path] = mine
	}
	return other, busy
}
