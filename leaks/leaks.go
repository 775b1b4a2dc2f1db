// Package leaks finds the resources of sandboxes on the host by their names, which podfsm derives
// from the sandbox's id. A resource of an unknown sandbox has leaked. The caller decides which
// sandboxes are known.
//
// The package considers only ids as containerd's CRI service makes them: 64 random hexadecimal
// digits. No other program gives such names, and no id is ever used twice.
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

// Kind is the kind of a thing, as operators see it.
type Kind string

// The kinds, in the order of their removal: processes before the resources that they use.
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

// Thing is a resource of a sandbox.
type Thing struct {
	Kind Kind
	ID   string // of the sandbox
	// Name is a path, a pid, or a name in one of containerd's stores.
	Name string
}

// SandboxID matches the ids of containerd's CRI service.
var SandboxID = regexp.MustCompile(`^[0-9a-f]{64}$`)

// Sort sorts things by sandbox, and then in the order of their removal.
func Sort(things []Thing) {
	slices.SortFunc(things, func(a, b Thing) int {
		return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(slices.Index(order, a.Kind), slices.Index(order, b.Kind)), cmp.Compare(a.Name, b.Name))
	})
}

// PinPrefix and StockPinPrefix begin the names of pinned network namespaces. podfsm uses PinPrefix,
// or, if so configured, containerd's own StockPinPrefix. In podfsm's names, the sandbox's id
// follows. In containerd's, a UUID does.
const (
	PinPrefix      = "podfsm-"
	StockPinPrefix = "cni-"
)

// Pins returns the possible names of a sandbox's pinned network namespace.
func Pins(id string) []string {
	if !SandboxID.MatchString(id) {
		return []string{PinPrefix + id}
	}
	return []string{PinPrefix + id, StockPinPrefix + id}
}

// Pinned returns the sandbox of a pinned network namespace by the pin's name.
func Pinned(name string) (id string, ok bool) {
	if id, ok := strings.CutPrefix(name, PinPrefix); ok {
		return id, true
	}
	id, ok = strings.CutPrefix(name, StockPinPrefix)
	return id, ok && SandboxID.MatchString(id)
}

// Host has the places on the host where a containerd keeps the resources of its sandboxes.
type Host struct {
	NetNSDirs []string    // of pinned network namespaces
	Plugins   host.Groups // of CNI plugins
	Files     pause.Files
	Bundles   string // directory of tasks, by containerd namespace
	Namespace string // containerd namespace of CRI
}

// Marked returns the things whose names show that podfsm made them.
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

// Unmarked returns the things that have the same names whether podfsm or containerd's own
// controller made them. It includes those of app containers.
//
// It finds only shims in the cgroup of this process.
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

// Cgroups returns the cgroups of the sandboxes of things. A cgroup alone doesn't show who made it,
// and the kubelet removes the cgroups of unknown pods.
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

// IDs returns the sandboxes of things, sorted, without duplicates.
func IDs(things []Thing) []string {
	var ids []string
	for _, thing := range things {
		ids = append(ids, thing.ID)
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// add adds a thing, unless its id is not that of a sandbox.
func add(things []Thing, kind Kind, id, name string) []Thing {
	if !SandboxID.MatchString(id) {
		return things
	}
	return append(things, Thing{Kind: kind, ID: id, Name: name})
}
