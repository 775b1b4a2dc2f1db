// Command podfsm-deploy installs podfsm on the node of a Kubernetes cluster, and
// removes it, from a pod of the DaemonSet in deploy/helm.
//
// It is two programs in one. The one in the pod copies itself and podfsm's files
// to the host, starts the other one there, and labels the node. The one on the
// host replaces containerd. It runs as a transient unit of systemd, because it
// has to end its work, also a rollback, when the pod is deleted meanwhile.
//
//	podfsm-deploy install           in the pod: install podfsm, then wait for SIGTERM
//	podfsm-deploy uninstall         in the pod: remove podfsm, then wait for SIGTERM
//	podfsm-deploy ready             in the pod: whether install or uninstall has succeeded
//	podfsm-deploy switch install    on the host
//	podfsm-deploy switch uninstall  on the host
//	podfsm-deploy switch rollback   on the host, when one of the two has ended: roll back what it has left half-way
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"

	"golang.org/x/sys/unix"
)

// noPodStatus is the exit status of a switch after which podfsm runs, but not its pods.
const noPodStatus = 3

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	unix.Umask(0o022)
	err := run(ctx, strings.Join(os.Args[1:], " "))
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "podfsm-deploy:", printable(err.Error()))
	if errors.As(err, new(noPodError)) {
		os.Exit(noPodStatus)
	}
	os.Exit(1)
}

func run(ctx context.Context, command string) error {
	switch command {
	case "install":
		return newPod().install(ctx)
	case "uninstall":
		return newPod().uninstall(ctx)
	case "ready":
		_, err := os.Stat(readyFile)
		return err
	case "switch install", "switch uninstall", "switch rollback":
		return onThisHost(ctx, strings.TrimPrefix(command, "switch "))
	}
	return errors.New("usage: podfsm-deploy install | uninstall | ready | switch install | switch uninstall | switch rollback")
}
