package remapping

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/podfsm/podfsm/snapshot/owners"
)

// A Strategy is a way to give the files of an image the owners of a user namespace.
type Strategy string

const (
	// IDMap: the kernel maps the owners in the mount, nothing is copied.
	IDMap Strategy = "idmap"
	// Metacopy: a layer on top of the image holds the owners, without content.
	Metacopy Strategy = "metacopy"
	// Chown: a layer on top of the image holds a copy of all its files.
	Chown Strategy = "chown"
)

// layer is a committed snapshot with the owners, between an image and the snapshots that use it.
// Its key encodes all fields. It can't collide with keys of containerd's metadata, which start with
// a namespace and a number.
type layer struct {
	strategy Strategy
	maps     owners.Map
	boot     string // the id of the boot in which it was made
	parent   string // the key of the image's top layer
}

const (
	layerPrefix  = "podfsm-remapped/"
	makingPrefix = "podfsm-remapping/" // of the key of an unfinished layer
)

func (l layer) key() string    { return layerPrefix + l.name() }
func (l layer) making() string { return makingPrefix + l.name() }
func (l layer) name() string {
	return string(l.strategy) + "/" + mapText(l.maps) + "/" + l.boot + "/" + l.parent
}

// parseLayer parses the key of a layer, finished or not.
func parseLayer(key string) (l layer, ok bool) {
	name, finished := strings.CutPrefix(key, layerPrefix)
	if !finished {
		if name, ok = strings.CutPrefix(key, makingPrefix); !ok {
			return layer{}, false
		}
	}
	parts := strings.SplitN(name, "/", 4)
	if len(parts) != 4 {
		return layer{}, false
	}
	uids, gids, _ := strings.Cut(parts[1], ";")
	maps, err := parseMap(uids, gids)
	return layer{strategy: Strategy(parts[0]), maps: maps, boot: parts[2], parent: parts[3]}, err == nil
}

// hidden reports whether a key is the key of a layer.
func hidden(key string) bool {
	_, ok := parseLayer(key)
	return ok
}

// visible returns what containerd sees of a snapshot: the image as its parent instead of the layer.
func visible(info snapshots.Info) snapshots.Info {
	if l, ok := parseLayer(info.Parent); ok {
		info.Parent = l.parent
	}
	return info
}

// mapText returns the same text for equivalent maps.
func mapText(m owners.Map) string { return extentsText(m.UIDs) + ";" + extentsText(m.GIDs) }

func extentsText(extents []specs.LinuxIDMapping) string {
	sorted := slices.SortedFunc(slices.Values(extents), func(a, b specs.LinuxIDMapping) int {
		return int(int64(a.ContainerID) - int64(b.ContainerID))
	})
	text := make([]string, len(sorted))
	for i, e := range sorted {
		text[i] = fmt.Sprintf("%d:%d:%d", e.ContainerID, e.HostID, e.Size)
	}
	return strings.Join(text, ",")
}

// mapsOf returns the id maps in the labels of a snapshot, nil if there are none.
func mapsOf(labels map[string]string) (*owners.Map, error) {
	uids, gids := labels[snapshots.LabelSnapshotUIDMapping], labels[snapshots.LabelSnapshotGIDMapping]
	if uids == "" && gids == "" {
		return nil, nil
	}
	m, err := parseMap(uids, gids)
	if err != nil {
		return nil, err
	}
	return &m, nil
}

// parseMap parses maps in the form of containerd's labels. All errors are InvalidArgument.
func parseMap(uids, gids string) (m owners.Map, err error) {
	if m.UIDs, err = parseExtents(uids); err != nil {
		return owners.Map{}, fmt.Errorf("invalid uid map %q: %w", uids, err)
	}
	if m.GIDs, err = parseExtents(gids); err != nil {
		return owners.Map{}, fmt.Errorf("invalid gid map %q: %w", gids, err)
	}
	return m, nil
}

func parseExtents(text string) ([]specs.LinuxIDMapping, error) {
	var extents []specs.LinuxIDMapping
	root := false
	for part := range strings.SplitSeq(text, ",") {
		var e specs.LinuxIDMapping
		if _, err := fmt.Sscanf(part, "%d:%d:%d", &e.ContainerID, &e.HostID, &e.Size); err != nil {
			return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		root = root || e.ContainerID == 0 && e.Size > 0
		extents = append(extents, e)
	}
	if !root {
		return nil, fmt.Errorf("id 0 is not mapped: %w", errdefs.ErrInvalidArgument)
	}
	return extents, nil
}

// lineage is the ancestry of a snapshot.
type lineage struct {
	layer    layer // an ancestor, at any depth
	remapped bool  // there is such a layer
	scratch  bool  // the snapshot has no parent
}

// lineage looks up a snapshot and its ancestors, up to a layer.
func (b *backend) lineage(ctx context.Context, key string) (l lineage, err error) {
	err = b.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		for first := true; key != ""; first = false {
			if l.layer, l.remapped = parseLayer(key); l.remapped {
				return nil
			}
			_, info, _, err := storage.GetInfo(ctx, key)
			if err != nil {
				return err
			}
			l.scratch = first && info.Parent == ""
			key = info.Parent
		}
		return nil
	})
	return l, err
}
