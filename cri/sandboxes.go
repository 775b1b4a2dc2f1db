package cri

import (
	"context"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/states"
)

// Sandboxes is what the front needs of podfsm's sandbox controller. All methods are safe for concurrent use.
type Sandboxes interface {
	Attempts

	// PauseImage is the reference of the image that sandboxes are made from.
	PauseImage() string
	// Created reports how the creation of a pod on containerd's service went, and how long it took.
	Created(took time.Duration, err error)
	// SandboxOfContainer returns podfsm's sandbox that holds a container, by the container's full id. Its cost
	// doesn't grow with the number of containers.
	SandboxOfContainer(ctx context.Context, id string) (Sandbox, bool, error)
	// CreatedAt is when a podfsm sandbox was begun; the zero time for any other. Lists ask for every sandbox.
	CreatedAt(id string) time.Time
	// StopSandbox ends pause and takes the sandbox off its network. It is idempotent; an unknown id is success.
	StopSandbox(ctx context.Context, id string) error
	// RemoveSandbox undoes all there is of the sandbox. It is idempotent; an unknown id is success.
	RemoveSandbox(ctx context.Context, id string) error
	// AdmitContainer refuses a container whose users, privileges or volumes don't fit into the sandbox. It changes
	// nothing, and returns when ctx ends.
	AdmitContainer(ctx context.Context, id string, config *runtime.ContainerConfig) error
	// PrepareContainer prepares the layers of a container's image for the sandbox. It starts the pod's shim, and
	// doesn't wait for that. The caller calls release when containerd's service has made the container. release waits
	// for the shim; it is never nil.
	PrepareContainer(ctx context.Context, id, image string) (release func(), err error)
	// StatusInfo is what podfsm adds to the verbose status of the runtime.
	StatusInfo() (map[string]string, error)
	// StockRuns reports a pod of another handler before containerd's service runs it. The caller calls ended
	// after that, with the sandbox's id; "" after a failure.
	StockRuns(config *runtime.PodSandboxConfig) (ended func(id string))
	// StockRemoved reports that containerd's service removed such a pod.
	StockRemoved(id string)
}

// Attempts is what callers that retry need of podfsm's sandbox controller: the sandboxes by pod and attempt,
// and the claims on them.
type Attempts interface {
	// Ours says whether podfsm runs the pods of a runtime handler; "" is the default handler. An unknown handler
	// is InvalidArgument.
	Ours(handler string) (bool, error)
	// Admit refuses, before anything is made, what can't work: invalid requests, and every pod while podfsm is
	// degraded.
	Admit(ctx context.Context, handler string, config *runtime.PodSandboxConfig) error
	// Sandbox returns a podfsm sandbox by its full id, also for a while after its removal.
	Sandbox(id string) (Sandbox, bool)
	// Named returns the sandbox of a pod and its attempt.
	Named(metadata *runtime.PodSandboxMetadata) (Sandbox, bool)
	// WaitQueued waits until the events that a sandbox's queue has now are handled, such as the rollback of a
	// creation that a restart interrupted. It fails when ctx ends first.
	WaitQueued(ctx context.Context, id string) error
	// Claim claims a sandbox as shown or taken. It returns false for a discarded sandbox, and true for an
	// unknown id.
	Claim(ctx context.Context, id string, claim lifecycle.Claim) bool
	// Discard marks a sandbox as discarded, unless its claim exceeds limit. It says whether the sandbox is
	// discarded.
	Discard(id string, limit lifecycle.Claim) bool
	// Unclaimed are the finished sandboxes without a claim.
	Unclaimed() []string
	// CountRetry counts an event.
	CountRetry(event RetryEvent)
}

// RetryEvent is an outcome of a retry, or of its absence.
type RetryEvent string

const (
	RetryJoined     RetryEvent = "joined"     // a retry waits for the creation under way
	RetryTook       RetryEvent = "taken"      // a retry received a sandbox that was finished after its caller had left
	RetrySuperseded RetryEvent = "superseded" // a retry with another configuration ended the creation under way
	PodUnclaimed    RetryEvent = "unclaimed"  // no retry came, so a finished sandbox was discarded
)

// Sandbox is what containerd's CRI service doesn't know of a podfsm sandbox.
type Sandbox struct {
	// ID is the sandbox's full id.
	ID string
	// Handler is the runtime handler that the caller named.
	Handler string
	// State is the sandbox's state, and Claim says who may use the sandbox.
	State states.State
	Claim lifecycle.Claim
	// Step is the step that is under way, and Since when it began; "" for none.
	Step  string
	Since time.Time
	// TraceParent is the W3C traceparent of the span that created the sandbox.
	TraceParent string
	// Config is the configuration as the caller gave it. Read-only.
	Config *runtime.PodSandboxConfig
	// CreatedAt is when the sandbox was begun. containerd's service forgets it over a restart.
	CreatedAt time.Time
	// Ready says whether the pod is up.
	Ready bool
	// Mapped says whether the pod has a user namespace.
	Mapped bool
	// NetNSPath is where the pod's network namespace is pinned; "" before its capture, and for a pod on the
	// node's network.
	NetNSPath string
	// IP and AdditionalIPs are empty once the pod is off its network.
	IP            string
	AdditionalIPs []string
	// HadIPs are the addresses that the pod has had, the main one first, also once it is off its network.
	// Read-only.
	HadIPs []string
	// UserNS is the user namespace that podfsm chose for the pod, in mode POD; nil if the pod's own
	// configuration stands. Read-only.
	UserNS *runtime.UserNamespace
}
