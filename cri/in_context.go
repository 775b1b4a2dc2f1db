package cri

import (
	"context"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Call travels in the context of a request through containerd's service to podfsm's controller, in the same process.
type Call struct {
	// Caller is the front's context for the request. It carries the request's span. If it ends, the controller
	// ends the request.
	Caller context.Context
	// Config is the true configuration of the sandbox to run; nil if the request runs none.
	Config *runtime.PodSandboxConfig
	// Handler is the runtime handler of the sandbox to run.
	Handler string
	// SandboxID is set by the controller when it accepts the sandbox.
	SandboxID string
	// Err is set by the controller when it refuses a sandbox, or when a start fails and is rolled back. It is
	// the error without the wrapping of containerd's service, which differs from try to try.
	Err error
}

type callKey struct{}

// FromContext returns the call that a context from the front carries; nil for a caller of containerd's own API.
func FromContext(ctx context.Context) *Call {
	call, _ := ctx.Value(callKey{}).(*Call)
	return call
}

// with puts call into ctx.
func with(ctx context.Context, call *Call) context.Context {
	call.Caller = ctx
	return context.WithValue(ctx, callKey{}, call)
}
