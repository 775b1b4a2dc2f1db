package plugin

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/log"
	"github.com/containerd/plugin"

	"github.com/podfsm/podfsm/doctor"
	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/show"
	"github.com/podfsm/podfsm/userns"
)

// callDoctor makes the doctor of this node. It works on a degraded controller, too, which needs the
// doctor most, and never fails containerd's start.
func (c *Controller) callDoctor(ic *plugin.InitContext) {
	if err := lifecycle.Protect(func() error { c.makeDoctor(ic); return nil }); err != nil {
		c.refuse(err)
	}
}

func (c *Controller) makeDoctor(ic *plugin.InitContext) {
	config, _ := optionsOf(ic.Config) // the defaults on an error, for which the controller is already degraded
	rootDir, stateDir := ic.Properties[plugins.PropertyRootDir], ic.Properties[plugins.PropertyStateDir]
	var groups host.Groups
	if c.node != nil {
		groups = c.node.groups
	}
	c.doctor = doctor.New(doctor.Node{
		Proc:       "/proc",
		Sys:        "/sys",
		Etc:        "/etc",
		SystemdDir: "/run/systemd/system",
		Daemon:     os.Getpid(),
		Root:       filepath.Dir(rootDir),
		State:      filepath.Dir(stateDir),
		Plugins:    groups,
		Config:     c.examined(ic, config),
		Strategies: doctor.TryStrategies,
		Tmpfs:      userns.CheckTmpfs,
		Refusal:    c.refused,
		Draining:   c.drain.draining,
		Ledger:     func() (doctor.Ledger, error) { return c.examineLedger(rootDir, stateDir) },
	})
	if c.node != nil {
		c.node.doctor = c.doctor
	}
}

// examined returns the doctor's input from the configuration, nil if containerd's could not be
// read.
func (c *Controller) examined(ic *plugin.InitContext, config *Config) *doctor.Config {
	if len(c.stock.Containerd.Runtimes) == 0 {
		return nil
	}
	standard := c.stock.Containerd.Runtimes[c.stock.Containerd.DefaultRuntimeName]
	examined := &doctor.Config{
		InitPath:            config.InitPath,
		CgroupDriver:        doctor.ToldDriver(standard.Type == plugins.RuntimeRuncV2 && standard.Options != nil, standard.systemdCgroup()),
		NetNSDir:            c.stock.netNSDir(),
		RestrictOOMScoreAdj: c.stock.RestrictOOMScoreAdj,
		Pool:                config.Pool.User != "" || len(config.Pool.Ranges) > 0,
		PoolUser:            config.Pool.User,
	}
	for name, h := range c.stock.Containerd.Runtimes {
		if h.Sandboxer == Name {
			examined.Handlers = append(examined.Handlers, c.examinedHandler(ic, name, h))
		}
	}
	slices.SortFunc(examined.Handlers, func(a, b doctor.Handler) int { return strings.Compare(a.Name, b.Name) })
	return examined
}

func (c *Controller) examinedHandler(ic *plugin.InitContext, name string, h handler) doctor.Handler {
	examined := doctor.Handler{
		Name:        name,
		Default:     name == c.stock.Containerd.DefaultRuntimeName,
		Shim:        h.Type,
		Snapshotter: examinedSnapshotter(ic, c.stock.snapshotter(h)),
		Network:     networkConfig(c.stock, &Spec{Handler: name}),
		Mode:        c.policies.of(name).Mode,

		SystemdCgroup: h.systemdCgroup(),
	}
	if h.Path != "" {
		examined.Shim = h.Path
	}
	if h.Type == plugins.RuntimeRuncV2 {
		examined.Binary, _ = h.Options["BinaryName"].(string)
		if examined.Binary == "" {
			examined.Binary = "runc" // the default of the shim
		}
	}
	return examined
}

// examinedSnapshotter describes a snapshotter by its plugin, which containerd has loaded before
// this one.
func examinedSnapshotter(ic *plugin.InitContext, name string) doctor.Snapshotter {
	examined := doctor.Snapshotter{Name: name}
	loaded := ic.Plugins().Get(plugins.SnapshotPlugin, name)
	if loaded == nil {
		return examined
	}
	if _, err := loaded.Instance(); err == nil {
		examined.Loaded = true
		examined.Root = loaded.Meta.Exports[plugins.SnapshotterRootDir]
		examined.RemapIDs = slices.Contains(loaded.Meta.Capabilities, "remap-ids")
	}
	return examined
}

// examineLedger examines the open ledger.
func (c *Controller) examineLedger(rootDir, stateDir string) (doctor.Ledger, error) {
	l := doctor.Ledger{Dirs: []string{rootDir, stateDir}, Files: ledger.Files(rootDir, stateDir)}
	if c.ledger == nil {
		return l, c.degradedError()
	}
	aside, err := c.ledger.Aside()
	if err != nil {
		return l, err
	}
	l.Damaged = show.Damaged(c.ledger.Damage(), aside)
	if c.engine != nil {
		l.Pending = show.Pending(c.engine.List())
	}
	return l, nil
}

// examineAtStart examines the node once, and logs what is wrong.
func (c *Controller) examineAtStart(ctx context.Context) {
	if c.doctor == nil {
		return
	}
	begun := time.Now()
	logFindings(c.doctor.Examine(ctx), begun)
}

// logFindings logs a line per failure, and one that sums up the rest.
func logFindings(found []doctor.Finding, begun time.Time) {
	var warnings []string
	for _, f := range found {
		switch f.Status {
		case doctor.Fail:
			log.L.WithFields(log.Fields{"check": f.Check, "subject": f.Subject, "remedy": f.Remedy}).Errorf("doctor: %s: %s", f.Title(), f.Evidence)
		case doctor.Warn, doctor.Unknown:
			warnings = append(warnings, f.Title())
		}
	}
	log.L.WithFields(log.Fields{"warnings": warnings, "seconds": time.Since(begun).Seconds()}).
		Infof("doctor: made %d checks, with %d warnings; podfsm doctor shows them", len(found), len(warnings))
}
