package cri

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/ledger/records"
)

type initializer interface{ IsInitialized() bool }

// instance has the form of containerd's CRI plugin, which serves what it embeds; instanceWithTCP that of one that serves TCP, too.
type instance struct {
	runtime.RuntimeServiceServer
	runtime.ImageServiceServer
	io.Closer
	initializer
}

type instanceWithTCP struct{ *instance }

func TestInstallRefusesWhatItDoesNotKnow(t *testing.T) {
	s := &stock{}
	for name, instance := range map[string]any{
		"nothing":           nil,
		"another type":      "cri",
		"a nil pointer":     (*instance)(nil),
		"a nil below":       instanceWithTCP{},
		"the runtime alone": &struct{ runtime.RuntimeServiceServer }{s},
		"without Close": &struct {
			runtime.RuntimeServiceServer
			runtime.ImageServiceServer
			initializer
		}{s, s, s},
		"without IsInitialized": &struct {
			runtime.RuntimeServiceServer
			runtime.ImageServiceServer
			io.Closer
		}{s, s, s},
		"nothing to embed": s,
		"no services":      &instance{Closer: s, initializer: s},
		"a copy":           instance{s, s, s, s},
	} {
		t.Run(name, func(t *testing.T) {
			err := Install(instance, &controller{}, time.Hour, Streaming{})
			require.True(t, errdefs.IsNotImplemented(err), "%v", err)
			require.ErrorContains(t, err, "unsupported CRI plugin")
		})
	}
}

// Every caller of the instance reaches the front: containerd's servers, and other plugins in the same daemon.
func TestInstallFront(t *testing.T) {
	for name, wrap := range map[string]func(*instance) any{
		"on the socket": func(in *instance) any { return in },
		"and by TCP":    func(in *instance) any { return instanceWithTCP{in} },
	} {
		t.Run(name, func(t *testing.T) {
			s := &stock{listed: []string{"s1"}}
			s.run = func(ctx context.Context, r *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
				require.True(t, records.OnNodeNetwork(r.GetConfig()))
				FromContext(ctx).SandboxID = "s1"
				return &runtime.RunPodSandboxResponse{PodSandboxId: "s1"}, nil
			}
			in := &instance{s, s, s, s}
			require.NoError(t, Install(wrap(in), &controller{}, time.Hour, Streaming{}))
			ran, err := in.RunPodSandbox(t.Context(), &runtime.RunPodSandboxRequest{Config: podConfig(), RuntimeHandler: "podfsm"})
			require.NoError(t, err)
			require.Equal(t, "s1", ran.GetPodSandboxId())
			_, err = in.RunPodSandbox(t.Context(), &runtime.RunPodSandboxRequest{RuntimeHandler: "nobody's"})
			require.ErrorIs(t, err, errUnknownHandler)
			require.Same(t, s, in.ImageServiceServer, "images are none of the front's business")
			require.NoError(t, in.Close())
			require.Equal(t, 1, s.closed)
		})
	}
}

func TestCloseEndsAllWhateverFails(t *testing.T) {
	failed := errors.New("no")
	s := &stock{}
	require.ErrorIs(t, closers{closeFunc(func() error { return failed }), s}.Close(), failed)
	require.Equal(t, 1, s.closed)
}

type closeFunc func() error

func (f closeFunc) Close() error { return f() }
