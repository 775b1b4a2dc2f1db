package plugin

import (
	"sync"
	"sync/atomic"

	"github.com/containerd/log"
	nri "github.com/containerd/nri/pkg/api"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/runtime/protoiface"

	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

// containerd's service has no addresses of podfsm's pods and, after a restart, no pids to tell NRI
// plugins. There is no API to add them: the interfaces between the service, containerd's NRI plugin
// and NRI are internal to containerd. However, protobuf encodes each request to an NRI plugin by the
// method table of its type, which is public. Encoding first calls the method that measures the
// message, so podfsm completes the message there.

var (
	nriTables sync.Once
	nriPods   atomic.Pointer[func(*nri.PodSandbox)] // completes a pod
)

// completeNRI calls complete for each pod in each request to an NRI plugin, before the request is
// encoded. If complete panics, the pod stays as containerd's service has it.
func completeNRI(complete func(*nri.PodSandbox)) {
	protected := func(pod *nri.PodSandbox) {
		_ = lifecycle.Protect(func() error {
			complete(pod)
			return nil
		})
	}
	nriPods.Store(&protected)
	nriTables.Do(func() {
		messages := nri.File_pkg_api_api_proto.Messages()
		for i := range messages.Len() {
			hookNRI(messages.Get(i).FullName())
		}
	})
}

// hookNRI wraps the method that measures messages of a type, if the messages hold pods.
func hookNRI(name protoreflect.FullName) {
	message, err := protoregistry.GlobalTypes.FindMessageByName(name)
	if err != nil {
		return // a map entry
	}
	empty := message.Zero()
	if podsOf(empty) == nil {
		return
	}
	methods := empty.ProtoMethods()
	if methods == nil || methods.Size == nil {
		log.L.Warnf("NRI plugins do not get the addresses of pods from %s", name)
		return
	}
	size := methods.Size
	methods.Size = func(in protoiface.SizeInput) protoiface.SizeOutput {
		for _, pod := range podsOf(in.Message) {
			if pod != nil {
				(*nriPods.Load())(pod)
			}
		}
		return size(in)
	}
}

// podsOf returns the pods in a request, nil if its type has no pods.
func podsOf(message protoreflect.Message) []*nri.PodSandbox {
	switch request := message.Interface().(type) {
	case interface{ GetPod() *nri.PodSandbox }:
		return []*nri.PodSandbox{request.GetPod()}
	case interface{ GetPods() []*nri.PodSandbox }:
		return append([]*nri.PodSandbox{}, request.GetPods()...)
	default:
		return nil
	}
}

// completePod adds to a podfsm pod what NRI plugins see of a stock pod.
func (c *Controller) completePod(pod *nri.PodSandbox) {
	if c.engine == nil {
		return
	}
	view, ok := c.find(criKey(pod.GetId()))
	if !ok {
		return
	}
	pod.Ips = criSandbox(view).HadIPs
	if started, ok := view.Step(StartPause).Result.(*Pause); ok && pod.Pid == 0 && view.State == states.Ready {
		pod.Pid = started.Pid
	}
}
