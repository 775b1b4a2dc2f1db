package cni

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"

	"github.com/podfsm/podfsm/host"
)

// versionPipes bounds the wait for processes that a plugin leaves behind when it is asked for its
// versions.
const versionPipes = time.Second

// validations counts the networks that this process has validated.
var validations atomic.Int64

// Validate looks for the programs of a network's plugins and IPAM plugins, and asks each for its
// CNI versions (CNI specification, VERSION). It changes nothing. groups are those of the daemon,
// which removes their remains at its next start. With the zero value, Validate makes groups below
// the cgroup of this process.
//
// Errors: FailedPrecondition when no cgroup can be made, or, naming each plugin, when a plugin is
// missing, can't be run, or doesn't speak the network's version.
func Validate(ctx context.Context, groups host.Groups, config Config, network Network) error {
	list, err := network.list()
	if err != nil {
		return fmt.Errorf("invalid CNI configuration: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	if groups == (host.Groups{}) {
		if groups, err = host.GroupsBelow(fmt.Sprintf("podfsm-validate-%d-%d", os.Getpid(), validations.Add(1))); err != nil {
			return err
		}
		defer os.Remove(groups.Dir()) // missing if no plugin was run, busy if a plugin can't be killed
	}
	asking := &Driver{groups: groups, pipeTimeout: versionPipes}
	var errs []error
	for _, plugin := range programs(list) {
		if err := asking.validate(ctx, plugin, list.CNIVersion, config.BinDirs); err != nil {
			errs = append(errs, fmt.Errorf("plugin %q: %w: %w", plugin, err, errdefs.ErrFailedPrecondition))
		}
	}
	return errors.Join(errs...)
}

// programs returns the types of the plugins and IPAM plugins of a list, without duplicates.
func programs(list *libcni.NetworkConfigList) []string {
	var types []string
	for _, p := range list.Plugins {
		for _, plugin := range []string{p.Network.Type, p.Network.IPAM.Type} {
			if plugin != "" && !slices.Contains(types, plugin) {
				types = append(types, plugin)
			}
		}
	}
	return types
}

func (d *Driver) validate(ctx context.Context, plugin, version string, binDirs []string) error {
	path, err := invoke.FindInPath(plugin, binDirs)
	if err != nil {
		return err
	}
	exec := &executor{driver: d, run: run{id: noSandbox, command: "VERSION"}}
	info, err := invoke.GetVersionInfo(ctx, path, exec)
	exec.keep(ctx)
	if err != nil {
		return fmt.Errorf("%s can't be asked for its versions: %w", path, exec.unread(err))
	}
	if spoken := info.SupportedVersions(); version != "" && !slices.Contains(spoken, version) {
		return fmt.Errorf("%s speaks CNI %s, not %s", path, strings.Join(spoken, ", "), version)
	}
	return nil
}
