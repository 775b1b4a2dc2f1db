package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	server "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/pelletier/go-toml/v2"
)

// daemonName is the program that replaces containerd.
const daemonName = "containerd-podfsm"

// dumpWait bounds the wait for the output of a program that has ended or was killed.
const dumpWait = time.Second

// findProgram finds the daemon beside this program or in PATH.
func findProgram() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	beside := filepath.Join(filepath.Dir(self), daemonName)
	if _, err := os.Stat(beside); err == nil {
		return beside, nil
	}
	found, err := exec.LookPath(daemonName)
	if err != nil {
		return "", fmt.Errorf("failed to find %s beside %q and in PATH: install podfsm's package, or run podfsm from the unpacked package", daemonName, self)
	}
	return found, nil
}

// dumpConfig returns the configuration as the daemon reads it: migrated from any version, with all
// imports and the defaults of all plugins. A program that takes longer than timeout is killed.
func dumpConfig(ctx context.Context, timeout time.Duration, program, path string) (*server.Config, error) {
	limited, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(limited, program, "--config", path, "config", "dump")
	cmd.WaitDelay = dumpWait
	out, err := cmd.Output()
	exit := new(exec.ExitError)
	switch {
	case ctx.Err() == nil && limited.Err() != nil:
		return nil, fmt.Errorf("no answer from %s config dump within %s", program, timeout)
	case errors.As(err, &exit) && lastLine(exit.Stderr) != "":
		return nil, errors.New(lastLine(exit.Stderr))
	case err != nil:
		return nil, fmt.Errorf("failed to run %s config dump: %w", program, err)
	}
	config := &server.Config{}
	if err := toml.Unmarshal(out, config); err != nil {
		return nil, fmt.Errorf("failed to read the output of %s config dump: %w", program, err)
	}
	return config, nil
}

func lastLine(text []byte) string {
	text = bytes.TrimSpace(text)
	return string(text[bytes.LastIndexByte(text, '\n')+1:])
}

// mainFile is the part of containerd's configuration file that podfsm reads.
type mainFile struct {
	Version int      `toml:"version"`
	Imports []string `toml:"imports"`
}

// readMainFile reads the file without its imports. A missing file is empty.
func readMainFile(path string) (file mainFile, missing bool, err error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return file, true, nil
	}
	if err != nil {
		return file, false, err
	}
	if err := toml.Unmarshal(text, &file); err != nil {
		return file, false, fmt.Errorf("failed to read %s: %w", path, err)
	}
	return file, false, nil
}

// dropIn returns the file with podfsm's handler that belongs to a configuration.
func dropIn(config string) string {
	return filepath.Join(filepath.Dir(config), "conf.d", "podfsm.toml")
}

// flagValue returns the value of a flag in a program's arguments: --NAME VALUE or --NAME=VALUE,
// with one dash or two.
func flagValue(args []string, names ...string) string {
	for i, arg := range args {
		name, value, joined := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		if !strings.HasPrefix(arg, "-") || !slices.Contains(names, name) {
			continue
		}
		if joined {
			return value
		}
		if i+1 < len(args) {
			return args[i+1]
		}
	}
	return ""
}
