package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	server "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/defaults"
	containerd "github.com/containerd/containerd/v2/version"
	"github.com/urfave/cli/v3"
)

// placeFlags returns the flags that locate containerd. containerd's configuration replaces missing
// flags.
func placeFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{
			Name:  "config",
			Usage: "containerd's configuration, which names its socket and directories",
			Value: filepath.Join(defaults.DefaultConfigDir, "config.toml"),
		},
		&cli.StringFlag{
			Name:    "address",
			Usage:   "containerd's gRPC socket, instead of the configured one",
			Sources: cli.EnvVars("CONTAINERD_ADDRESS"),
		},
		&cli.StringFlag{
			Name:  "root-dir",
			Usage: "containerd's root directory, instead of the configured one",
		},
		&cli.StringFlag{
			Name:  "state-dir",
			Usage: "containerd's state directory, instead of the configured one",
		},
	}
}

// place has the socket and the directories of a containerd.
type place struct {
	address, root, state string
	// config is containerd's configuration. It is empty without a file, and if the file can't be
	// read; unread is the error then.
	config *server.Config
	unread error
}

// locate finds the containerd that cmd's flags or its configuration name. Defaults replace what
// neither names.
func locate(ctx context.Context, cmd *cli.Command) place {
	p := place{config: &server.Config{Version: containerd.ConfigVersion}}
	path := cmd.String("config")
	if _, err := os.Stat(path); err == nil || !errors.Is(err, os.ErrNotExist) || cmd.IsSet("config") {
		config := &server.Config{Version: containerd.ConfigVersion}
		if err := server.LoadConfig(ctx, path, config); err != nil {
			p.unread = fmt.Errorf("failed to read containerd's configuration %q: %w; correct it, or give --address, --root-dir and --state-dir, and --config=%s",
				path, err, os.DevNull)
		} else {
			p.config = config
		}
	}
	// crictl and the kubelet accept addresses with a scheme.
	p.address = strings.TrimPrefix(cmp.Or(cmd.String("address"), socketOf(p.config), defaults.DefaultAddress), "unix://")
	p.root = cmp.Or(cmd.String("root-dir"), p.config.Root, defaults.DefaultRootDir)
	p.state = cmp.Or(cmd.String("state-dir"), p.config.State, defaults.DefaultStateDir)
	return p
}

// rootLedger and stateLedger return the directories of the ledger.
func (p place) rootLedger() string  { return filepath.Join(p.root, ledgerDir) }
func (p place) stateLedger() string { return filepath.Join(p.state, ledgerDir) }
