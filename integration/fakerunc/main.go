// Command fakerunc stands in for runc in tests that need thousands of sandboxes: it obeys runc's command line, as far as
// containerd's shim uses it, at a small part of runc's cost. It is for tests only.
//
// What it makes is real: a process, a child of the shim once fakerunc has ended, in the cgroup, and in a user and a network
// namespace of its own where the bundle asks for them. All else of the bundle is ignored: the process is the pause program
// beside fakerunc, on the machine's root filesystem, and runs from create on, since nobody can see the difference.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"
)

// call is fakerunc's command line.
type call struct {
	command string
	args    []string          // the container's id and what follows it
	flags   map[string]string // those without a value have "true"
}

// switches are the flags of runc that have no value.
var switches = []string{"--all", "--debug", "--force", "--no-new-keyring", "--no-pivot", "--systemd-cgroup"}

func parse(args []string) call {
	c := call{flags: map[string]string{}}
	for i := 0; i < len(args); i++ {
		name, value, joined := strings.Cut(args[i], "=")
		switch {
		case !strings.HasPrefix(name, "-"):
			c.args = append(c.args, args[i])
		case joined:
			c.flags[name] = value
		case slices.Contains(switches, name) || i+1 == len(args):
			c.flags[name] = "true"
		default:
			i++
			c.flags[name] = args[i]
		}
	}
	if len(c.args) > 0 {
		c.command, c.args = c.args[0], c.args[1:]
	}
	return c
}

func main() {
	c := parse(os.Args[1:])
	err := c.run()
	if err == nil {
		return
	}
	// go-runc reads the reason from the log, and shows stderr if there is none.
	if log, openErr := os.OpenFile(c.flags["--log"], os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644); openErr == nil {
		_ = json.NewEncoder(log).Encode(map[string]string{"level": "error", "msg": err.Error()})
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func (c call) run() error {
	if c.command == "features" {
		return json.NewEncoder(os.Stdout).Encode(supported)
	}
	if len(c.args) == 0 {
		return fmt.Errorf("fakerunc has no command %q without a container", c.command)
	}
	b := box{root: c.flags["--root"], id: c.args[0]}
	switch c.command {
	case "create":
		return b.create(c.flags["--bundle"], c.flags["--pid-file"])
	case "start":
		return b.load()
	case "state":
		return b.printState()
	case "kill":
		signal := "SIGTERM"
		if len(c.args) > 1 {
			signal = c.args[1]
		}
		return b.kill(signal)
	case "delete":
		return b.delete(c.flags["--force"] == "true")
	}
	return fmt.Errorf("fakerunc has no command %q", c.command)
}

// supported is what containerd wants to see of a runtime before it gives it pods with user namespaces.
var supported = features.Features{
	OCIVersionMin: "1.0.0",
	OCIVersionMax: specs.Version,
	Linux: &features.Linux{
		Namespaces:      []string{string(specs.NetworkNamespace), string(specs.UserNamespace)},
		MountExtensions: &features.MountExtensions{IDMap: &features.IDMap{Enabled: new(true)}},
	},
}

// errGone and errNotRunning have the words by which the shim knows them.
var (
	errGone       = errors.New("container does not exist")
	errNotRunning = errors.New("container not running")
)
