package harness

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
)

// wrappable are the programs that can be wrapped, with their folders below the node's directory.
var wrappable = map[string]string{
	"runc":        "bin",
	"bandwidth":   "cni/bin",
	"bridge":      "cni/bin",
	"delegate":    "cni/bin",
	"firewall":    "cni/bin",
	"host-device": "cni/bin",
	"host-local":  "cni/bin",
	"ipvlan":      "cni/bin",
	"loopback":    "cni/bin",
	"macvlan":     "cni/bin",
	"portmap":     "cni/bin",
	"ptp":         "cni/bin",
	"sbr":         "cni/bin",
	"tuning":      "cni/bin",
	"vrf":         "cni/bin",
}

// Fault sets the program of a point. A point is in the test daemon, or is a command of a real part
// before or after it acts, such as "runc.create", "bridge.ADD" or "host-local.DEL.after". Package
// faults documents programs.
func (n *Node) Fault(point, program string) error {
	part, _, _ := strings.Cut(point, ".")
	if _, real := wrappable[part]; real {
		if err := n.install(part, n.binary("faultwrap")); err != nil {
			return err
		}
	}
	return n.Faults.Set(point, program)
}

// Heal turns all points off and restores the real parts of the node.
func (n *Node) Heal() error {
	points, err := n.Faults.Points()
	if err != nil {
		return err
	}
	var errs []error
	for _, point := range points {
		errs = append(errs, n.Faults.Clear(point))
	}
	for part := range wrappable {
		errs = append(errs, n.install(part, n.real(part)))
	}
	return errors.Join(errs...)
}

// installParts installs the real parts into a new node, and where faultwrap looks for them.
func (n *Node) installParts() error {
	for part := range wrappable {
		if err := n.install(part, n.real(part)); err != nil {
			return err
		}
		if err := os.Symlink(n.real(part), n.path("faults/real/"+part)); err != nil {
			return err
		}
	}
	return nil
}

// real returns the unwrapped program of a part.
func (n *Node) real(part string) string { return n.binary(part) }

// install makes a part of the node a link to program, atomically for a running daemon.
func (n *Node) install(part, program string) error {
	next := n.path("tmp/" + part)
	if err := os.Symlink(program, next); err != nil {
		return err
	}
	return os.Rename(next, n.path(filepath.Join(wrappable[part], part)))
}
