package cri

import (
	"context"
	"fmt"
	"regexp"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// hints are what to do about errors of the OCI runtime that don't say it, and what class of errors they are.
var hints = []struct {
	failure *regexp.Regexp
	remedy  string
	class   error
}{
	{
		regexp.MustCompile(`session key.*disk quota exceeded`),
		"the container's user has as many keys as the kernel allows, one of each of its containers among them, in all pods with that user; " +
			"raise kernel.keys.maxkeys and kernel.keys.maxbytes (kernel.keys.root_maxkeys and kernel.keys.root_maxbytes for the node's root)",
		errdefs.ErrResourceExhausted,
	},
	{
		// By a name, which only the image's own files tell the id of; any other id is refused before the container is made.
		regexp.MustCompile(`to unmapped [ug]id \d+ in user namespace|setgroups: invalid argument`),
		"its image gives the container an id beyond those of the pod's user namespace; set runAsUser, runAsGroup and supplementalGroupsPolicy: Strict, " +
			"or run the pod on the node's users",
		errdefs.ErrInvalidArgument,
	},
}

// StartContainer says what to do where the OCI runtime doesn't.
func (s *service) StartContainer(ctx context.Context, r *runtime.StartContainerRequest) (*runtime.StartContainerResponse, error) {
	resp, err := s.RuntimeServiceServer.StartContainer(ctx, r)
	if err == nil {
		return resp, nil
	}
	hinted := withHint(err)
	if hinted == err {
		return nil, err
	}
	if _, ours, findErr := s.sandboxes.PodOfContainer(ctx, r.GetContainerId()); findErr != nil || !ours {
		return nil, err
	}
	return nil, hinted
}

// withHint is err with what to do about it; err itself where there is nothing to say.
func withHint(err error) error {
	for _, hint := range hints {
		if hint.failure.MatchString(err.Error()) {
			return &hintedError{err, hint.remedy, hint.class}
		}
	}
	return err
}

// hintedError is an error with what to do about it.
type hintedError struct {
	err    error
	remedy string
	class  error
}

func (e *hintedError) Error() string { return fmt.Sprintf("%v; %s: %v", e.err, e.remedy, e.class) }

// Unwrap has the class first, which goes before that of the error: unknown, of the runtime's errors.
func (e *hintedError) Unwrap() []error { return []error{e.class, e.err} }
