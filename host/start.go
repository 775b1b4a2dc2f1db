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

// Cgroups are directories of cgroups in which a process is born, at most one per hierarchy. The
// process never runs outside of them, so neither do its children.
type Cgroups []string

// Start calls start, which starts a process in the cgroups, and returns its error. start starts
// exactly one process, by [os.StartProcess], [exec.Cmd] or clone3(2), in the goroutine that calls
// it.
//
// For a cgroup of v2, start gets cgroupFD, the descriptor of its directory, for
// SysProcAttr.UseCgroupFD or CLONE_INTO_CGROUP (Linux 5.7). It is -1 if no cgroup is of v2. For
// cgroups of v1, start runs on a thread that has moved there. That thread then ends, so the process
// must not use a parent-death signal.
//
// Errors: InvalidArgument for two cgroups of v2; those of start; others if a cgroup can't be
// entered.
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
	return OnLastThread(func() error {
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
		return false, fmt.Errorf("failed to stat cgroup %q: %w", dir, err)
	}
	return st.Type == unix.CGROUP2_SUPER_MAGIC, nil
}

// enter moves the calling thread into a v1 cgroup. For a whole process, the kernel would take a
// lock for which all forks of the host wait.
func enter(dir string) error { return writeFile(filepath.Join(dir, "tasks"), "0") }

// threadEnd bounds the wait for the end of an idle thread.
const threadEnd = time.Second

// OnLastThread calls f on a thread that ends afterwards, so that f may change the thread for good,
// for instance its namespaces. It never uses the first thread: the runtime doesn't end that one, and
// /proc/self shows it. OnLastThread returns once the thread has ended. As long as the thread is in a
// cgroup, this whole process is listed there, and would be killed with the cgroup. As long as the
// thread is in a namespace, the namespace lives.
func OnLastThread(f func() error) error {
	var tid int
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocks it: the runtime ends the thread with the goroutine
		if unix.Gettid() == unix.Getpid() {
			// The runtime never ends the first thread. While this goroutine holds it, the next one gets another.
			defer runtime.UnlockOSThread()
			done <- OnLastThread(f)
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
