// Command faultwrap replaces runc or a CNI plugin under its name, and makes its commands fail, wait
// or die by the programs of package faults.
//
// A command passes the point NAME.COMMAND before the real program runs, such as "runc.create" or
// "bridge.ADD", and NAME.COMMAND.after when it has run. The real program is real/NAME in the
// control directory.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/podfsm/podfsm/integration/faults"
)

// The CNI specification leaves codes from 100 on to plugins, and has one of its
// own for a plugin that can't take pods (section 5, "Error").
const (
	cniCodeFailure     = 100
	cniCodeUnavailable = 50
)

var runcCommands = []string{"create", "start", "kill", "delete", "state", "exec", "ps", "pause", "resume", "update", "features", "run"}

func main() {
	os.Exit(run(context.Background()))
}

func run(ctx context.Context) int {
	dir := os.Getenv(faults.Env)
	if dir == "" {
		fmt.Fprintf(os.Stderr, "faultwrap: %s is not set\n", faults.Env)
		return 1
	}
	name := filepath.Base(os.Args[0])
	point := name + "." + command()
	real := filepath.Join(dir, "real", name)

	if err := faults.Hit(ctx, point); err != nil {
		return fail(err)
	}
	if !armed(faults.Dir(dir), point+".after") {
		return fail(syscall.Exec(real, append([]string{real}, os.Args[1:]...), os.Environ()))
	}
	return runThenHit(ctx, real, point+".after")
}

func armed(d faults.Dir, point string) bool {
	points, err := d.Points()
	return err == nil && slices.Contains(points, point)
}

// runThenHit delays the answer of a CNI plugin until the point is passed. runc keeps its stdout,
// which is that of the container.
func runThenHit(ctx context.Context, real, point string) int {
	var answer bytes.Buffer
	cmd := exec.CommandContext(ctx, real, os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if isPlugin() {
		cmd.Stdout = &answer
	}
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		return fail(err)
	}
	if err := faults.Hit(ctx, point); err != nil {
		return fail(err)
	}
	_, _ = os.Stdout.Write(answer.Bytes())
	return cmd.ProcessState.ExitCode()
}

func isPlugin() bool { return os.Getenv("CNI_COMMAND") != "" }

// command returns the command: CNI_COMMAND, or the first argument of runc after its global flags.
func command() string {
	if isPlugin() {
		return os.Getenv("CNI_COMMAND")
	}
	for _, arg := range os.Args[1:] {
		if slices.Contains(runcCommands, arg) {
			return arg
		}
	}
	return "other"
}

// fail reports err as the real program would: a CNI plugin by a JSON object on stdout, runc by a
// line in its log, which the shim requested in JSON.
func fail(err error) int {
	out, answer := os.Stdout, map[string]any{"cniVersion": "1.0.0", "code": cniCodeFailure, "msg": err.Error()}
	if os.Getenv("CNI_COMMAND") == "STATUS" {
		answer["code"] = cniCodeUnavailable
	}
	if !isPlugin() {
		out, answer = runcLog(), map[string]any{"level": "error", "msg": err.Error()}
	}
	_ = json.NewEncoder(out).Encode(answer)
	return 1
}

// runcLog opens the file that runc's flag --log names.
func runcLog() *os.File {
	if i := slices.Index(os.Args, "--log"); i > 0 && i+1 < len(os.Args) {
		if f, err := os.OpenFile(os.Args[i+1], os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644); err == nil {
			return f
		}
	}
	return os.Stderr
}
