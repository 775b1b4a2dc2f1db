// Package plugin makes podfsm a part of a containerd: importing it is all it takes.
//
//	import _ "github.com/podfsm/podfsm/plugin"
//
// It registers the sandbox controller "podfsm", the snapshotter "podfsm" and a small gRPC service for the CLI, and puts podfsm's
// front on containerd's CRI service. A runtime handler is podfsm's if its configuration says
// sandboxer = "podfsm". Everything else stays as it is.
package plugin

import (
	"fmt"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"

	// init wraps registered plugins, so these packages must be initialized first.
	_ "github.com/containerd/containerd/v2/plugins/cri"
	_ "github.com/containerd/containerd/v2/plugins/diff/walking/plugin"
	"github.com/containerd/containerd/v2/plugins/services"
	_ "github.com/containerd/containerd/v2/plugins/services/tasks"

	"github.com/podfsm/podfsm/cri"
)

//go:generate go run ./genconfig . ../docs/reference
//go:generate go run ./genstates ..

// Name is the sandboxer's name in a runtime handler's configuration, and the id of podfsm's plugins.
const Name = "podfsm"

// URI is the controller's name among containerd's plugins, and that of podfsm's section of the configuration.
const URI = "io.containerd.podsandbox.controller.v1." + Name

func init() {
	registry.Register(&plugin.Registration{
		Type: plugins.PodSandboxPlugin,
		ID:   Name,
		Requires: []plugin.Type{
			plugins.CRIServicePlugin,
			plugins.EventPlugin,
			plugins.InternalPlugin, // tracing: what is made first is closed last, so that the last spans are exported, too
			plugins.LeasePlugin,
			plugins.MountManagerPlugin,
			plugins.SandboxStorePlugin,
			plugins.ServicePlugin,
			plugins.ShimPlugin,
			plugins.SnapshotPlugin,
			plugins.TransferPlugin,
		},
		Config: sectionOf(defaultConfig()),
		InitFn: initController,
	})
	registry.Register(&plugin.Registration{
		Type:     plugins.GRPCPlugin,
		ID:       Name,
		Requires: []plugin.Type{plugins.PodSandboxPlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			controller, err := registered(ic)
			if err != nil {
				return nil, err
			}
			return &api{controller: controller}, nil
		},
	})
	registry.Register(&plugin.Registration{
		Type:   plugins.SnapshotPlugin,
		ID:     Name,
		Config: sectionOf(defaultSnapshotterConfig()),
		InitFn: initSnapshotter,
	})
	wrapStock()
}

// wrapStock registers all plugins again, with wrapped init functions of containerd's CRI service,
// task service and differ. The registry returns only copies and accepts an id once, so it has to be
// reset.
func wrapStock() {
	graph := registry.Graph(nil)
	registry.Reset()
	for _, r := range graph {
		switch {
		case r.Type == plugins.GRPCPlugin && r.ID == "cri":
			r.InitFn = fronted(r.InitFn)
		case r.Type == plugins.ServicePlugin && r.ID == services.TasksService:
			r.InitFn = withPauses(r.InitFn)
		case r.Type == plugins.DiffPlugin && r.ID == "walking":
			r.InitFn = comparing(r.InitFn)
		}
		registry.Register(&r)
	}
}

// fronted wraps the init function of containerd's CRI service. It fails only if that function
// fails: without the front, CRI still serves the pods of other handlers.
func fronted(stock func(*plugin.InitContext) (any, error)) func(*plugin.InitContext) (any, error) {
	return func(ic *plugin.InitContext) (any, error) {
		controller, err := registered(ic)
		if err != nil {
			log.G(ic.Context).WithError(err).Warn("sandbox controller not loaded, CRI front left out")
			return stock(ic)
		}
		instance, err := stock(controller.watching(ic))
		if err != nil {
			return instance, err
		}
		if err := cri.Install(instance, controller, controller.limits.unclaimed, readStreaming(ic)); err != nil {
			controller.refuse(fmt.Errorf("failed to put podfsm in front of the CRI service: %w", err))
			log.G(ic.Context).WithError(err).Error("podfsm is degraded")
		}
		return instance, nil
	}
}

// registered returns the controller that this containerd has loaded.
func registered(ic *plugin.InitContext) (*Controller, error) {
	instance, err := ic.GetByID(plugins.PodSandboxPlugin, Name)
	if err != nil {
		return nil, err
	}
	return instance.(*Controller), nil
}
