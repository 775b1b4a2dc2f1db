package harness

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Each node has its own network namespace, like a machine. Its bridge, veths, addresses, iptables
// rules and ports never conflict with those of other nodes or of the machine, and everything in the
// namespace belongs to the node.

func (n *Node) netnsPath() string { return filepath.Join(n.dir, "netns") }

// makeNetNS makes the node's network namespace, pins it and brings its lo up.
func (n *Node) makeNetNS() error {
	if err := os.WriteFile(n.netnsPath(), nil, 0o644); err != nil {
		return err
	}
	return onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("failed to make a network namespace: %w", err)
		}
		if err := unix.Mount("/proc/thread-self/ns/net", n.netnsPath(), "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("failed to pin the network namespace at %q: %w", n.netnsPath(), err)
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
}

// Inside runs f on a thread in the node's network namespace. Processes and sockets of f stay there;
// goroutines that f starts run outside.
func (n *Node) Inside(f func() error) error {
	return onOwnThread(func() error {
		ns, err := os.Open(n.netnsPath())
		if err != nil {
			return err
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("failed to enter the node's network namespace: %w", err)
		}
		return f()
	})
}

// onOwnThread runs f on a thread that ends with f, so that changes of the thread's namespaces reach
// no other goroutine.
func onOwnThread(f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime then ends the thread
		result <- f()
	}()
	return <-result
}

// Listen opens a TCP listener on a free port of the node's loopback.
func (n *Node) Listen() (l net.Listener, err error) {
	err = n.Inside(func() error {
		l, err = net.Listen("tcp", "127.0.0.1:0")
		return err
	})
	return l, err
}

// Dial connects from the node to a literal IP address and port.
func (n *Node) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = n.Inside(func() error {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// HTTP returns a client that runs on the node and keeps no connections. URLs must have literal IP
// addresses.
func (n *Node) HTTP() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: n.Dial, DisableKeepAlives: true}}
}

// Command runs a program of the machine in the node's network namespace and
// returns its stdout.
func (n *Node) Command(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var out []byte
	err := n.Inside(func() (err error) {
		out, err = cmd.Output()
		return err
	})
	if exit, ok := err.(*exec.ExitError); ok {
		return string(out), fmt.Errorf("failed to run %q: %w: %s", cmd.String(), err, exit.Stderr)
	}
	return string(out), err
}
