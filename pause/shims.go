package pause

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/shim"
	"golang.org/x/sys/unix"
)

const (
	// shimGrace is how long a shim that nobody knows has to end by itself.
	shimGrace = 2 * time.Second

	// starterGrace is how long the start of a shim may take on a busy machine.
	starterGrace = 10 * time.Second

	// shimPoll is how often a wait for a shim looks at its context.
	shimPoll = 100 * time.Millisecond
)

// endShims ends the shims of a sandbox that containerd doesn't know of, and
// removes their sockets. A containerd that was killed between a shim's start and
// its own note of it leaves such a shim, which has no task and never ends; it is
// known by the arguments that every shim built on containerd's pkg/shim has.
func endShims(ctx context.Context, namespace, id string) error {
	if err := awaitStarter(ctx, namespace, id); err != nil {
		return err
	}
	shims, err := shimsOf(namespace, id)
	if err != nil {
		return err
	}
	for _, pid := range shims {
		if err := endShim(ctx, pid); err != nil {
			return fmt.Errorf("failed to end shim %d of sandbox %q: %w", pid, id, err)
		}
	}
	return nil
}

// awaitStarter lets the process end that starts a shim, "shim start", which
// outlives a containerd that was killed. Ended half-way it would leave the
// socket that it has made, and the shim would come after it was looked for.
func awaitStarter(ctx context.Context, namespace, id string) error {
	all, err := allShims()
	if err != nil {
		return fmt.Errorf("failed to look for shims of sandbox %q: %w", id, err)
	}
	patient, cancel := context.WithTimeout(ctx, starterGrace)
	defer cancel()
	for _, shim := range all {
		if shim.Namespace != namespace || shim.ID != id || !shim.starter {
			continue
		}
		pidfd, err := unix.PidfdOpen(shim.Pid, 0)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return err
		}
		err = waitForEnd(patient, pidfd)
		unix.Close(pidfd)
		if err != nil && patient.Err() == nil {
			return err
		}
	}
	return ctx.Err()
}

// Sockets says where the shims of a containerd listen.
type Sockets struct {
	Dir     string // the shim manager's socket_dir; "" when it isn't known
	Address string // of containerd's gRPC server
}

// removeSockets removes the sockets of a sandbox's shim, which has ended. A shim
// that was killed, or that ended before it was up, leaves them.
func (c *Containers) removeSockets(ctx context.Context, id string) error {
	if c.sockets.Dir == "" {
		return nil
	}
	for _, debug := range []bool{false, true} {
		address, err := shim.CreateSocketAddress(ctx, c.sockets.Dir, c.sockets.Address, id, debug)
		if err != nil {
			return err
		}
		err = os.Remove(strings.TrimPrefix(address, "unix://"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("failed to remove a socket of the shim of sandbox %q: %w", id, err)
		}
	}
	return nil
}

func shimsOf(namespace, id string) ([]int, error) {
	all, err := allShims()
	if err != nil {
		return nil, fmt.Errorf("failed to look for shims of sandbox %q: %w", id, err)
	}
	var shims []int
	for _, shim := range all {
		if shim.Namespace == namespace && shim.ID == id {
			shims = append(shims, shim.Pid)
		}
	}
	return shims, nil
}

// Shim is a process of a shim, of a sandbox or of a container.
type Shim struct {
	Pid           int
	Namespace, ID string

	starter bool // it starts the shim, and ends then
}

// Shims returns the shims that work in a containerd's directory of bundles.
// Those of a containerd with a root directory of its own, where the same paths
// are others, are left out.
func Shims(bundles string) ([]Shim, error) {
	all, err := allShims()
	if err != nil {
		return nil, fmt.Errorf("failed to look for shims: %w", err)
	}
	root, err := os.Stat("/")
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(shim Shim) bool {
		dir := filepath.Join("/proc", strconv.Itoa(shim.Pid))
		cwd, err := os.Readlink(filepath.Join(dir, "cwd"))
		if err != nil || !strings.HasPrefix(cwd, filepath.Join(bundles, shim.Namespace)+"/") {
			return true
		}
		theirs, err := os.Stat(filepath.Join(dir, "root"))
		return err != nil || !os.SameFile(root, theirs)
	}), nil
}

func allShims() ([]Shim, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var shims []Shim
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "cmdline"))
		if err != nil {
			continue // it has ended
		}
		if shim, ok := parseShim(cmdline); ok {
			shim.Pid = pid
			shims = append(shims, shim)
		}
	}
	return shims, nil
}

// parseShim reads a /proc/PID/cmdline, which any process may have made up.
func parseShim(cmdline []byte) (Shim, bool) {
	args := strings.Split(string(bytes.TrimSuffix(cmdline, []byte{0})), "\x00")
	shim := Shim{Namespace: flag(args, "-namespace"), ID: flag(args, "-id"), starter: slices.Contains(args, "start")}
	return shim, shim.Namespace != "" && shim.ID != ""
}

// flag returns the value of a flag, "" when it is not given.
func flag(args []string, name string) string {
	if i := slices.Index(args, name); i >= 0 && i+1 < len(args) {
		return args[i+1]
	}
	return ""
}

// endShim ends a process and removes the sockets that it listened on.
func endShim(ctx context.Context, pid int) error {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	sockets, err := socketsOf(pid)
	if err != nil {
		return err
	}
	patient, cancel := context.WithTimeout(ctx, shimGrace)
	defer cancel()
	if err := signalAndWait(patient, pidfd, unix.SIGTERM); err != nil && ctx.Err() == nil {
		err = signalAndWait(ctx, pidfd, unix.SIGKILL)
		if err != nil {
			return err
		}
	}
	for _, socket := range sockets {
		if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return ctx.Err()
}

// signalAndWait returns when the process has ended.
func signalAndWait(ctx context.Context, pidfd int, signal unix.Signal) error {
	if err := unix.PidfdSendSignal(pidfd, signal, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	return waitForEnd(ctx, pidfd)
}

// waitForEnd returns when a process has ended: its pidfd is readable then
// (pidfd_open(2)).
func waitForEnd(ctx context.Context, pidfd int) error {
	for ctx.Err() == nil {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(shimPoll/time.Millisecond))
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return context.Cause(ctx)
}

// socketsOf returns the paths of a process's unix sockets that have one, from
// its descriptors and /proc/net/unix (proc(5)).
func socketsOf(pid int) ([]string, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	descriptors, err := os.ReadDir(dir)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	inodes := map[string]bool{}
	for _, descriptor := range descriptors {
		target, err := os.Readlink(filepath.Join(dir, descriptor.Name()))
		if inode, ok := strings.CutPrefix(target, "socket:["); ok && err == nil {
			inodes[strings.TrimSuffix(inode, "]")] = true
		}
	}
	table, err := os.Open(fmt.Sprintf("/proc/%d/net/unix", pid))
	if err != nil {
		return nil, err
	}
	defer table.Close()
	return socketPaths(table, inodes), nil
}

// socketPaths are those of the sockets with the given inodes, by a /proc/PID/net/unix. Whoever binds a socket chooses its path.
func socketPaths(table io.Reader, inodes map[string]bool) (paths []string) {
	for lines := bufio.NewScanner(table); lines.Scan(); {
		// Num RefCount Protocol Flags Type St Inode Path
		if fields := strings.Fields(lines.Text()); len(fields) == 8 && inodes[fields[6]] && filepath.IsAbs(fields[7]) {
			paths = append(paths, fields[7])
		}
	}
	return paths
}
