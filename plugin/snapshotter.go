package plugin

import (
	"fmt"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/platforms"
	"github.com/containerd/plugin"
	"github.com/moby/sys/userns"

	"github.com/podfsm/podfsm/snapshot"
	"github.com/podfsm/podfsm/snapshot/remapping"
)

// SnapshotterConfig is the section [plugins.'io.containerd.snapshotter.v1.podfsm']. It applies to
// handlers with snapshotter = "podfsm", for nodes that can't map ids in the
// mount.
type SnapshotterConfig struct {
	// RootPath is the directory of the snapshots, an absolute path. Default: a directory in
	// containerd's root directory.
	RootPath string `toml:"root_path"`
	// Strategy is how files get the owners of a user namespace: "idmap", "metacopy", "chown", or
	// "auto" for the first of these that works on the node. Default: "auto".
	Strategy string `toml:"strategy"`
	// MountOptions are put on every overlay, as with containerd's overlayfs.
	MountOptions []string `toml:"mount_options"`
}

// check fails with InvalidArgument and the option's name for an invalid value.
func (c *SnapshotterConfig) check() error {
	if c.RootPath != "" && !filepath.IsAbs(c.RootPath) {
		return fmt.Errorf("root_path = %q isn't an absolute path: %w", c.RootPath, errdefs.ErrInvalidArgument)
	}
	_, err := oneOf("strategy", c.Strategy, "auto", "idmap", "metacopy", "chown")
	return err
}

func defaultSnapshotterConfig() *SnapshotterConfig { return &SnapshotterConfig{Strategy: "auto"} }

// capabilityRebase is snapshots.RebaseCap, which containerd 2.3 neither defines nor uses.
const capabilityRebase = "rebase"

// initSnapshotter makes no files, since most nodes don't use the snapshotter. It always announces
// support for id maps, so that containerd's client leaves remapping to the snapshotter. It never
// fails, because an error would take down CRI on a node whose handlers name the snapshotter. With
// an invalid configuration it uses the defaults in the configured directory, and the controller
// refuses new pods.
func initSnapshotter(ic *plugin.InitContext) (any, error) {
	config, err := snapshotterOptionsOf(ic.Config)
	if err != nil {
		log.G(ic.Context).WithError(err).Error("invalid snapshotter configuration, using the defaults")
	}
	root := ic.Properties[plugins.PropertyRootDir]
	if config.RootPath != "" {
		root = config.RootPath
	}
	ic.Meta.Platforms = append(ic.Meta.Platforms, platforms.DefaultSpec())
	ic.Meta.Capabilities = append(ic.Meta.Capabilities, snapshot.CapabilityRemapIDs)
	if !userns.RunningInUserNS() { // as containerd's overlayfs does
		ic.Meta.Capabilities = append(ic.Meta.Capabilities, capabilityRebase)
	}
	ic.Meta.Exports[plugins.SnapshotterRootDir] = root
	return remapping.New(remapping.Config{Root: root, Strategy: remapping.Strategy(config.Strategy), MountOptions: config.MountOptions}), nil
}

// differ is the interface that containerd's services require of a diff plugin.
type differ struct {
	diff.Comparer
	diff.Applier
}

// comparing wraps the init function of containerd's differ, so that diffs of pods with user
// namespaces have the ids of their images. It fails only if that function fails.
func comparing(stock func(*plugin.InitContext) (any, error)) func(*plugin.InitContext) (any, error) {
	return func(ic *plugin.InitContext) (any, error) {
		instance, err := stock(ic)
		if err != nil {
			return instance, err
		}
		of, ok := instance.(interface {
			diff.Comparer
			diff.Applier
		})
		db, dbErr := ic.GetSingle(plugins.MetadataPlugin)
		if !ok || dbErr != nil {
			log.G(ic.Context).WithError(dbErr).Warn("commits and checkpoints of pods with user namespaces will have host ids")
			return instance, nil
		}
		var sn *remapping.Snapshotter // nil where it is disabled
		if loaded, err := ic.GetByID(plugins.SnapshotPlugin, Name); err == nil {
			sn = loaded.(*remapping.Snapshotter)
		}
		return differ{remapping.NewComparer(of, db.(*metadata.DB).ContentStore(), sn), of}, nil
	}
}
