package host

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Cgroups are directories of cgroups, one a hierarchy at most, in which a process is born: it never runs outside of them, and nothing
// that it starts can have left them before they are looked at.
type Cgroups []string

// Start has start make a process in the cgroups and returns its error. start makes exactly one process, by [os.StartProcess], [exec.Cmd]
// or clone3(2), in the goroutine that calls it.
//
// A process is born in a cgroup of v2 by cgroupFD, the descriptor of its directory: SysProcAttr.UseCgroupFD, or CLONE_INTO_CGROUP
// (Linux 5.7); cgroupFD is -1 when none of the cgroups is of v2. Into those of v1 it is born because the thread that makes it has
// moved there. That thread then ends, so the process must not ask for a parent-death signal.
//
// Errors: InvalidArgument for two cgroups of v2; those of start; others when a cgroup can't be entered.
func (c Cgroups) Start(start func(cgroupFD int) error) error {
	cgroupFD := -1
	var v1 []string
	for _, dir := range c {
		unified, err := isUnified(dir)
		switch {
		case err != nil:
			return err
		case !unified:
			v1 = append(v1, dir)
			continue
		case cgroupFD >= 0:
			return fmt.Errorf("a process can't be in two cgroups of v2, %q: %w", c, errdefs.ErrInvalidArgument)
		}
		opened, err := os.Open(dir)
		if err != nil {
			return fmt.Errorf("failed to open cgroup %q: %w", dir, err)
		}
		defer opened.Close()
		cgroupFD = int(opened.Fd())
	}
	if len(v1) == 0 {
		return start(cgroupFD)
	}
	return onLastThread(func() error {
		for _, dir := range v1 {
			if err := enter(dir); err != nil {
				return fmt.Errorf("failed to enter cgroup %q: %w", dir, err)
			}
		}
		return start(cgroupFD)
	})
}

// isUnified says whether a directory is of the v2 hierarchy.
func isUnified(dir string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return false, fmt.Errorf("failed to look at cgroup %q: %w", dir, err)
	}
	return st.Type == unix.CGROUP2_SUPER_MAGIC, nil
}

// enter moves the calling thread into a v1 cgroup. For one thread the kernel takes no lock that forks of the whole host wait for.
func enter(dir string) error { return writeFile(filepath.Join(dir, "tasks"), "0") }

// threadEnd bounds the wait for the end of a thread that has nothing more to do.
const threadEnd = time.Second

// onLastThread calls f on a thread that does nothing else and ends after it, never on the first thread, which the runtime doesn't end
// and /proc/self stands for. It returns when that thread has ended: as long as it is in a cgroup, this whole process is listed there,
// and whoever ends that cgroup would end it; and as long as it is in a namespace, that lives.
func onLastThread(f func() error) error {
	var tid int
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocks it: the runtime ends the thread with the goroutine
		if unix.Gettid() == unix.Getpid() {
			// The runtime never ends the first thread. While this goroutine holds it, the next one gets another.
			defer runtime.UnlockOSThread()
			done <- onLastThread(f)
			return
		}
		tid = unix.Gettid()
		done <- f()
	}()
	err := <-done
	for begun := time.Now(); tid != 0 && time.Since(begun) < threadEnd; time.Sleep(50 * time.Microsecond) {
		if errors.Is(unix.Tgkill(unix.Getpid(), tid, 0), unix.ESRCH) {
			break
		}
	}
	return err
}
