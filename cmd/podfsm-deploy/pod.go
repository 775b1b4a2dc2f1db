package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
)

const (
	// installedLabel is on the nodes that the RuntimeClass schedules pods to.
	installedLabel = "podfsm.io/installed"
	// readyFile tells the readiness probe that the work is done.
	readyFile = "/run/podfsm-deploy/ready"
	// shared is the directory of the host that the pod mounts, at the same path.
	shared = "/var/lib/podfsm-deploy"
	// image is where the image has podfsm's files.
	image = "/podfsm"
	// unit is the switch on the host: journalctl --unit podfsm-switch.
	unit = "podfsm-switch"
	// patchTimeout bounds the answer of the API server.
	patchTimeout = 30 * time.Second
)

// pod is the half in the pod.
type pod struct {
	out io.Writer
	// work has the host do what a command says.
	work func(ctx context.Context, command string) error
	// label sets installedLabel, or removes it if there is no value.
	label func(ctx context.Context, value *string) error
	// ready tells the readiness probe whether the work is done.
	ready func(done bool) error
}

func newPod() *pod {
	return &pod{
		out:   os.Stdout,
		work:  work,
		label: labelNode,
		ready: ready,
	}
}

// ready makes readyFile, or removes that of a container of the pod before this one.
func ready(done bool) error {
	if !done {
		return removeFile(readyFile)
	}
	return os.WriteFile(readyFile, nil, 0o600)
}

// install labels the node when a pod has run. A label from before stays while a
// new release is installed, and if that is rolled back: the older one runs pods. It
// goes if no pod runs.
func (p *pod) install(ctx context.Context) error {
	if err := p.ready(false); err != nil {
		return err
	}
	err := p.work(ctx, "install")
	if exit := new(exec.ExitError); errors.As(err, &exit) && exit.ExitCode() == noPodStatus {
		return errors.Join(err, p.label(ctx, nil))
	}
	if err != nil {
		return err
	}
	yes := "true"
	if err := p.label(ctx, &yes); err != nil {
		return err
	}
	return p.rest(ctx, "podfsm is installed, and the node is labelled "+installedLabel+"=true")
}

// uninstall takes the label away first, so that the scheduler sends no more pods.
func (p *pod) uninstall(ctx context.Context) error {
	if err := p.ready(false); err != nil {
		return err
	}
	if err := p.label(ctx, nil); err != nil {
		return err
	}
	if err := p.work(ctx, "uninstall"); err != nil {
		return err
	}
	return p.rest(ctx, "podfsm is not on the node")
}

// rest says that the work is done, and keeps the pod: a DaemonSet would start it
// again, and with it the work.
func (p *pod) rest(ctx context.Context, done string) error {
	fmt.Fprintln(p.out, done)
	if err := p.ready(true); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// work has the host do what a command says, and prints what the host has to say.
func work(ctx context.Context, command string) error {
	fmt.Printf("copying podfsm to %s on the host, after an earlier switch, if there is one, has ended\n", shared)
	if err := bring(ctx); err != nil {
		return fmt.Errorf("failed to copy podfsm to %q on the host: %w", shared, err)
	}
	fmt.Printf("the host does it, also without this pod: journalctl --unit %s\n", unit)
	done, printed := make(chan struct{}), make(chan error, 1)
	go func() { printed <- follow(os.Stdout, filepath.Join(shared, logName), done) }()
	err := onHost(ctx, switchCommand(command)...)
	close(done)
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("failed to see podfsm-deploy's %s to its end: the pod is stopped; the switch goes on", command)
	} else if err != nil {
		err = fmt.Errorf("failed to %s podfsm on the host: %w; the lines above say why", command, err)
	}
	return errors.Join(err, <-printed)
}

// switchCommand starts the switch on the host. Whatever ends the switch, systemd
// has a half-done one rolled back: without containerd, no pod could do that.
func switchCommand(command string) []string {
	program := filepath.Join(shared, programName)
	args := []string{
		"systemd-run", "--unit=" + unit, "--collect", "--wait", "--quiet",
		"--description=Switch containerd for podfsm",
		"--property=ExecStopPost=-" + program + " switch rollback",
		"--property=TimeoutStopSec=10min",
	}
	for _, name := range []string{addressVariable, forceVariable} {
		if value := os.Getenv(name); value != "" {
			args = append(args, "--setenv="+name+"="+value)
		}
	}
	return append(args, program, "switch", command)
}

// follow prints a file while it grows, until it is done.
func follow(out io.Writer, path string, done <-chan struct{}) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	for {
		select {
		case <-done:
			_, err := io.Copy(out, file)
			return err
		case <-time.After(pollInterval):
			if _, err := io.Copy(out, file); err != nil {
				return err
			}
		}
	}
}

// bring copies podfsm's files and this program to the host, and empties the log. It
// waits for a switch that an earlier pod has started, which uses them.
func bring(ctx context.Context) error {
	unlock, err := lock(ctx, shared)
	if err != nil {
		return err
	}
	defer unlock()
	payload := filepath.Join(shared, payloadName)
	// A switch never sees a part of the files.
	part := payload + ".part"
	if err := os.RemoveAll(part); err != nil {
		return err
	}
	if err := os.CopyFS(part, os.DirFS(image)); err != nil {
		return err
	}
	if err := os.RemoveAll(payload); err != nil {
		return err
	}
	if err := os.Rename(part, payload); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := copyFile(self, filepath.Join(shared, programName)); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(shared, logName), nil, 0o600)
}

// onHost runs a program in the mount namespace of the host's init, which is all
// that systemd-run needs of the host.
func onHost(ctx context.Context, args ...string) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread stays on the host, and ends with the goroutine
		if err := enterHost(); err != nil {
			result <- fmt.Errorf("failed to enter the host's mount namespace: %w; the pod has to be privileged, with hostPID", err)
			return
		}
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		result <- cmd.Run()
	}()
	return <-result
}

func enterHost() error {
	namespace, err := os.Open("/proc/1/ns/mnt")
	if err != nil {
		return err
	}
	defer namespace.Close()
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	return unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNS)
}

// labelNode labels the node that the pod is on.
func labelNode(ctx context.Context, value *string) error {
	config, err := rest.InClusterConfig()
	if err != nil {
		return err
	}
	return labelBy(ctx, config, os.Getenv("NODE_NAME"), value)
}

func labelBy(ctx context.Context, config *rest.Config, node string, value *string) error {
	if node == "" {
		return errors.New("failed to label the node: NODE_NAME is not set; the pod gets it from spec.nodeName")
	}
	client, err := metadata.NewForConfig(config)
	if err != nil {
		return err
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": map[string]*string{installedLabel: value}}})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patchTimeout)
	defer cancel()
	nodes := client.Resource(corev1.SchemeGroupVersion.WithResource("nodes"))
	if _, err := nodes.Patch(ctx, node, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return fmt.Errorf("failed to label node %q: %w", node, err)
	}
	return nil
}
