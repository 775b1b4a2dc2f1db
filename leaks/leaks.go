// Package leaks finds what stands on the host under the names of sandboxes: every name that podfsm gives is derived from a sandbox's
// id. Whose it is, is for the caller to say: what belongs to no sandbox that is known has leaked.
//
// Only ids of the form that containerd's CRI service makes are looked at, 64 hexadecimal digits at random: no name that somebody else
// gives is taken for one, and an id that was unknown once stays so.
package leaks

import (
	"cmp"
	"context"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/netns"
	"github.com/podfsm/podfsm/pause"
)

// Kind is what a thing is, in the words that an operator reads.
type Kind string

// The kinds, in the order in which they have to go: processes before what they use.
const (
	Plugin    Kind = "CNI plugin"
	Container Kind = "pause container"
	Shim      Kind = "shim"
	Bundle    Kind = "bundle"
	Cgroup    Kind = "cgroup"
	Snapshot  Kind = "snapshot"
	Files     Kind = "files"
	NetNS     Kind = "netns"
	Lease     Kind = "lease"
	Record    Kind = "sandbox record"
)

var order = []Kind{Plugin, Container, Shim, Bundle, Cgroup, Snapshot, Files, NetNS, Lease, Record}

// Thing is something that exists for a sandbox.
type Thing struct {
	Kind Kind
	ID   string // the sandbox's
	// Name is a path, a pid, or a name in one of containerd's stores.
	Name string
}

// SandboxID is the form of the ids that containerd's CRI service makes.
var SandboxID = regexp.MustCompile(`^[0-9a-f]{64}$`)

// Sort orders things by sandbox, and then as they have to go.
func Sort(things []Thing) {
	slices.SortFunc(things, func(a, b Thing) int {
		return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(slices.Index(order, a.Kind), slices.Index(order, b.Kind)), cmp.Compare(a.Name, b.Name))
	})
}

// PinPrefix begins the names of pinned network namespaces, and StockPinPrefix those of containerd's own, which podfsm's have, too, where
// an operator wants that: a sandbox's id follows, while containerd's end in a UUID.
const (
	PinPrefix      = "podfsm-"
	StockPinPrefix = "cni-"
)

// Pins are the names that the network namespace of a sandbox may have in a directory of pinned ones.
func Pins(id string) []string {
	if !SandboxID.MatchString(id) {
		return []string{PinPrefix + id}
	}
	return []string{PinPrefix + id, StockPinPrefix + id}
}

// Pinned is the sandbox whose network namespace has a name among the pinned ones.
func Pinned(name string) (id string, ok bool) {
	if id, ok := strings.CutPrefix(name, PinPrefix); ok {
		return id, true
	}
	id, ok = strings.CutPrefix(name, StockPinPrefix)
	return id, ok && SandboxID.MatchString(id)
}

// Host is where a containerd has the things of its sandboxes.
type Host struct {
	NetNSDirs []string    // of pinned network namespaces
	Plugins   host.Groups // of CNI plugins
	Files     pause.Files
	Bundles   string // of tasks, by containerd namespace
	Namespace string // of the CRI, in containerd
}

// Marked returns the things that are podfsm's by their names alone.
func (h Host) Marked() ([]Thing, error) {
	var things []Thing
	for _, dir := range h.NetNSDirs {
		pins, err := netns.Pins(dir)
		if err != nil {
			return nil, err
		}
		for _, name := range pins {
			if id, ok := Pinned(name); ok {
				things = add(things, NetNS, id, filepath.Join(dir, name))
			}
		}
	}
	plugins, err := cni.Leftovers(h.Plugins)
	if err != nil {
		return nil, err
	}
	for _, plugin := range plugins {
		things = add(things, Plugin, plugin.ID, plugin.Group)
	}
	return things, nil
}

// Unmarked returns the things that have the same names whoever made them, podfsm or containerd's own controller, and those of app
// containers beside them.
//
// Shims are found only from the daemon's own cgroup.
func (h Host) Unmarked(ctx context.Context) ([]Thing, error) {
	var things []Thing
	shims, err := host.Siblings(ctx, filepath.Join(h.Bundles, h.Namespace))
	if err != nil {
		return nil, err
	}
	for pid, bundle := range shims {
		things = add(things, Shim, strings.TrimPrefix(filepath.Base(bundle), "."), strconv.Itoa(pid))
	}
	bundles, err := pause.Bundles(h.Bundles, h.Namespace)
	if err != nil {
		return nil, err
	}
	for _, bundle := range bundles {
		things = add(things, Bundle, bundle.ID, bundle.Path)
	}
	ids, err := h.Files.List()
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		things = add(things, Files, id, id)
	}
	return things, nil
}

// Cgroups returns the cgroups of sandboxes that have other things: a cgroup alone doesn't say whose it is, and the kubelet removes
// those of pods that it doesn't know.
func Cgroups(things []Thing) ([]Thing, error) {
	ids := IDs(things)
	if len(ids) == 0 {
		return nil, nil
	}
	found, err := host.FindPodCgroups(ids)
	if err != nil {
		return nil, err
	}
	var cgroups []Thing
	for _, dir := range slices.Sorted(maps.Keys(found)) {
		cgroups = add(cgroups, Cgroup, found[dir], dir)
	}
	return cgroups, nil
}

// IDs are the sandboxes of things, each once, in order.
func IDs(things []Thing) []string {
	var ids []string
	for _, thing := range things {
		ids = append(ids, thing.ID)
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// add leaves out what has not the id of a sandbox.
func add(things []Thing, kind Kind, id, name string) []Thing {
	if !SandboxID.MatchString(id) {
		return things
	}
	return append(things, Thing{Kind: kind, ID: id, Name: name})
}
