// Command attack tries, from inside a container, what only the node's root may do. It is for tests only.
//
//	attack NAME [ARG...]
//
// It prints "done", or the name of the system call's error and what failed, such as "EPERM mount". What it makes it takes away again,
// as far as the attack isn't about what is left.
package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// attacks get their arguments by place.
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
	runtime.LockOSThread() // what an attack does to namespaces, it does to its thread
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

// number is an argument that the test made.
func number(arg string) int {
	n, err := strconv.Atoi(arg)
	if err != nil {
		panic(err)
	}
	return n
}
