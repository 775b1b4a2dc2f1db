package plugin

import (
	"testing"

	nri "github.com/containerd/nri/pkg/api"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// encoded is what a plugin decodes.
func encoded(t *testing.T, message proto.Message) proto.Message {
	t.Helper()
	text, err := proto.Marshal(message)
	require.NoError(t, err)
	got := message.ProtoReflect().New().Interface()
	require.NoError(t, proto.Unmarshal(text, got))
	return got
}

func TestNRIPluginsAreToldAddresses(t *testing.T) {
	w := newWorld(t)
	w.run(t, "s1")
	completeNRI(w.completePod)
	completeNRI(w.completePod) // as another controller of this process would

	ours := func() *nri.PodSandbox { return &nri.PodSandbox{Id: "s1", Name: "web"} }
	theirs := func() *nri.PodSandbox { return &nri.PodSandbox{Id: "s2", Ips: []string{"10.9.9.9"}, Pid: 7} }
	want := &nri.PodSandbox{Id: "s1", Name: "web", Ips: []string{"10.0.0.2", "fd00::2"}, Pid: 42}
	for _, request := range []interface {
		proto.Message
		GetPod() *nri.PodSandbox
	}{
		&nri.RunPodSandboxRequest{Pod: ours()},
		&nri.CreateContainerRequest{Pod: ours(), Container: &nri.Container{Id: "c1"}},
		&nri.RemovePodSandboxRequest{Pod: ours()},
		&nri.StateChangeEvent{Pod: ours()},
	} {
		got := encoded(t, request).(interface{ GetPod() *nri.PodSandbox }).GetPod()
		require.True(t, proto.Equal(want, got), "%T: %v", request, got)
		require.True(t, proto.Equal(encoded(t, request), encoded(t, request)), "for the next plugin, too")
	}
	got := encoded(t, &nri.SynchronizeRequest{Pods: []*nri.PodSandbox{theirs(), ours(), {}}}).(*nri.SynchronizeRequest)
	require.Len(t, got.GetPods(), 3)
	require.True(t, proto.Equal(theirs(), got.GetPods()[0]), "a pod of another handler")
	require.True(t, proto.Equal(want, got.GetPods()[1]))
	require.True(t, proto.Equal(&nri.PodSandbox{}, got.GetPods()[2]))
	require.NotPanics(t, func() { encoded(t, &nri.StopPodSandboxRequest{}) })

	require.NoError(t, w.Stop(inCRI(t), "s1"))
	got2 := encoded(t, &nri.StopPodSandboxRequest{Pod: ours()}).(*nri.StopPodSandboxRequest).GetPod()
	require.Equal(t, []string{"10.0.0.2", "fd00::2"}, got2.GetIps(), "which it has had")
	require.Zero(t, got2.GetPid(), "it has ended")

	completeNRI(func(*nri.PodSandbox) { panic("a bug of the completion") })
	stopped := encoded(t, &nri.StopPodSandboxRequest{Pod: ours()}).(*nri.StopPodSandboxRequest).GetPod()
	require.True(t, proto.Equal(ours(), stopped), "%v", stopped)

	completeNRI((&Controller{}).completePod)
	require.Empty(t, encoded(t, &nri.RunPodSandboxRequest{Pod: ours()}).(*nri.RunPodSandboxRequest).GetPod().GetIps())
}

// Every message of NRI's that has a pod in it, anywhere, is one that podfsm completes.
func TestNoNRIRequestIsForgotten(t *testing.T) {
	pod := (&nri.PodSandbox{}).ProtoReflect().Descriptor().FullName()
	count := 0
	messages := nri.File_pkg_api_api_proto.Messages()
	for i := range messages.Len() {
		fields := messages.Get(i).Fields()
		for j := range fields.Len() {
			if m := fields.Get(j).Message(); m == nil || m.FullName() != pod {
				continue
			}
			count++
			message, err := protoregistry.GlobalTypes.FindMessageByName(messages.Get(i).FullName())
			require.NoError(t, err)
			filled := message.New()
			if field := fields.Get(j); field.IsList() {
				filled.Mutable(field).List().Append(protoreflect.ValueOfMessage((&nri.PodSandbox{}).ProtoReflect()))
			} else {
				filled.Set(field, protoreflect.ValueOfMessage((&nri.PodSandbox{}).ProtoReflect()))
			}
			require.Len(t, podsOf(filled), 1, messages.Get(i).FullName())
		}
	}
	require.Greater(t, count, 12)
}
