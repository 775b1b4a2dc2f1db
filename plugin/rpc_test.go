package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/show"
)

// found is the id of the sandbox that the service finds.
func found(w *world, ref string) (string, error) {
	response, err := show.Inspect(ref, w.engine.List(), w.ended.read)
	return response.GetSandbox().GetId(), err
}

func TestFind(t *testing.T) {
	w := newWorld(t)
	w.run(t, "aaa1", named("web"))
	w.run(t, "aaa2", named("db"))
	w.run(t, "abc", named("web-2"))
	w.run(t, "bbb1", named("gone"))
	w.run(t, "aaa3", named("gone-too"))
	for _, id := range []string{"bbb1", "aaa3"} {
		require.NoError(t, w.Shutdown(inCRI(t), id))
	}
	// A pod whose name is the id of another.
	w.run(t, "ccc1", named("abc"))

	for ref, want := range map[string]string{
		"aaa1":             "aaa1",
		"abc":              "abc",
		"default/web":      "aaa1",
		"web":              "aaa1",
		"web-2":            "abc",
		"ab":               "abc",
		"default/abc":      "ccc1",
		"c":                "ccc1",
		"bbb1":             "bbb1",
		"b":                "bbb1",
		"gone":             "bbb1",
		"default/gone-too": "aaa3",
		"aaa3":             "aaa3",
	} {
		id, err := found(w, ref)
		require.NoError(t, err, "%q", ref)
		require.Equal(t, want, id, "%q", ref)
	}
	for ref, is := range map[string]func(error) bool{
		"":           errdefs.IsInvalidArgument,
		"aaa":        errdefs.IsInvalidArgument, // aaa3, which is gone, doesn't count
		"a":          errdefs.IsInvalidArgument,
		"other/web":  errdefs.IsNotFound,
		"/web":       errdefs.IsNotFound,
		"efault/web": errdefs.IsNotFound,
		"eb":         errdefs.IsNotFound,
		"x":          errdefs.IsNotFound,
	} {
		_, err := found(w, ref)
		require.True(t, is(err), "%q: %v", ref, err)
	}
	_, err := found(w, "aaa")
	require.ErrorContains(t, err, "aaa1 (default/web)")
	require.ErrorContains(t, err, "aaa2 (default/db)")
	require.NotContains(t, err.Error(), "aaa3")
}

func TestFindNamesOnlySome(t *testing.T) {
	w := newWorld(t)
	for i := range 12 {
		require.NoError(t, w.create(t, fmt.Sprintf("a%02d", i), named(fmt.Sprint("pod-", i))))
	}
	_, err := found(w, "a")
	require.True(t, errdefs.IsInvalidArgument(err))
	require.ErrorContains(t, err, "12 sandboxes")
	require.ErrorContains(t, err, "…")
}

func TestList(t *testing.T) {
	w := newWorld(t)
	service := &api{controller: w.Controller}
	response, err := service.List(t.Context(), &podfsmv1.ListRequest{})
	require.NoError(t, err)
	require.Empty(t, response.GetSandboxes())

	for _, id := range []string{"s3", "s1", "s2"} {
		w.run(t, id, named(id))
	}
	w.run(t, "gone")
	require.NoError(t, w.Shutdown(inCRI(t), "gone"))
	response, err = service.List(t.Context(), &podfsmv1.ListRequest{})
	require.NoError(t, err)
	var ids []string
	for _, s := range response.GetSandboxes() {
		ids = append(ids, s.GetId())
	}
	require.Equal(t, []string{"s3", "s1", "s2"}, ids, "the oldest first")
}

func TestInspect(t *testing.T) {
	w := newWorld(t)
	w.run(t, "s1")
	service := &api{controller: w.Controller}
	response, err := service.Inspect(t.Context(), &podfsmv1.InspectRequest{Ref: "web"})
	require.NoError(t, err)
	got, view := response.GetSandbox(), w.view(t, "s1")
	want := &podfsmv1.Sandbox{
		Id: "s1", ContainerdNamespace: "k8s.io",
		PodName: "web", PodNamespace: "default", PodUid: "u-1", Attempt: 2,
		State: "Ready", CreatedAt: timestamppb.New(view.Created), Since: timestamppb.New(view.Since),
		Ip: "10.0.0.2", AdditionalIps: []string{"fd00::2"}, Pid: 42,
		NetnsPath: "/run/netns/podfsm-s1", NetnsInode: 4026532000,
		Userns: &podfsmv1.UserNamespace{
			Uids: []*podfsmv1.IDMapping{{HostId: 131072, Length: 65536}},
			Gids: []*podfsmv1.IDMapping{{HostId: 131072, Length: 65536}},
		},
		Seq: 6,
	}
	require.True(t, proto.Equal(want, got), "%v", got)
	require.True(t, json.Valid([]byte(response.GetCniResult())), response.GetCniResult())

	require.Len(t, response.GetSteps(), len(creationPath()))
	for i, step := range response.GetSteps() {
		require.Equal(t, string(creationPath()[i]), step.GetName())
		require.Equal(t, "done", step.GetStatus())
		require.NotNil(t, step.GetStartedAt())
	}
	require.Equal(t, "42", response.GetSteps()[2].GetDetail()["pid"])
	require.Len(t, response.GetTransitions(), len(creationPath()))
	for i, transition := range response.GetTransitions() {
		require.EqualValues(t, i+1, transition.GetSeq())
		require.Equal(t, string(creationPath()[i]), transition.GetEvent())
	}

	require.NoError(t, w.Shutdown(inCRI(t), "s1"))
	response, err = service.Inspect(t.Context(), &podfsmv1.InspectRequest{Ref: "s1"})
	require.NoError(t, err, "what ended not long ago can still be looked at")
	require.Equal(t, "Removed", response.GetSandbox().GetState())
	require.Empty(t, response.GetSandbox().GetIp())
	require.Zero(t, response.GetSandbox().GetPid())
	require.Empty(t, response.GetSandbox().GetNetnsPath())
	require.Empty(t, response.GetCniResult())

	for ref, code := range map[string]codes.Code{"": codes.InvalidArgument, "x": codes.NotFound} {
		_, err := service.Inspect(t.Context(), &podfsmv1.InspectRequest{Ref: ref})
		require.Equal(t, code, grpcstatus.Code(err), "%q: %v", ref, err)
	}
}

func TestInspectPendingCleanups(t *testing.T) {
	w := newWorld(t)
	w.run(t, "s1")
	w.host.fail(AttachNetwork, errors.New("plugin says \xff"))
	require.Error(t, w.StopSandbox(t.Context(), "s1"))

	service := &api{controller: w.Controller}
	response, err := service.Inspect(t.Context(), &podfsmv1.InspectRequest{Ref: "s1"})
	require.NoError(t, err)
	_, err = proto.Marshal(response)
	require.NoError(t, err, "what a plugin writes must not keep the answer from being sent")
	pending := response.GetSandbox()
	require.NotEmpty(t, pending.GetError())
	require.Equal(t, "Stopped", pending.GetGoal())
	require.Len(t, pending.GetPendingCleanups(), 2)
	require.Equal(t, "attach_network", pending.GetPendingCleanups()[0].GetStep(), "in the order in which it will be tried")
	require.Contains(t, pending.GetPendingCleanups()[0].GetError(), "plugin says \uFFFD")
	require.NotZero(t, pending.GetPendingCleanups()[0].GetTries())
	require.NotNil(t, pending.GetPendingCleanups()[0].GetNextTry())
	require.Equal(t, "capture_netns", pending.GetPendingCleanups()[1].GetStep())

	// The next try waits for the test.
	reached, release := make(chan struct{}), make(chan struct{})
	w.host.mu.Lock()
	w.host.undo[AttachNetwork] = func(string) error {
		close(reached)
		<-release
		return nil
	}
	w.host.mu.Unlock()
	stopped := make(chan error, 1)
	go func() { stopped <- w.StopSandbox(context.Background(), "s1") }()
	<-reached
	response, err = service.Inspect(t.Context(), &podfsmv1.InspectRequest{Ref: "s1"})
	close(release)
	require.NoError(t, err)
	require.Equal(t, "Stopping", response.GetSandbox().GetState())
	require.Equal(t, "attach_network", response.GetSandbox().GetStep())
	assert.Empty(t, response.GetSandbox().GetGoal(), "only CleanupOwed has one")

	require.NoError(t, <-stopped)
	response, err = service.Inspect(t.Context(), &podfsmv1.InspectRequest{Ref: "s1"})
	require.NoError(t, err)
	require.Equal(t, "Stopped", response.GetSandbox().GetState())
	require.Empty(t, response.GetSandbox().GetPendingCleanups())
	assert.Empty(t, response.GetSandbox().GetGoal())
	assert.Empty(t, response.GetSandbox().GetError(), "the last try of everything has succeeded")
	for _, step := range response.GetSteps() {
		assert.Empty(t, step.GetError(), step.GetName())
	}
}

func TestInspectAFailure(t *testing.T) {
	w := newWorld(t)
	w.host.do[CaptureNetNS] = failing
	require.NoError(t, w.create(t, "s1"))
	_, err := w.Start(inCRI(t), "s1")
	require.Error(t, err)

	response, err := (&api{controller: w.Controller}).Inspect(t.Context(), &podfsmv1.InspectRequest{Ref: "s1"})
	require.NoError(t, err)
	require.Equal(t, "RolledBack", response.GetSandbox().GetState())
	require.Contains(t, response.GetSandbox().GetError(), "capture_netns")
	require.Contains(t, response.GetSteps()[3].GetError(), "no luck")
	require.Equal(t, "pending", response.GetSteps()[4].GetStatus())
	require.Nil(t, response.GetSteps()[4].GetStartedAt())
}

func TestAPIWhileDegraded(t *testing.T) {
	c := &Controller{stock: &stockConfig{}}
	c.refuse(errors.New("the ledger can't be opened"))
	service := &api{controller: c}
	_, err := service.List(t.Context(), &podfsmv1.ListRequest{})
	require.Equal(t, codes.Unavailable, grpcstatus.Code(err))
	require.ErrorContains(t, err, "the ledger can't be opened")
	_, err = service.Inspect(t.Context(), &podfsmv1.InspectRequest{Ref: "x"})
	require.Equal(t, codes.Unavailable, grpcstatus.Code(err))
	response, err := service.Status(t.Context(), &podfsmv1.StatusRequest{})
	require.NoError(t, err)
	require.Equal(t, "the ledger can't be opened", response.GetDegraded())
	require.NotEmpty(t, response.GetVersion())
	require.Nil(t, response.GetLastRecovery())
}
