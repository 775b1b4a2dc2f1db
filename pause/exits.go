package pause

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// exits watches for the exits of all processes in one goroutine. The pidfd of a process becomes readable at its exit
// (pidfd_open(2)).
type exits struct {
	epoll *os.File
	stop  *os.File  // an eventfd that ends the goroutine
	begin sync.Once // starts the goroutine with the first process
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
	e := &exits{epoll: os.NewFile(uintptr(epoll), "epoll"), done: make(chan struct{}), ended: ended, watching: map[int32]watched{}}
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("failed to watch for exits: %w", err), e.epoll.Close())
	}
	e.stop = os.NewFile(uintptr(stop), "eventfd")
	if err := e.listen(stop, stopID); err != nil {
		return nil, errors.Join(fmt.Errorf("failed to watch for exits: %w", err), e.epoll.Close(), e.stop.Close())
	}
	return e, nil
}

func (e *exits) listen(fd int, id int32) error {
	return unix.EpollCtl(int(e.epoll.Fd()), unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT, Fd: id})
}

// add watches for the exit of a process, which may have ended already. The caller keeps the process open until then.
func (e *exits) add(key string, process *process) error {
	e.begin.Do(func() { go e.watch() })
	e.mu.Lock()
	e.last++
	id := e.last
	e.watching[id] = watched{key, process}
	e.mu.Unlock()
	err := process.Control(func(pidfd int) error { return e.listen(pidfd, id) })
	if err != nil {
		e.take(id)
	}
	return err
}

func (e *exits) take(id int32) watched {
	e.mu.Lock()
	defer e.mu.Unlock()
	w := e.watching[id]
	delete(e.watching, id)
	return w
}

func (e *exits) watch() {
	defer close(e.done)
	events := make([]unix.EpollEvent, 64)
	for {
		n, err := unix.EpollWait(int(e.epoll.Fd()), events, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return // can't happen with a valid descriptor
		}
		for _, event := range events[:max(n, 0)] {
			if event.Fd == stopID {
				return
			}
			w := e.take(event.Fd)
			e.ended(w.key, w.process)
		}
	}
}

func (e *exits) close() {
	e.begin.Do(func() { close(e.done) }) // the goroutine never ran
	_, _ = e.stop.Write([]byte{1, 0, 0, 0, 0, 0, 0, 0})
	<-e.done
	e.epoll.Close()
	e.stop.Close()
}
