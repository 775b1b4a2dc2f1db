package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// fault is a row of the table.
type fault struct {
	name, what string
	config     harness.Config
	prepare    func(ctx context.Context, s *scene) error // before the first look at the node
	happen     func(ctx context.Context, s *scene) error
	clear      func(ctx context.Context, s *scene) error // what else happens before the last restart
	fatal      bool                                      // containerd may not start any more
	varies     bool
	measure    func(ctx context.Context, handler string) (left string, err error) // instead of all that
}

// tries is how often the kubelet tries in a row.
const tries = 5

var faults = []fault{
	{
		name:   "CNI ADD and DEL fail",
		what:   "the second plugin of a chain fails ADD and DEL, and the kubelet tries to start the pod five times.",
		happen: startFails(map[string]string{"portmap.ADD": "error(no luck)", "portmap.DEL": "error(no luck)"}),
	},
	{
		name:   "CNI DEL fails once, while a start is taken back",
		what:   "ADD of the second plugin fails, and the first DEL, too; the next start succeeds.",
		happen: startFails(map[string]string{"portmap.ADD": "1*error(no luck)", "bridge.DEL": "1*error(no luck)"}),
	},
	{
		name:   "CNI DEL fails once with “not found”",
		what:   "the DEL of a running pod fails with “ippool not found”, once, when the pod is stopped.",
		happen: stopFails(map[string]string{"bridge.DEL": "1*error(ippool not found)"}),
	},
	{
		name:   "containerd killed while pods start",
		what:   "24 pods are started, one after the other, and containerd is killed (SIGKILL) 10 ms, 20 ms, … 240 ms after the request.",
		happen: killSweep,
		varies: true,
	},
	{
		name:   "shim killed",
		what:   "the shim of a running pod is killed (SIGKILL).",
		happen: killShim,
	},
	{
		name: "runc hangs",
		what: "`runc create` hangs; the kubelet gives up after 25 s (in truth 4 minutes; podfsm's `runtime_timeout` is 20 s here), and tries once more. " +
			"At last runc goes on.",
		config: harness.Config{TOML: fmt.Sprintf("[plugins.'io.containerd.podsandbox.controller.v1.podfsm']\n  runtime_timeout = %q\n", "20s")},
		happen: runcHangs,
	},
	{
		name:    "pause image gone",
		what:    "the pause image has been removed and can't be pulled; the kubelet tries five times.",
		prepare: removePause,
		happen:  startFails(nil),
	},
	{
		name: "disk full",
		what: "no space is left for podfsm's ledger, and for containerd's own database with the stock handler; the kubelet tries five times, " +
			"then there is space again.",
		prepare: smallDisk,
		happen:  diskFull,
	},
	{
		name: "reboot",
		what: "two pods run, and a third is being created, when all processes, mounts, network namespaces, links, cgroups and the state " +
			"directory go; the disk stays. At the end another pod comes and goes.",
		happen: reboot,
		clear:  runAnother,
	},
	{
		name: "one bad record",
		what: "two pods run. The record of a sandbox container is there twice, under another id; and a byte of podfsm's ledger is " +
			"wrong. Then containerd is restarted. At the end the second record is deleted.",
		happen: badRecord,
		clear:  deleteBadRecord,
		fatal:  true,
	},
	{
		name: "starts that fail, by the hundred",
		what: fmt.Sprintf("%d pods on host users fail in the runtime, which is a fake here, after %d that did so before; the heap is looked at after a garbage "+
			"collection. Less than %d bytes a start can't be told from nothing.", moreStarts, firstStarts, heapNoise/moreStarts),
		measure: heapOfFailedStarts,
		varies:  true,
	},
}

// scene is a node with the pods of one handler.
type scene struct {
	*harness.Node
	handler string
	disk    string // that is small
	pods    int
}

// run starts a new pod.
func (s *scene) run(ctx context.Context) (*harness.Pod, error) {
	s.pods++
	return s.RunPod(ctx, s.handler, s.PodConfig(fmt.Sprint("pod-", s.pods)))
}

// start starts a pod as the kubelet does: it tries again. That it fails is no error here.
func (s *scene) start(ctx context.Context) {
	s.pods++
	config := s.PodConfig(fmt.Sprint("pod-", s.pods))
	for range tries {
		if _, err := s.RunPod(ctx, s.handler, config); err == nil {
			return
		}
		config.Metadata.Attempt++
	}
}

// kubelet stops and removes all pods that are listed. It tries three times, and what fails for ever shows in the census.
func (s *scene) kubelet(ctx context.Context) error {
	for range 3 {
		list, err := s.Runtime.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
		if err != nil {
			return err
		}
		for _, item := range list.GetItems() {
			if _, err := s.Runtime.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: item.GetId()}); err == nil {
				_, _ = s.Runtime.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: item.GetId()})
			}
		}
	}
	return nil
}

func (s *scene) arm(points map[string]string) error {
	for point, program := range points {
		if err := s.Fault(point, program); err != nil {
			return err
		}
	}
	return nil
}

func startFails(points map[string]string) func(context.Context, *scene) error {
	return func(ctx context.Context, s *scene) error {
		if err := s.arm(points); err != nil {
			return err
		}
		s.start(ctx)
		return nil
	}
}

func stopFails(points map[string]string) func(context.Context, *scene) error {
	return func(ctx context.Context, s *scene) error {
		if _, err := s.run(ctx); err != nil {
			return err
		}
		if err := s.arm(points); err != nil {
			return err
		}
		return s.kubelet(ctx)
	}
}

func killSweep(ctx context.Context, s *scene) error {
	for i := range 24 {
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = s.run(ctx) // the call ends with the daemon, if not before
		}()
		time.Sleep(time.Duration(i+1) * 10 * time.Millisecond)
		if err := s.Kill(ctx); err != nil {
			return err
		}
		<-done
		if err := s.Start(ctx); err != nil {
			return err
		}
	}
	return nil
}

func killShim(ctx context.Context, s *scene) error {
	pod, err := s.run(ctx)
	if err != nil {
		return err
	}
	pid, err := pod.Pid(ctx)
	if err != nil {
		return err
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return err
	}
	_, rest, _ := strings.Cut(string(status), "\nPPid:")
	var shim int
	if _, err := fmt.Sscan(rest, &shim); err != nil {
		return err
	}
	if err := unix.Kill(shim, unix.SIGKILL); err != nil {
		return err
	}
	return s.kubelet(ctx)
}

func runcHangs(ctx context.Context, s *scene) error {
	if err := s.Fault("runc.create", "block"); err != nil {
		return err
	}
	for range 2 {
		ctx, cancel := context.WithTimeout(ctx, 25*time.Second)
		_, err := s.run(ctx)
		cancel()
		if err == nil {
			return errors.New("the pod has started, although runc hangs")
		}
	}
	return s.kubelet(ctx)
}

func removePause(ctx context.Context, s *scene) error {
	_, err := s.Images.RemoveImage(ctx, &runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: harness.PauseImage}})
	return err
}

// smallDisk mounts one over what the handler's sandboxes are recorded in.
func smallDisk(ctx context.Context, s *scene) error {
	s.disk = filepath.Join(s.Dir(), "root/io.containerd.metadata.v1.bolt")
	if s.handler == harness.PodfsmHandler {
		s.disk = filepath.Join(s.Dir(), "root/io.containerd.podsandbox.controller.v1.podfsm")
	}
	if err := s.Stop(ctx); err != nil {
		return err
	}
	content := os.DirFS(s.disk)
	dir, err := os.MkdirTemp(s.Dir(), "disk-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.CopyFS(dir, content); err != nil {
		return err
	}
	if err := unix.Mount("compare", s.disk, "tmpfs", 0, "size=2m"); err != nil {
		return err
	}
	if err := os.CopyFS(s.disk, os.DirFS(dir)); err != nil {
		return err
	}
	return s.Start(ctx)
}

func diskFull(ctx context.Context, s *scene) error {
	filler, err := os.Create(filepath.Join(s.disk, "filler"))
	if err != nil {
		return err
	}
	defer filler.Close()
	for {
		if _, err := filler.Write(make([]byte, 512)); errors.Is(err, unix.ENOSPC) {
			break
		} else if err != nil {
			return err
		}
	}
	s.start(ctx)
	return os.Remove(filler.Name())
}

func reboot(ctx context.Context, s *scene) error {
	for range 2 {
		if _, err := s.run(ctx); err != nil {
			return err
		}
	}
	if err := s.Fault("portmap.ADD", "1*block"); err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = s.run(ctx) // the call ends with the daemon
	}()
	if err := s.Faults.WaitReached(ctx, "portmap.ADD", 1); err != nil {
		return err
	}
	err := s.Reboot(ctx, false)
	<-done
	if err != nil {
		return err
	}
	return s.Start(ctx)
}

// runAnother runs and removes a pod. containerd then clears up, at its next start, what it finds of tasks on disk.
func runAnother(ctx context.Context, s *scene) error {
	pod, err := s.run(ctx)
	if err != nil {
		return err
	}
	return pod.StopAndRemove(ctx)
}

// badID is the id of a container that is a copy of another one.
const badID = "bad-record"

func badRecord(ctx context.Context, s *scene) error {
	pod, err := s.run(ctx)
	if err != nil {
		return err
	}
	if _, err := s.run(ctx); err != nil {
		return err
	}
	store := s.Containerd.ContainerService()
	record, err := store.Get(inCRI(ctx), pod.ID)
	if err != nil {
		return err
	}
	_, err = store.Create(inCRI(ctx), containers.Container{
		ID: badID, Labels: record.Labels, Image: record.Image, Runtime: record.Runtime, Spec: record.Spec, Extensions: record.Extensions,
	})
	if err != nil {
		return err
	}
	if err := s.Stop(ctx); err != nil {
		return err
	}
	ledger := filepath.Join(s.Dir(), "root/io.containerd.podsandbox.controller.v1.podfsm/ledger.log")
	content, err := os.ReadFile(ledger)
	if err != nil {
		return err
	}
	if at := strings.Index(string(content), pod.ID); at >= 0 { // only podfsm has its pods in there
		content[at] ^= 1
		if err := os.WriteFile(ledger, content, 0o600); err != nil {
			return err
		}
	}
	if err := s.Start(ctx); err != nil {
		return nil // it is looked at by the restart that comes next
	}
	return nil
}

func deleteBadRecord(ctx context.Context, s *scene) error {
	return s.Containerd.ContainerService().Delete(inCRI(ctx), badID)
}

func inCRI(ctx context.Context) context.Context { return namespaces.WithNamespace(ctx, "k8s.io") }
