package cri

import (
	"context"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Errors as runc 1.5 writes them.
func TestStartContainerSaysWhatToDo(t *testing.T) {
	const begin = "failed to start containerd task: runc create failed: unable to start container process: error during container init: "
	for name, test := range map[string]struct {
		failure string
		code    codes.Code
		says    string
	}{
		"keys":      {begin + "unable to join session keyring: unable to create session key: disk quota exceeded", codes.ResourceExhausted, "raise kernel.keys.maxkeys and kernel.keys.maxbytes (kernel.keys.root_maxkeys"},
		"user":      {begin + "cannot setuid to unmapped uid 70000 in user namespace", codes.InvalidArgument, "set runAsUser"},
		"group":     {begin + "cannot setgid to unmapped gid 70000 in user namespace", codes.InvalidArgument, "runAsGroup"},
		"groups":    {begin + "setgroups: invalid argument", codes.InvalidArgument, "supplementalGroupsPolicy: Strict"},
		"wrapped":   {begin + "unable to setup user: cannot setuid to unmapped uid 70000 in user namespace", codes.InvalidArgument, "set runAsUser"},
		"own words": {begin + `exec: "setgroups: invalid argument": no such file`, codes.Unknown, ""},
		"own keys":  {begin + `exec: "session key": disk quota exceeded`, codes.Unknown, ""},
		"repeated":  {begin + `exec: "error during container init: setgroups: invalid argument": no such file`, codes.Unknown, ""},
		"later":     {"failed to start containerd task: hook: setgroups: invalid argument", codes.Unknown, ""},
		"disk":      {begin + "write /etc/mtab: disk quota exceeded", codes.Unknown, ""},
	} {
		t.Run(name, func(t *testing.T) {
			failure := fmt.Errorf("%s: %w", test.failure, errdefs.ErrUnknown)
			s := &stock{start: func(_ context.Context, r *runtime.StartContainerRequest) (*runtime.StartContainerResponse, error) {
				if r.GetContainerId() == "well" {
					return &runtime.StartContainerResponse{}, nil
				}
				return nil, failure
			}}
			front := newFront(t, s, &controller{pods: map[string]Sandbox{"s1": {Config: podConfig(), Mapped: true}, "s3": {Config: podConfig()}}, containers: map[string]string{"c1": "s1", "c2": "s2", "c3": "s3"}})
			start := func(id string) error {
				_, err := front.StartContainer(t.Context(), &runtime.StartContainerRequest{ContainerId: id})
				return err
			}
			require.NoError(t, start("well"))
			require.Same(t, failure, start("c2"), "another handler's")
			if test.code == codes.InvalidArgument {
				require.Same(t, failure, start("c3"), "on the node's users")
			}
			err := start("c1")
			require.ErrorIs(t, err, failure)
			if test.code == codes.Unknown {
				require.Same(t, failure, err)
				return
			}
			require.Equal(t, test.code, status.Code(errgrpc.ToGRPC(err)))
			require.ErrorContains(t, err, failure.Error()+"; ")
			require.ErrorContains(t, err, test.says)
		})
	}
}
