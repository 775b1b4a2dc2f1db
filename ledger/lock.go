package ledger

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// lockWait bounds the wait for the lock, which another daemon holds as long as it runs.
	lockWait = 3 * time.Second
	lockPoll = 20 * time.Millisecond
)

// lockDir locks the ledger by locking its root directory, see flock(2): that needs no file and no
// disk space. It polls, because a waiting flock can't be interrupted. It returns Unavailable if
// another process still has the lock after wait.
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
		return false, fmt.Errorf("failed to determine whether the ledger is in use: %w", withClass(err))
	}
	defer dir.Close() // releases the lock, too
	err = unix.Flock(int(dir.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("failed to determine whether the ledger in %s is in use: %w", path, withClass(err))
	}
	return false, nil
}
