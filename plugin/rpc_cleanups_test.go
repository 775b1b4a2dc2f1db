package plugin

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/states"
)

func TestCleanupsOfOneSandbox(t *testing.T) {
	w := newWorld(t)
	w.wait = time.Hour
	service := &api{controller: w.Controller}
	retry := func(ref string) (*podfsmv1.CleanupResponse, error) {
		return service.RetryCleanup(t.Context(), &podfsmv1.RetryCleanupRequest{Ref: ref})
	}
	for attempt, id := range []string{"aaa1", "aaa2", "bbb"} {
		w.run(t, id, named("web"), func(c *runtime.PodSandboxConfig) { c.Metadata.Attempt = uint32(attempt) })
		w.host.fail(AttachNetwork, errNoLuck)
		if id != "bbb" {
			require.Error(t, w.Stop(inCRI(t), id))
		}
		w.host.heal(AttachNetwork)
	}
	for ref, code := range map[string]codes.Code{
		"bbb":         codes.NotFound, // nothing is pending
		"unknown":     codes.NotFound,
		"":            codes.InvalidArgument,
		"default/web": codes.InvalidArgument, // two sandboxes of one pod
		"aaa":         codes.InvalidArgument,
	} {
		_, err := retry(ref)
		require.Equal(t, code, grpcstatus.Code(err), "%q: %v", ref, err)
	}

	w.host.fail(AttachNetwork, errNoLuck)
	response, err := retry("aaa1")
	require.NoError(t, err)
	require.Contains(t, response.GetError(), "no luck")
	require.Equal(t, "attach_network", response.GetSandbox().GetPendingCleanups()[0].GetStep())
	require.NotNil(t, response.GetSandbox().GetPendingCleanups()[0].GetNextTry())
	w.host.heal(AttachNetwork)
	response, err = retry("aaa1")
	require.NoError(t, err)
	require.Empty(t, response.GetError())
	require.Empty(t, response.GetSandbox().GetPendingCleanups())
	require.Equal(t, states.Stopped, w.view(t, "aaa1").State)
	response, err = retry("default/web")
	require.NoError(t, err, "the only one that is left")
	require.Equal(t, "aaa2", response.GetSandbox().GetId())
}

// A write-off is in an event, in a metric and in what is shown of the sandbox, also when that has ended.
func TestWriteOffIsTold(t *testing.T) {
	w := newWorld(t)
	w.wait = time.Hour
	w.run(t, "s1", named("web"))
	w.host.fail(AttachNetwork, errNoLuck)
	require.Error(t, w.Shutdown(inCRI(t), "s1"))
	service := &api{controller: w.Controller}
	for name, invalid := range map[string]*podfsmv1.WriteOffCleanupRequest{
		"no reason":                {Ref: "default/web", All: true},
		"a blank reason":           {Ref: "default/web", All: true, Reason: " \t"},
		"neither a plugin nor all": {Ref: "default/web", Reason: "gone"},
		"both":                     {Ref: "default/web", Plugin: "sbr", All: true, Reason: "gone"},
		"a name without namespace": {Ref: "web", All: true, Reason: "gone"},
		"a part of the id":         {Ref: "s", All: true, Reason: "gone"},
	} {
		_, err := service.WriteOffCleanup(t.Context(), invalid)
		require.Equal(t, codes.InvalidArgument, grpcstatus.Code(err), "%s: %v", name, err)
	}
	request := &podfsmv1.WriteOffCleanupRequest{Ref: "default/web", Plugin: "sbr", Reason: "the agent is gone"}
	_, err := service.WriteOffCleanup(t.Context(), request)
	require.Equal(t, codes.NotFound, grpcstatus.Code(err))
	request.Plugin, request.All = "", true
	response, err := service.WriteOffCleanup(t.Context(), request)
	require.NoError(t, err)
	require.Empty(t, response.GetError())
	require.Equal(t, "Removed", response.GetSandbox().GetState())
	require.Empty(t, response.GetSandbox().GetPendingCleanups())

	require.Equal(t, map[string]float64{"operator attach_network": 1}, gathered(t, w.meters, "cleanups_written_off_total"))
	w.publishing.flush(t.Context())
	events := w.published.writeOffs()
	require.Len(t, events, 1)
	require.NotNil(t, events[0].GetAt())
	events[0].At = nil
	require.True(t, proto.Equal(&podfsmv1.SandboxWriteOff{
		SandboxId: "s1", ContainerdNamespace: "k8s.io", PodName: "web", PodNamespace: "default", PodUid: "u-1", Attempt: 2,
		Step: "attach_network", By: "operator", Reason: "the agent is gone",
		Error: `undo of step attach_network of pod "default/web" failed: no luck: unavailable`,
	}, events[0]), "%v", events[0])
	inspection, err := service.Inspect(t.Context(), &podfsmv1.InspectRequest{Ref: "s1"})
	require.NoError(t, err)
	tries := inspection.GetTries()
	var given *podfsmv1.Try
	for _, try := range tries {
		if try.GetKind() == "write-off" {
			given = try
		}
	}
	require.Equal(t, "the agent is gone", given.GetReason())
	require.Equal(t, "attach_network", given.GetStep())
	require.NotNil(t, given.GetStartedAt())
}
