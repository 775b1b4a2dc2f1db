package pause

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// exits notices the ends of all processes in one goroutine: the pidfd of a process is readable once it has ended (pidfd_open(2)).
type exits struct {
	epoll int
	stop  *os.File  // becomes readable for the end of the goroutine
	run   sync.Once // the goroutine, once there is anything to watch
	done  chan struct{}
	ended func(key string, process *process)

	mu       sync.Mutex
	last     int32
	watching map[int32]watched
}

type watched struct {
	key     string
	process *process
}

// stopID stands for exits.stop among the watched.
const stopID = 0

func watchExits(ended func(key string, process *process)) (*exits, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("failed to watch for exits: %w", err)
	}
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		unix.Close(epoll)
		return nil, fmt.Errorf("failed to watch for exits: %w", err)
	}
	e := &exits{epoll: epoll, stop: os.NewFile(uintptr(stop), "eventfd"), done: make(chan struct{}), ended: ended, watching: map[int32]watched{}}
	if err := e.listen(stop, stopID); err != nil {
		return nil, errors.Join(err, unix.Close(epoll), e.stop.Close())
	}
	return e, nil
}

func (e *exits) listen(fd int, id int32) error {
	return unix.EpollCtl(e.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT, Fd: id})
}

// add has the end of a process noticed, also one that it has come to already.
func (e *exits) add(key string, process *process) error {
	e.run.Do(func() { go e.watch() })
	e.mu.Lock()
	e.last++
	id := e.last
	e.watching[id] = watched{key, process}
	e.mu.Unlock()
	return process.Control(func(pidfd int) error { return e.listen(pidfd, id) })
}

func (e *exits) watch() {
	defer close(e.done)
	events := make([]unix.EpollEvent, 64)
	for {
		n, err := unix.EpollWait(e.epoll, events, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return // the descriptor is closed
		}
		for _, event := range events[:max(n, 0)] {
			if event.Fd == stopID {
				return
			}
			e.mu.Lock()
			w := e.watching[event.Fd]
			delete(e.watching, event.Fd)
			e.mu.Unlock()
			e.ended(w.key, w.process)
		}
	}
}

func (e *exits) close() {
	e.run.Do(func() { close(e.done) }) // it never ran
	_, _ = e.stop.Write([]byte{1, 0, 0, 0, 0, 0, 0, 0})
	<-e.done
	unix.Close(e.epoll)
	e.stop.Close()
}
