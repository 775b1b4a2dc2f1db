package cni

import (
	"context"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
)

// request is a command to one plugin of a network that belongs to no pod.
type request struct {
	driver  *Driver
	list    *libcni.NetworkConfigList
	plugin  *libcni.PluginConfig
	binDirs []string
	values  map[string]any // of the configuration, besides the list's
}

func (r request) run(ctx context.Context, spanName, command string) (retErr error) {
	ctx, end := r.driver.begin(ctx, spanName, Command{Name: command, Plugin: r.plugin.Network.Type, Network: r.list.Name})
	defer func() { end(retErr) }()

	path, conf, err := prepare(r.list, r.plugin, r.binDirs, r.values)
	if err == nil {
		exec := &executor{driver: r.driver, run: run{id: noSandbox, command: command}}
		err = exec.withoutResult(ctx, path, conf, &invoke.Args{Command: command, Path: pathOf(r.binDirs)})
	}
	if err != nil {
		return failed(r.list, r.plugin.Network.Type, strings.ToLower(command), err)
	}
	return nil
}
