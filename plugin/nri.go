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

// containerd's service tells NRI plugins what its own notes say of a pod, and for a pod of ours these have no addresses, and after a
// restart no pid. There is no place to add them: the interfaces between the service, containerd's NRI plugin and NRI are internal to
// containerd. But every request to an NRI plugin is encoded by the method table of its type, which protobuf hands out. The first method
// that is called there measures the message, and podfsm completes the message before.

var (
	nriTables sync.Once
	nriPods   atomic.Pointer[func(*nri.PodSandbox)] // completes a pod
)

// completeNRI has complete called for each pod in each request to an NRI plugin, before the request is encoded. A panic of it leaves the pod
// as containerd's service has it.
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

// hookNRI puts podfsm before the method that measures messages of a type, if those hold pods.
func hookNRI(name protoreflect.FullName) {
	message, err := protoregistry.GlobalTypes.FindMessageByName(name)
	if err != nil {
		return // protobuf's own types of map entries
	}
	empty := message.Zero()
	if podsOf(empty) == nil {
		return
	}
	methods := empty.ProtoMethods()
	if methods == nil || methods.Size == nil {
		log.L.Warnf("podfsm: NRI plugins will not be told the addresses of pods by %s", name)
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

// podsOf are the pods that a request holds; nil for one of a type without pods.
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

// completePod tells NRI of a pod of ours what it would be told of a stock pod.
func (c *Controller) completePod(pod *nri.PodSandbox) {
	if c.engine == nil {
		return
	}
	view, ok := c.find(inFront(pod.GetId()))
	if !ok {
		return
	}
	pod.Ips = podOf(view).HadIPs
	if started, ok := view.Step(StartPause).Result.(*Pause); ok && pod.Pid == 0 && view.State == states.Ready {
		pod.Pid = started.Pid
	}
}
