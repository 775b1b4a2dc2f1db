package main

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v3"
)

// The exit statuses of podfsm. Scripts rely on them.
const (
	exitFailed   = 1
	exitLeft     = 2
	exitNoDaemon = 3
	exitNotFound = 4
	exitUsage    = 64
)

// exitStatuses explains the exit statuses in the order of their numbers.
var exitStatuses = []struct {
	status  int
	meaning string
}{
	{0, "The command did what it was asked for, and nothing is left to do."},
	{exitFailed, "The command failed. The error says why."},
	{exitLeft, "The command worked, and something is left to do: a leak, a failed check, a sandbox that keeps the node from being drained, a pending cleanup, a quarantined sandbox, or a degraded podfsm."},
	{exitNoDaemon, "No podfsm answered: the daemon is down, hangs, is a containerd without podfsm, or its podfsm can't serve running pods."},
	{exitNotFound, "No sandbox matches REF. For the commands of cleanups: no sandbox with a pending cleanup does, or no failed DEL is of the plugin."},
	{exitUsage, "The command line is wrong: an unknown command or flag, or an argument that is missing or too many."},
}

// isLeft reports whether an error is about something that is left to do.
func isLeft(err error) bool {
	return errors.As(err, new(leftError)) || errors.As(err, new(failedError)) || errors.As(err, new(undrainedError)) ||
		errors.As(err, new(pendingError)) || errors.As(err, new(troubleError))
}

// exitStatus returns the exit status of podfsm for err.
func exitStatus(err error) int {
	switch {
	case err == nil:
		return 0
	case isLeft(err):
		return exitLeft
	case errors.As(err, new(usageError)):
		return exitUsage
	case errors.As(err, new(notFoundError)) || errdefs.IsNotFound(err):
		return exitNotFound
	case errors.As(err, new(downError)), errors.As(err, new(timeoutError)), errors.As(err, new(unavailableError)), errors.As(err, new(stockError)):
		return exitNoDaemon
	default:
		return exitFailed
	}
}

// usageError says that the command line is wrong.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// notFoundError says that no sandbox matches a reference.
type notFoundError struct{ error }

// noArguments fails if the command has arguments.
func noArguments(cmd *cli.Command) error {
	if cmd.Args().Present() {
		return usagef("%s takes no arguments", cmd.Name)
	}
	return nil
}

// oneRef returns the only argument of the command.
func oneRef(cmd *cli.Command) (string, error) {
	if cmd.NArg() != 1 {
		return "", usagef("%s takes one argument: a pod's namespace/name or name, a sandbox id or its beginning", cmd.Name)
	}
	return cmd.Args().First(), nil
}

// optionalRef returns the only argument of the command, "" without an argument.
func optionalRef(cmd *cli.Command) (string, error) {
	if cmd.NArg() > 1 {
		return "", usagef("%s takes one argument at most: a pod's namespace/name or name, a sandbox id or its beginning", cmd.Name)
	}
	return cmd.Args().First(), nil
}
