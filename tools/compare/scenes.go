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
	prepare    func(ctx context.Context, s *scene) error // before the first census of the node
	happen     func(ctx context.Context, s *scene) error
	clear      func(ctx context.Context, s *scene) error // runs before the last restart
	fatal      bool                                      // containerd may fail to start
	varies     bool
	measure    func(ctx context.Context, handler string) (left string, err error) // instead of all others
}

// tries is how often the kubelet tries in sequence.
const tries = 5

var faults = []fault{
	{
		name:   "CNI ADD and DEL fail",
		what:   "the second plugin of a chain fails ADD and DEL, and the kubelet tries to start the pod five times.",
		happen: startFails(map[string]string{"portmap.ADD": "error(no luck)", "portmap.DEL": "error(no luck)"}),
	},
	{
		name:   "CNI DEL fails once, during a rollback",
		what:   "ADD of the second plugin fails, and so does the first DEL. The next start succeeds.",
		happen: startFails(map[string]string{"portmap.ADD": "1*error(no luck)", "bridge.DEL": "1*error(no luck)"}),
	},
	{
		name:   "CNI DEL fails once with “not found”",
		what:   "the first DEL at the stop of a pod fails with “ippool not found”.",
		happen: stopFails(map[string]string{"bridge.DEL": "1*error(ippool not found)"}),
	},
	{
		name:   "containerd killed while pods start",
		what:   "24 pods start, one after the other, and SIGKILL ends containerd 10 ms, 20 ms, … 240 ms after the request.",
		happen: killSweep,
		varies: true,
	},
	{
		name:   "shim killed",
		what:   "SIGKILL ends the shim of a running pod.",
		happen: killShim,
	},
	{
		name: "runc hangs",
		what: "`runc create` hangs. The kubelet gives up after 25 s and tries once more (4 minutes in practice; podfsm's `runtime_timeout` is " +
			"20 s here). Then runc continues.",
		config: harness.Config{TOML: fmt.Sprintf("[plugins.'io.containerd.podsandbox.controller.v1.podfsm']\n  runtime_timeout = %q\n", "20s")},
		happen: runcHangs,
	},
	{
		name:    "pause image gone",
		what:    "the pause image is not there and can't be pulled. The kubelet tries five times.",
		prepare: removePause,
		happen:  startFails(nil),
	},
	{
		name: "disk full",
		what: "no space is left for podfsm's ledger, or, with the stock handler, for containerd's own database. The kubelet tries five times. " +
			"Then there is space again.",
		prepare: smallDisk,
		happen:  diskFull,
	},
	{
		name: "reboot",
		what: "two pods run and a third starts when all processes, mounts, network namespaces, links, cgroups and the state directory " +
			"disappear. The disk stays. At the end, another pod runs and is removed.",
		happen: reboot,
		clear:  runAnother,
	},
	{
		name: "one bad record",
		what: "two pods run. containerd's store gets a copy of a sandbox container's record under another id, and one byte of podfsm's " +
			"ledger changes. Then containerd restarts. At the end, the copy is deleted.",
		happen: badRecord,
		clear:  deleteBadRecord,
		fatal:  true,
	},
	{
		name: "hundreds of starts that fail",
		what: fmt.Sprintf("%d pods on host users fail in a fake runtime, after %d that failed before. The heap is measured after a garbage collection. "+
			"Less than %d bytes per start count as nothing.", moreStarts, firstStarts, heapNoise/moreStarts),
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

// start starts a pod like the kubelet, with retries. A failure is no error here.
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

// kubelet stops and removes all listed pods, with three tries. The census shows what fails every
// time.
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

// smallDisk mounts a small disk over the directory in which the handler's sandboxes are recorded.
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

// runAnother runs and removes a pod. At its next start, containerd then cleans up the tasks that it
// finds on disk.
func runAnother(ctx context.Context, s *scene) error {
	pod, err := s.run(ctx)
	if err != nil {
		return err
	}
	return pod.StopAndRemove(ctx)
}

// badID is the id of a copied container record.
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
		return nil // the next restart reads it
	}
	return nil
}

func deleteBadRecord(ctx context.Context, s *scene) error {
	return s.Containerd.ContainerService().Delete(inCRI(ctx), badID)
}

func inCRI(ctx context.Context) context.Context { return namespaces.WithNamespace(ctx, "k8s.io") }
