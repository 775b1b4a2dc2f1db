// Package cri is podfsm's thin front on containerd's own CRI service.
//
// containerd's service makes the network namespace and runs CNI before it calls a sandbox controller, except for pods on the
// node's network. So a pod of ours is passed to it as such a pod, with its true configuration beside it in the context, and
// what would show that is restored on the way out. Every other call, and every other pod, passes through untouched.
package cri

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/records"
	"github.com/podfsm/podfsm/states"
	"github.com/podfsm/podfsm/tracing"
)

// pullTimeout bounds the pull of the pause image: nobody who waits for the pod ends it, and containerd's own bound, on a pull without
// progress, can be off.
const pullTimeout = 10 * time.Minute

// Sandboxes is what the front needs of podfsm's sandbox controller. All methods may be called by many goroutines.
type Sandboxes interface {
	// Ours says whether pods of a runtime handler are podfsm's; "" is the default handler. A handler that nobody has
	// configured is InvalidArgument.
	Ours(handler string) (bool, error)
	// Admit refuses, before anything is made, what can't work: bad input, and everything while podfsm itself isn't well.
	Admit(ctx context.Context, handler string, config *runtime.PodSandboxConfig) error
	// PauseImage is the reference of the image that sandboxes are made from.
	PauseImage() string
	// Pod is a sandbox of ours by its full id, also for a while after it has gone.
	Pod(id string) (Pod, bool)
	// PodOfContainer is the sandbox of ours that a container, by its full id, is in. It costs the same however many containers there are.
	PodOfContainer(ctx context.Context, id string) (Pod, bool, error)
	// CreatedAt is when a sandbox of ours was begun; the zero time for any other. Lists ask it for every sandbox there is.
	CreatedAt(id string) time.Time
	// StopPod takes the sandbox off its network. It is idempotent; an unknown id is success.
	StopPod(ctx context.Context, id string) error
	// Named is the sandbox that there is of a pod and its attempt.
	Named(metadata *runtime.PodSandboxMetadata) (Pod, bool)
	// Settle waits until what is under way for a sandbox of an earlier daemon has ended, or ctx has.
	Settle(ctx context.Context, id string) error
	// Claim marks a sandbox as shown or taken. It says whether it may be; it may not once it is discarded. An unknown id may.
	Claim(ctx context.Context, id string, claim lifecycle.Claim) bool
	// Discard marks a sandbox with at most a claim as discarded. It says whether it is.
	Discard(id string, most lifecycle.Claim) bool
	// Unclaimed are the finished sandboxes that nobody has claimed.
	Unclaimed() []string
	// RemovePod undoes whatever there is of the sandbox. It is idempotent; an unknown id is success.
	RemovePod(ctx context.Context, id string) error
	// AdmitContainer refuses, before anything is made, a container that can't be in the sandbox: by its users, its privileges, its
	// volumes. It changes nothing, and ends with ctx.
	AdmitContainer(ctx context.Context, id string, config *runtime.ContainerConfig) error
	// PrepareContainer makes what a container from an image needs in the sandbox, before containerd's service makes the container, or
	// beside that. release is called when it has, and never nil.
	PrepareContainer(ctx context.Context, id, image string) (release func(), err error)
	// StatusInfo is what podfsm adds to the verbose status of the runtime.
	StatusInfo() (map[string]string, error)
	// StockRuns tells of a pod of another handler before containerd's service runs it. What it returns is called when that has ended,
	// with the sandbox's id, "" after a failure.
	StockRuns(config *runtime.PodSandboxConfig) (ended func(id string))
	// StockRemoved tells that containerd's service has removed such a pod.
	StockRemoved(id string)
	// Created is told how the creation of a pod went that was run on containerd's service, and how long it took.
	Created(took time.Duration, err error)
	// Happened is told of what becomes of retries, and of pods that nobody asks for any more.
	Happened(what Happening)
}

// Happening is something that is worth counting.
type Happening string

const (
	RetryJoined     Happening = "joined"     // a retry waits for the creation that is under way
	RetryTook       Happening = "taken"      // a retry got a pod that had been finished when its caller had gone
	RetrySuperseded Happening = "superseded" // a retry with another configuration has ended the creation under way
	PodUnclaimed    Happening = "unclaimed"  // nobody has asked for a finished pod again, so it is discarded
)

// Pod is what containerd's CRI service doesn't know of a sandbox of ours.
type Pod struct {
	// ID is the sandbox's full id.
	ID string
	// Handler is the runtime handler that the caller named.
	Handler string
	// State is the sandbox's state, and Claim who may use it.
	State states.State
	Claim lifecycle.Claim
	// Step is the step that is under way, and Since when it began; "" for none.
	Step  string
	Since time.Time
	// TraceParent is the W3C traceparent of the span that it was created under.
	TraceParent string
	// Config is the configuration as the caller gave it. It must not be changed.
	Config *runtime.PodSandboxConfig
	// CreatedAt is when the sandbox was begun. containerd's service forgets it over a restart.
	CreatedAt time.Time
	// Ready says whether the pod is up.
	Ready bool
	// Mapped says whether the pod has a user namespace.
	Mapped bool
	// NetNSPath is where the pod's network namespace is pinned; "" for a pod on the node's, and before it is captured.
	NetNSPath string
	// IP and AdditionalIPs are empty once the pod is off its network.
	IP            string
	AdditionalIPs []string
	// HadIPs are the addresses that the pod has had, the main one first, also once it is off its network. They must not be changed.
	HadIPs []string
	// UserNS is the user namespace that podfsm has chosen for the pod, in mode POD; nil where the pod's own configuration stands. It
	// must not be changed.
	UserNS *runtime.UserNamespace
}

// Call travels in the context of a request through containerd's service to our controller, in the same process.
type Call struct {
	// Caller is the context of the creation, or of any other request: it ends when that shall, and carries its span.
	Caller context.Context
	// Config is the true configuration of the sandbox to run; nil when the request runs none.
	Config *runtime.PodSandboxConfig
	// Handler is the runtime handler of the sandbox to run.
	Handler string
	// SandboxID is set by the controller when it has accepted the sandbox.
	SandboxID string
	// Err is set by the controller when it has refused a sandbox, or undone, or owes, a start that failed: the error without wrapping,
	// which is the same at each try.
	Err error
}

type callKey struct{}

// FromContext is the call that a context from the front carries; nil when containerd's API was called by somebody else.
func FromContext(ctx context.Context) *Call {
	call, _ := ctx.Value(callKey{}).(*Call)
	return call
}

// with puts call into ctx.
func with(ctx context.Context, call *Call) context.Context {
	call.Caller = ctx
	return context.WithValue(ctx, callKey{}, call)
}

// service is the CRI as the front serves it.
type service struct {
	inner     // containerd's own: it serves what the front doesn't
	sandboxes Sandboxes
	creations *creations
	streams   *streams // port forwards
	turns     turns
	unread    unreadStats
}

// RunPodSandbox runs a pod of ours through containerd's service, detached from its callers: see [service.join]. When it returns an
// error that isn't the caller's own, nothing of the pod is left, or podfsm has what is left on its books.
func (s *service) RunPodSandbox(ctx context.Context, r *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
	ours, err := s.sandboxes.Ours(r.GetRuntimeHandler())
	if err != nil {
		return nil, err
	}
	if !ours {
		return s.runStock(ctx, r)
	}
	if err := s.sandboxes.Admit(ctx, r.GetRuntimeHandler(), r.GetConfig()); err != nil {
		return nil, err
	}
	id, err := s.join(ctx, r)
	if err != nil {
		return nil, err
	}
	return &runtime.RunPodSandboxResponse{PodSandboxId: id}, nil
}

// runOnStock runs a pod of ours through containerd's service. A ctx that ends ends it, too: what was made is undone. The id comes
// with an error, too, as soon as there is one.
func (s *service) runOnStock(ctx context.Context, r *runtime.RunPodSandboxRequest) (id string, err error) {
	call := &Call{Config: proto.CloneOf(r.GetConfig()), Handler: r.GetRuntimeHandler()}
	// containerd's service doesn't see ctx end, or it would not clean up after a failure; our controller does.
	resp, err := s.RuntimeServiceServer.RunPodSandbox(context.WithoutCancel(with(ctx, call)), onNodeNetwork(r))
	trace.SpanFromContext(ctx).SetAttributes(tracing.SandboxID.String(call.SandboxID))
	switch {
	case err == nil:
		return resp.GetPodSandboxId(), nil
	case call.Err != nil:
		err = call.Err
	case call.SandboxID != "":
		// It failed around the controller: NRI, the store. Nobody else undoes what we have.
		if owed := s.sandboxes.RemovePod(context.WithoutCancel(ctx), call.SandboxID); owed != nil {
			err = fmt.Errorf("%w (the cleanup is owed and will be tried again: %w)", err, owed)
		}
	}
	return call.SandboxID, err
}

// ensurePauseImage pulls the pause image if it isn't there, before anything is made for the pod; containerd's service would do so
// after it has made half of it. It fails with the class of the pull's error, else with Unavailable.
func (s *service) ensurePauseImage(ctx context.Context, r *runtime.RunPodSandboxRequest) error {
	image := &runtime.ImageSpec{Image: s.sandboxes.PauseImage(), RuntimeHandler: r.GetRuntimeHandler()}
	found, err := s.images.ImageStatus(ctx, &runtime.ImageStatusRequest{Image: image})
	if err == nil && found.GetImage() != nil {
		return nil
	}
	if err == nil {
		ctx, cancel := context.WithTimeoutCause(ctx, pullTimeout, fmt.Errorf("no image within %s: %w", pullTimeout, context.DeadlineExceeded))
		defer cancel()
		_, err = s.images.PullImage(ctx, &runtime.PullImageRequest{Image: image, SandboxConfig: r.GetConfig()})
	}
	if err != nil {
		return fmt.Errorf("pod %q needs the pause image %q, which can't be had; check pinned_images.sandbox or import it: %w: %w",
			records.PodName(r.GetConfig()), image.GetImage(), err, errdefs.ErrUnavailable)
	}
	return nil
}

// onNodeNetwork is a copy of the request with the network mode NODE, which makes containerd's service leave the network alone.
func onNodeNetwork(r *runtime.RunPodSandboxRequest) *runtime.RunPodSandboxRequest {
	r = proto.CloneOf(r)
	linux := ensure(&ensure(&r.Config).Linux)
	ensure(&ensure(&linux.SecurityContext).NamespaceOptions).Network = runtime.NamespaceMode_NODE
	return r
}

// ensure gives a message pointer that may be nil something to point at.
func ensure[T any](p **T) *T {
	if *p == nil {
		*p = new(T)
	}
	return *p
}

const (
	// stopTries is how often one request tries a stop: both halves may meet a fault that passes. A fault that lasts is the caller's to
	// know soon; the kubelet asks again itself.
	stopTries = 3
	// stopAgain is the wait before the second try. It doubles.
	stopAgain = 500 * time.Millisecond
)

// StopPodSandbox lets containerd's service stop the containers, pause and tell NRI; then the pod is taken off its network. A runtime, a
// shim or a plugin that gives a wrong answer is asked again, within the caller's deadline.
func (s *service) StopPodSandbox(ctx context.Context, r *runtime.StopPodSandboxRequest) (_ *runtime.StopPodSandboxResponse, err error) {
	id, pod, ok := s.resolve(ctx, r.GetPodSandboxId())
	if !ok {
		return s.RuntimeServiceServer.StopPodSandbox(ctx, r)
	}
	end, err := s.turns.take(ctx, attemptOf(pod.Config))
	if err != nil {
		return nil, err
	}
	defer end()
	ctx, span := tracing.Start(ctx, tracing.SpanStop, append(Attributes(pod.Config, ""), tracing.SandboxID.String(id))...)
	defer func() { tracing.End(span, err) }()

	wait := stopAgain
	for try := 1; ; try++ {
		begun := time.Now()
		resp, err := s.stop(ctx, id, r)
		if err == nil || try == stopTries || lasts(err) || !mayWait(ctx, wait, time.Since(begun)) {
			return resp, err
		}
		tracing.Log(ctx).WithField(tracing.LogPod, records.PodName(pod.Config)).WithField(tracing.LogSandbox, id).
			WithField(tracing.LogRetryIn, wait.Seconds()).WithError(err).Warn("stop failed, retrying")
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, err
		}
		wait *= 2
	}
}

// lasts says that an error stays until somebody mends the node or the request: that is what its class means.
func lasts(err error) bool {
	return errdefs.IsFailedPrecondition(err) || errdefs.IsInvalidArgument(err) || errdefs.IsAlreadyExists(err)
}

// mayWait says whether a caller has the time for a wait, and for another try that takes as long as the one before.
func mayWait(ctx context.Context, wait, took time.Duration) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() == nil && (!ok || time.Until(deadline) >= wait+took)
}

func (s *service) stop(ctx context.Context, id string, r *runtime.StopPodSandboxRequest) (*runtime.StopPodSandboxResponse, error) {
	held, sayTornDown := holdTornDown(with(ctx, &Call{}), id)
	resp, err := s.RuntimeServiceServer.StopPodSandbox(held, r)
	if err != nil {
		return nil, err
	}
	s.streams.endPod(id)
	if err := s.sandboxes.StopPod(ctx, id); err != nil {
		return nil, err
	}
	sayTornDown()
	return resp, nil
}

// RemovePodSandbox lets containerd's service remove the containers and shut the sandbox down, which undoes all of ours.
func (s *service) RemovePodSandbox(ctx context.Context, r *runtime.RemovePodSandboxRequest) (_ *runtime.RemovePodSandboxResponse, err error) {
	id, pod, ok := s.resolve(ctx, r.GetPodSandboxId())
	if !ok {
		return s.removeStock(ctx, r)
	}
	end, err := s.turns.take(ctx, attemptOf(pod.Config))
	if err != nil {
		return nil, err
	}
	defer end()
	ctx, span := tracing.Start(ctx, tracing.SpanRemove, append(Attributes(pod.Config, ""), tracing.SandboxID.String(id))...)
	defer func() { tracing.End(span, err) }()

	held, sayTornDown := holdTornDown(with(ctx, &Call{}), id)
	resp, err := s.RuntimeServiceServer.RemovePodSandbox(held, r)
	if err != nil {
		return nil, err
	}
	s.streams.endPod(id)
	// containerd's service may not know the sandbox any more; ours must go all the same.
	if err := s.sandboxes.RemovePod(ctx, id); err != nil {
		return nil, err
	}
	sayTornDown()
	return resp, nil
}

// show says whether a sandbox may be shown to somebody, who may use it from then on. One that is discarded may not: it goes.
func (s *service) show(ctx context.Context, id string) bool {
	return s.sandboxes.Claim(ctx, id, lifecycle.Shown)
}

// shown are those of a list that may be shown, by the ids of their sandboxes.
func shown[T any](ctx context.Context, s *service, all []T, id func(T) string) []T {
	return slices.DeleteFunc(all, func(one T) bool { return !s.show(ctx, id(one)) })
}

// discarded is the answer to who asks for a sandbox that may not be shown.
func discarded(id string) error {
	return fmt.Errorf("sandbox %q is being discarded, because nobody has asked for it: %w", id, errdefs.ErrNotFound)
}

// PodSandboxStatus restores the network, the namespace modes and the time of creation.
func (s *service) PodSandboxStatus(ctx context.Context, r *runtime.PodSandboxStatusRequest) (*runtime.PodSandboxStatusResponse, error) {
	resp, err := s.RuntimeServiceServer.PodSandboxStatus(ctx, r)
	if err != nil {
		return nil, err
	}
	id := resp.GetStatus().GetId()
	if !s.show(ctx, id) {
		return nil, discarded(id)
	}
	if pod, ok := s.sandboxes.Pod(id); ok {
		restore(resp.Status, pod)
	}
	return resp, nil
}

// ListPodSandbox restores the times of creation, and leaves out what is discarded.
func (s *service) ListPodSandbox(ctx context.Context, r *runtime.ListPodSandboxRequest) (*runtime.ListPodSandboxResponse, error) {
	resp, err := s.RuntimeServiceServer.ListPodSandbox(ctx, r)
	if err != nil {
		return nil, err
	}
	resp.Items = s.presentable(ctx, resp.GetItems())
	return resp, nil
}

// StreamPodSandboxes is the list in pieces.
func (s *service) StreamPodSandboxes(r *runtime.StreamPodSandboxesRequest, stream runtime.RuntimeService_StreamPodSandboxesServer) error {
	return s.RuntimeServiceServer.StreamPodSandboxes(r, &listStream{stream, s})
}

type listStream struct {
	runtime.RuntimeService_StreamPodSandboxesServer
	service *service
}

func (l *listStream) Send(resp *runtime.StreamPodSandboxesResponse) error {
	resp.PodSandboxes = l.service.presentable(l.Context(), resp.GetPodSandboxes())
	return l.RuntimeService_StreamPodSandboxesServer.Send(resp)
}

// presentable are the items that may be shown, with the times when sandboxes of ours were created. The messages are made for one answer.
func (s *service) presentable(ctx context.Context, items []*runtime.PodSandbox) []*runtime.PodSandbox {
	items = shown(ctx, s, items, (*runtime.PodSandbox).GetId)
	for _, item := range items {
		if created := s.sandboxes.CreatedAt(item.GetId()); !created.IsZero() {
			item.CreatedAt = created.UnixNano()
		}
	}
	return items
}

// GetContainerEvents restores the sandbox status in every event, and leaves out those of discarded sandboxes. Events are shared between subscribers, so a copy is sent.
func (s *service) GetContainerEvents(r *runtime.GetEventsRequest, stream runtime.RuntimeService_GetContainerEventsServer) error {
	return s.RuntimeServiceServer.GetContainerEvents(r, &eventStream{stream, s})
}

type eventStream struct {
	runtime.RuntimeService_GetContainerEventsServer
	service *service
}

func (e *eventStream) Send(event *runtime.ContainerEventResponse) error {
	if err := e.Context().Err(); err != nil {
		return err // containerd's service doesn't notice, and nobody sees this event
	}
	id := event.GetPodSandboxStatus().GetId()
	if id != "" && !e.service.show(e.Context(), id) {
		return nil
	}
	if pod, ok := e.service.sandboxes.Pod(id); ok {
		event = proto.CloneOf(event)
		if event.PodSandboxStatus.GetState() == runtime.PodSandboxState_SANDBOX_READY && len(pod.HadIPs) > 0 {
			pod.IP, pod.AdditionalIPs = pod.HadIPs[0], pod.HadIPs[1:] // it was on its network then, whatever it is now
		}
		restore(event.PodSandboxStatus, pod)
		if pod.UserNS != nil {
			for _, status := range event.ContainersStatuses {
				restoreMounts(status)
			}
		}
	}
	return e.RuntimeService_GetContainerEventsServer.Send(event)
}

// Status tells, when verbose, what podfsm does for its handlers.
func (s *service) Status(ctx context.Context, r *runtime.StatusRequest) (*runtime.StatusResponse, error) {
	resp, err := s.RuntimeServiceServer.Status(ctx, r)
	if err != nil || !r.GetVerbose() {
		return resp, err
	}
	info, err := s.sandboxes.StatusInfo()
	if err != nil {
		return nil, err
	}
	if resp.Info == nil {
		resp.Info = map[string]string{}
	}
	maps.Copy(resp.Info, info)
	return resp, nil
}

// restore puts back into a pod's status what containerd's service doesn't know.
func restore(status *runtime.PodSandboxStatus, pod Pod) {
	if network := ensure(&status.Network); pod.IP != "" {
		network.Ip, network.AdditionalIps = pod.IP, nil
		for _, ip := range pod.AdditionalIPs {
			network.AdditionalIps = append(network.AdditionalIps, &runtime.PodIP{Ip: ip})
		}
	}
	if !pod.CreatedAt.IsZero() {
		status.CreatedAt = pod.CreatedAt.UnixNano() // containerd's service asks the controller, which may not know the sandbox any more
	}
	options := pod.Config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	ensure(&ensure(&status.Linux).Namespaces).Options = proto.CloneOf(options)
}

// resolve finds the sandbox of ours that a request names, by an id that may be shortened, as containerd's service would. Who names one
// has it.
func (s *service) resolve(ctx context.Context, id string) (string, Pod, bool) {
	full, pod, ok := s.find(ctx, id)
	if ok {
		s.sandboxes.Claim(ctx, full, lifecycle.Taken)
	}
	return full, pod, ok
}

// fullID is the length of the ids that containerd's service gives out. The kubelet names sandboxes by them.
const fullID = 64

// find lists sandboxes only for an id that is shortened: a list costs more with each pod of the node.
func (s *service) find(ctx context.Context, id string) (string, Pod, bool) {
	if pod, ok := s.sandboxes.Pod(id); ok || id == "" || len(id) >= fullID {
		return id, pod, ok
	}
	list, err := s.RuntimeServiceServer.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{Filter: &runtime.PodSandboxFilter{Id: id}})
	if err != nil || len(list.GetItems()) != 1 {
		return "", Pod{}, false
	}
	full := list.GetItems()[0].GetId()
	pod, ok := s.sandboxes.Pod(full)
	return full, pod, ok
}

// Attributes describe a pod on a span. An empty handler is left out.
func Attributes(config *runtime.PodSandboxConfig, handler string) []attribute.KeyValue {
	metadata := config.GetMetadata()
	attributes := []attribute.KeyValue{
		tracing.PodName.String(metadata.GetName()),
		tracing.PodNamespace.String(metadata.GetNamespace()),
		tracing.PodUID.String(metadata.GetUid()),
		tracing.PodAttempt.Int64(int64(metadata.GetAttempt())),
	}
	if handler != "" {
		attributes = append(attributes, tracing.RuntimeHandler.String(handler))
	}
	return attributes
}
