package cri

import (
	"context"
	"errors"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Errors as runc 1.5 writes them.
func TestStartContainerSaysWhatToDo(t *testing.T) {
	const begin = "failed to start containerd task: runc create failed: unable to start container process: error during container init: "
	for name, test := range map[string]struct {
		failure string
		is      func(error) bool
		says    string
	}{
		"keys":   {begin + "unable to join session keyring: unable to create session key: disk quota exceeded", errdefs.IsResourceExhausted, "raise kernel.keys.maxkeys and kernel.keys.maxbytes (kernel.keys.root_maxkeys"},
		"user":   {begin + "cannot setuid to unmapped uid 70000 in user namespace", errdefs.IsInvalidArgument, "set runAsUser"},
		"group":  {begin + "cannot setgid to unmapped gid 70000 in user namespace", errdefs.IsInvalidArgument, "runAsGroup"},
		"groups": {begin + "setgroups: invalid argument", errdefs.IsInvalidArgument, "supplementalGroupsPolicy: Strict"},
		"disk":   {begin + "write /etc/mtab: disk quota exceeded", nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			failure := errors.New(test.failure)
			s := &stock{start: func(_ context.Context, r *runtime.StartContainerRequest) (*runtime.StartContainerResponse, error) {
				if r.GetContainerId() == "well" {
					return &runtime.StartContainerResponse{}, nil
				}
				return nil, failure
			}}
			front := newFront(t, s, &controller{pods: map[string]Pod{"s1": {Config: podConfig()}}, containers: map[string]string{"c1": "s1", "c2": "s2"}})
			start := func(id string) error {
				_, err := front.StartContainer(t.Context(), &runtime.StartContainerRequest{ContainerId: id})
				return err
			}
			require.NoError(t, start("well"))
			require.Same(t, failure, start("c2"), "another handler's")
			err := start("c1")
			require.ErrorIs(t, err, failure)
			if test.is == nil {
				require.Same(t, failure, err)
				return
			}
			require.True(t, test.is(err), "%v", err)
			require.ErrorContains(t, err, test.failure+"; ")
			require.ErrorContains(t, err, test.says)
		})
	}
}
