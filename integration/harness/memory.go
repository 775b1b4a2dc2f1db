package harness

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"strconv"
)

// Memory is what the daemon holds in memory and descriptors.
type Memory struct {
	Heap       int // bytes that are reachable
	Goroutines int
	Files      int // open descriptors
}

func (m Memory) String() string {
	return fmt.Sprintf("%d KiB of heap, %d goroutines, %d descriptors", m.Heap>>10, m.Goroutines, m.Files)
}

// Memory collects garbage in the daemon and returns what the daemon holds then.
func (n *Node) Memory(ctx context.Context) (Memory, error) {
	var m Memory
	var err error
	// A second collection frees what a sync.Pool or a finalizer held.
	for range 2 {
		if m.Heap, err = n.profiled(ctx, "heap?gc=1&debug=1", heapInUse); err != nil {
			return Memory{}, err
		}
	}
	if m.Goroutines, err = n.profiled(ctx, "goroutine?debug=1", goroutines); err != nil {
		return Memory{}, err
	}
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", n.Pid()))
	m.Files = len(files)
	return m, err
}

// The text form of Go's profiles (runtime/pprof, debug=1).
var (
	heapInUse  = regexp.MustCompile(`(?m)^# HeapAlloc = (\d+)$`)
	goroutines = regexp.MustCompile(`(?m)^goroutine profile: total (\d+)$`)
)

// profiled reads a number from a profile of the daemon.
func (n *Node) profiled(ctx context.Context, profile string, figure *regexp.Regexp) (int, error) {
	text, err := n.Profile(ctx, profile)
	if err != nil {
		return 0, err
	}
	found := figure.FindSubmatch(text)
	if found == nil {
		return 0, fmt.Errorf("profile %q has no number %v", profile, figure)
	}
	return strconv.Atoi(string(found[1]))
}

// Profile returns one of the daemon's profiles, as net/http/pprof serves them.
func (n *Node) Profile(ctx context.Context, profile string) ([]byte, error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", n.debugSocket())
	}}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://containerd/debug/pprof/"+profile, nil)
	if err != nil {
		return nil, err
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, fmt.Errorf("failed to get profile %q of node %q: %w", profile, n.name, err)
	}
	defer response.Body.Close()
	return io.ReadAll(response.Body)
}

// debugSocket is the socket on which the daemon serves its profiles.
func (n *Node) debugSocket() string { return n.path("debug.sock") }
