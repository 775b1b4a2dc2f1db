package cri

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// logged collects what is logged with the context.
func logged(ctx context.Context) (context.Context, *bytes.Buffer) {
	var out bytes.Buffer
	logger := logrus.New()
	logger.SetOutput(&out)
	logger.SetLevel(logrus.DebugLevel)
	return log.WithLogger(ctx, logrus.NewEntry(logger).WithField("caller", "kubelet")), &out
}

// containerd's service says that the network is gone before podfsm has taken it down. The log has that line when it is true.
func TestTornDownIsSaidAfterDEL(t *testing.T) {
	const line = `TearDown network for sandbox \"s1\" successfully`
	says := func(ctx context.Context, of string) {
		log.G(ctx).Infof("TearDown network for sandbox %q successfully", of)
		log.G(ctx).WithField("id", of).Debug("all else is said")
	}
	owed := errors.New("DEL failed")
	for name, tc := range map[string]struct {
		call func(*service, context.Context) error
		err  error
		want int
	}{
		"stop": {func(s *service, ctx context.Context) error {
			_, err := s.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: "s1"})
			return err
		}, nil, 1},
		"stop that fails": {func(s *service, ctx context.Context) error {
			_, err := s.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: "s1"})
			return err
		}, owed, 0},
		"removal": {func(s *service, ctx context.Context) error {
			_, err := s.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: "s1"})
			return err
		}, nil, 1},
		"removal that fails": {func(s *service, ctx context.Context) error {
			_, err := s.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: "s1"})
			return err
		}, owed, 0},
		"pod that is gone already": {func(s *service, ctx context.Context) error {
			_, err := s.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: "gone"})
			return err
		}, nil, 0},
		"another handler's pod": {func(s *service, ctx context.Context) error {
			_, err := s.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: "s2"})
			return err
		}, nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, out := logged(t.Context())
			s := &stock{
				stop: func(ctx context.Context, r *runtime.StopPodSandboxRequest) (*runtime.StopPodSandboxResponse, error) {
					says(ctx, r.GetPodSandboxId())
					return &runtime.StopPodSandboxResponse{}, nil
				},
				remove: func(ctx context.Context, r *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error) {
					if r.GetPodSandboxId() != "gone" {
						says(ctx, r.GetPodSandboxId())
					}
					return &runtime.RemovePodSandboxResponse{}, nil
				},
			}
			c := &controller{pods: map[string]Pod{"s1": {Config: podConfig()}, "gone": {Config: podConfig()}}}
			early := func(context.Context, string) error {
				require.NotContains(t, out.String(), line, "before DEL")
				return tc.err
			}
			c.stop, c.remove = early, early
			require.ErrorIs(t, tc.call(newFront(t, s, c), ctx), tc.err)
			require.Equal(t, tc.want, strings.Count(out.String(), line), out.String())
			require.NotContains(t, out.String(), `\"gone\"`)
			if name == "pod that is gone already" {
				return
			}
			require.Regexp(t, `level=debug msg="all else is said" caller=kubelet id=s\d`, out.String())
			if name == "another handler's pod" {
				require.Contains(t, out.String(), `level=info msg="TearDown network for sandbox \"s2\" successfully" caller=kubelet`)
			}
		})
	}
}
