package journal

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// lockWait bounds the wait for another daemon, which has the ledger locked as long as it runs.
	lockWait = 3 * time.Second
	lockPoll = 20 * time.Millisecond
)

// lockDir takes the ledger's lock: that of the root directory itself, see flock(2), which needs no file and no space. It polls, because a
// waiting flock can't be ended. It returns Unavailable when another process still has the lock after wait.
func lockDir(path string, wait time.Duration) (*os.File, error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("failed to lock the ledger: %w", withClass(err))
	}
	for deadline := time.Now().Add(wait); ; time.Sleep(lockPoll) {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return dir, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("failed to lock %s: %w", path, withClass(err)), dir.Close())
		}
		if time.Now().After(deadline) {
			dir.Close()
			return nil, fmt.Errorf("the ledger in %s is locked by another process, most likely a running containerd: %w", path, errdefs.ErrUnavailable)
		}
	}
}

// isLocked says whether a daemon has the ledger open.
func isLocked(path string) (bool, error) {
	dir, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("failed to find out who uses the ledger: %w", withClass(err))
	}
	defer dir.Close() // and with it the lock, if nobody had it
	err = unix.Flock(int(dir.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("failed to find out who uses %s: %w", path, withClass(err))
	}
	return false, nil
}
