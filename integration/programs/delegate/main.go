// Command delegate is a CNI plugin for tests that delegates all work to another plugin, as
// flannel's does. It adds a GC, which the reference plugins lack: the delegate frees the addresses
// that host-local has given to invalid attachments.
//
// Its configuration has the delegate's under the key "delegate".
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
)

func main() {
	skel.PluginMainFuncs(skel.CNIFuncs{Add: add, Check: check, Del: del, GC: gc, Status: status}, version.All, "delegate, for tests")
}

// passed are the keys of the request that the delegate gets beside its own.
var passed = []string{"name", "cniVersion", "prevResult", "runtimeConfig"}

// delegate returns the type and the configuration of the delegate.
func delegate(stdin []byte) (plugin string, conf []byte, err error) {
	var request map[string]json.RawMessage
	if err := json.Unmarshal(stdin, &request); err != nil {
		return "", nil, err
	}
	var other map[string]json.RawMessage
	if err := json.Unmarshal(request["delegate"], &other); err != nil {
		return "", nil, fmt.Errorf("failed to read the key delegate: %w", err)
	}
	for _, key := range passed {
		if value, ok := request[key]; ok {
			other[key] = value
		}
	}
	if err := json.Unmarshal(other["type"], &plugin); err != nil {
		return "", nil, fmt.Errorf("failed to read the type of the delegate: %w", err)
	}
	conf, err = json.Marshal(other)
	return plugin, conf, err
}

func add(args *skel.CmdArgs) error {
	plugin, conf, err := delegate(args.StdinData)
	if err != nil {
		return err
	}
	result, err := invoke.DelegateAdd(context.Background(), plugin, conf, nil)
	if err != nil {
		return err
	}
	return result.Print()
}

func check(args *skel.CmdArgs) error {
	plugin, conf, err := delegate(args.StdinData)
	if err != nil {
		return err
	}
	return invoke.DelegateCheck(context.Background(), plugin, conf, nil)
}

func del(args *skel.CmdArgs) error {
	plugin, conf, err := delegate(args.StdinData)
	if err != nil {
		return err
	}
	return invoke.DelegateDel(context.Background(), plugin, conf, nil)
}

func status(args *skel.CmdArgs) error {
	plugin, conf, err := delegate(args.StdinData)
	if err != nil {
		return err
	}
	return invoke.DelegateStatus(context.Background(), plugin, conf, nil)
}

// gc deletes every invalid attachment that has an address of host-local.
func gc(args *skel.CmdArgs) error {
	var request struct {
		Name     string
		Valid    []types.GCAttachment `json:"cni.dev/valid-attachments"`
		Delegate struct {
			IPAM struct{ DataDir string }
		}
	}
	if err := json.Unmarshal(args.StdinData, &request); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(request.Delegate.IPAM.DataDir, request.Name, "*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, file := range files {
		owner, err := os.ReadFile(file)
		if err != nil || net.ParseIP(filepath.Base(file)) == nil {
			continue
		}
		id, ifName, _ := strings.Cut(strings.TrimSpace(string(owner)), "\r\n")
		if !slices.Contains(request.Valid, types.GCAttachment{ContainerID: id, IfName: ifName}) {
			errs = append(errs, stale(args, id, ifName))
		}
	}
	return errors.Join(errs...)
}

// stale deletes an attachment by the delegate. The environment names the container.
func stale(args *skel.CmdArgs, id, ifName string) error {
	for name, value := range map[string]string{"CNI_CONTAINERID": id, "CNI_IFNAME": ifName, "CNI_NETNS": ""} {
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	return del(args)
}
