package cri

import (
	"context"
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// inInit begins runc's errors of what failed in the container before its program ran. It precedes any text that
// the container can choose.
const inInit = "error during container init: "

// hints add a remedy and a class to errors of runc that have none.
var hints = []struct {
	failure *regexp.Regexp // of what follows inInit
	mapped  bool           // only pods with a user namespace fail like this
	remedy  string
	class   error
}{
	{
		regexp.MustCompile(`^unable to join session keyring: unable to create session key: disk quota exceeded`),
		false,
		"the container's user has as many keys as the kernel allows, one of each of its containers among them, in all pods with that user; " +
			"raise kernel.keys.maxkeys and kernel.keys.maxbytes (kernel.keys.root_maxkeys and kernel.keys.root_maxbytes for the node's root)",
		errdefs.ErrResourceExhausted,
	},
	{
		// The user is a name, which only the image's own files resolve. Any other id is refused before the container is made.
		regexp.MustCompile(`^(unable to setup user: )?(cannot set[ug]id to unmapped [ug]id \d+ in user namespace|setgroups: invalid argument)`),
		true,
		"its image gives the container an id beyond those of the pod's user namespace; set runAsUser, runAsGroup and supplementalGroupsPolicy: Strict, " +
			"or run the pod on the node's users",
		errdefs.ErrInvalidArgument,
	},
}

// StartContainer adds the remedy to errors of the OCI runtime that have none.
func (s *service) StartContainer(ctx context.Context, r *runtime.StartContainerRequest) (*runtime.StartContainerResponse, error) {
	resp, err := s.RuntimeServiceServer.StartContainer(ctx, r)
	if err == nil {
		return resp, nil
	}
	_, failure, _ := strings.Cut(err.Error(), inInit)
	for _, hint := range hints {
		if !hint.failure.MatchString(failure) {
			continue
		}
		pod, ours, findErr := s.sandboxes.SandboxOfContainer(ctx, r.GetContainerId())
		if findErr != nil || !ours || hint.mapped && !pod.Mapped {
			return nil, err
		}
		return nil, &hintedError{err, hint.remedy, hint.class}
	}
	return nil, err
}

// hintedError is an error with a remedy.
type hintedError struct {
	err    error
	remedy string
	class  error
}

func (e *hintedError) Error() string { return fmt.Sprintf("%v; %s: %v", e.err, e.remedy, e.class) }

// Unwrap has the class first, so it wins over the class of the runtime's error, unknown.
func (e *hintedError) Unwrap() []error { return []error{e.class, e.err} }
