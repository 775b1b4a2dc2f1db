package cni

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// endSurvivors returns when no process is left of a pod's plugins that has outlived the daemon which ran it: a DEL beside an ADD
// that still runs may free what the ADD then takes. An ADD is killed, the DEL takes back what it had done. A DEL is given patience
// to come to its end, for a half of it can't always be made whole by another: the bridge plugin removes the interface first, and
// forgets its masquerade rules when it doesn't find it.
//
// Plugins, and what they start, are known by the marker in their environment (proc(5), /proc/PID/environ); a parent-death signal
// would not reach grandchildren such as an IPAM plugin.
func endSurvivors(ctx context.Context, id string, patience time.Duration) error {
	patient, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		found, err := survivors(id)
		if err != nil || len(found) == 0 {
			return err
		}
		for _, s := range found {
			if s.deleting && s.wait(patient) == nil {
				continue
			}
			if err := s.end(ctx); err != nil {
				return fmt.Errorf("failed to end process %d, a CNI plugin of sandbox %q from before a restart: %w", s.pid, id, err)
			}
		}
	}
}

// survivor is a process of a plugin.
type survivor struct {
	pid      int
	deleting bool // it is of a DEL
}

// survivors are the processes with the marker of a sandbox, without those that have ended and wait for their parents.
func survivors(id string) ([]survivor, error) {
	marker := []byte(sandboxEnv + "=" + id)
	var found []survivor
	err := eachProcess(func(pid int, environ [][]byte) {
		if contains(environ, marker) {
			found = append(found, survivor{pid, contains(environ, []byte("CNI_COMMAND=DEL"))})
		}
	})
	if err != nil {
		return nil, fmt.Errorf("failed to look for CNI plugins of sandbox %q: %w", id, err)
	}
	return found, nil
}

// eachProcess visits the processes with their environments, but for those that have none any more because they have ended.
func eachProcess(visit func(pid int, environ [][]byte)) error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		environ, err := os.ReadFile("/proc/" + entry.Name() + "/environ")
		if err != nil || len(environ) == 0 {
			continue // it has ended, or is a kernel thread
		}
		visit(pid, bytes.Split(environ, []byte{0}))
	}
	return nil
}

func contains(variables [][]byte, wanted []byte) bool {
	for _, variable := range variables {
		if bytes.Equal(variable, wanted) {
			return true
		}
	}
	return false
}

// wait returns once the process has ended, or ctx's error.
func (s survivor) wait(ctx context.Context) error {
	return s.withPidfd(func(pidfd int) error { return waitEnd(ctx, pidfd) })
}

// end kills the process, by its pidfd, so that no other that gets its pid is hit, and waits until it has ended.
func (s survivor) end(ctx context.Context) error {
	return s.withPidfd(func(pidfd int) error {
		if err := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
		return waitEnd(ctx, pidfd)
	})
}

// withPidfd gives f a pidfd of the process; one that is gone needs nothing.
func (s survivor) withPidfd(f func(pidfd int) error) error {
	pidfd, err := unix.PidfdOpen(s.pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	return f(pidfd)
}

// waitEnd returns when the process of pidfd has ended: the pidfd is readable then (pidfd_open(2)).
func waitEnd(ctx context.Context, pidfd int) error {
	for ctx.Err() == nil {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(pollInterval/time.Millisecond))
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return context.Cause(ctx)
}

// pollInterval is how long a wait for a process goes on before it looks at its context.
const pollInterval = 100 * time.Millisecond
