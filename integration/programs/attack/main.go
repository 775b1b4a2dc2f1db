// Command attack tries, from inside a container, what only root of the node may do. It is for tests
// only.
//
//	attack NAME [ARG...]
//
// It prints "done", or the error of the failed system call, such as "EPERM mount". It removes what
// it makes, unless the attack is about what is left.
package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// attacks are the attacks by name. They get their arguments by position.
var attacks = map[string]func(args []string) error{
	"agent-of-new-hierarchy":  agentOfNewHierarchy,
	"agent-of-host-hierarchy": agentOfHostHierarchy,
	"open-file":               openFile,
	"chown-file":              chownFile,
	"open-by-handle":          openByHandle,
	"make-immutable":          makeImmutable,
	"stop-process":            stopProcess,
	"trace-process":           traceProcess,
	"read-memory":             readMemory,
	"load-module":             loadModule,
	"load-program":            loadProgram,
	"make-device":             makeDevice,
	"mount-device":            mountDevice,
	"resize-tmpfs":            resizeTmpfs,
	"mount-on":                mountOn,
	"enter-netns":             enterNetNS,
	"rule-network":            ruleNetwork,
	"set-clock":               setClock,
	"raise-priority":          raisePriority,
	"watch-processor":         watchProcessor,
	"hang-in-kernel":          hangInKernel,
	"write-to-map":            writeToMap,
	"be-many":                 beMany,
	"pose-as":                 poseAs,
}

func main() {
	if comm := os.Getenv(posing); comm != "" {
		pose(comm)
	}
	runtime.LockOSThread() // attacks change namespaces of their thread only
	attack, ok := attacks[os.Args[1]]
	if !ok {
		fmt.Fprintf(os.Stderr, "attack: there is no attack %q\n", os.Args[1])
		os.Exit(2)
	}
	err := attack(os.Args[2:])
	var errno unix.Errno
	var what *failure
	switch {
	case err == nil:
		fmt.Println("done")
	case errors.As(err, &errno) && errors.As(err, &what):
		fmt.Println(unix.ErrnoName(errno), what.what)
	default:
		fmt.Fprintln(os.Stderr, "attack:", err)
		os.Exit(1)
	}
}

// failure is a system call of an attack that failed.
type failure struct {
	what string
	err  error
}

func (f *failure) Error() string { return f.what + ": " + f.err.Error() }

func (f *failure) Unwrap() error { return f.err }

// failed is nil when err is.
func failed(what string, err error) error {
	if err == nil {
		return nil
	}
	return &failure{what, err}
}

// number returns a numeric argument. The test made it, so it is valid.
func number(arg string) int {
	n, err := strconv.Atoi(arg)
	if err != nil {
		panic(err)
	}
	return n
}
