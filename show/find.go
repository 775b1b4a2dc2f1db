package show

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/lifecycle"
)

// named has what a reference to a sandbox may match.
type named struct {
	id, pod string // pod is "namespace/name"
	created time.Time
}

func nameOf(s *podfsmv1.Sandbox) named {
	n := named{id: s.GetId(), created: s.GetCreatedAt().AsTime()}
	if s.GetPodName() != "" {
		n.pod = s.GetPodNamespace() + "/" + s.GetPodName()
	}
	return n
}

// Find returns the sandbox for a reference: an id, a pod's "namespace/name" or name, or the start
// of an id. Of several sandboxes of one pod, it returns the newest. Errors: NotFound;
// InvalidArgument if ref is empty or matches several pods.
func Find(ref string, views []lifecycle.View) (lifecycle.View, error) {
	return find(ref, views, func(v lifecycle.View) named { return named{v.Key.ID, v.Pod, v.Created} })
}

// FindPending is [Find] for the sandboxes with a pending cleanup. It also fails with
// InvalidArgument for several sandboxes of one pod: a retry or a write-off is meant for one of
// them.
func FindPending(ref string, views []lifecycle.View) (none lifecycle.View, _ error) {
	name := func(v lifecycle.View) named { return named{v.Key.ID, v.Pod, v.Created} }
	pending := slices.DeleteFunc(slices.Clone(views), func(v lifecycle.View) bool { return !v.Pending() })
	found, err := match(ref, pending, name)
	switch {
	case errdefs.IsNotFound(err):
		return none, fmt.Errorf("no sandbox with a pending cleanup matches %q: %w", ref, errdefs.ErrNotFound)
	case err != nil:
		return none, err
	case len(found) > 1:
		return none, ambiguous(ref, found, name)
	}
	return found[0], nil
}

// ShortID is the length of an id in tables, in characters.
const ShortID = 13

// FindPendingExactly is [FindPending] for actions that can't be undone. It fails with
// InvalidArgument for a reference that may match by accident: a pod's name without its namespace,
// or fewer than [ShortID] characters of an id.
func FindPendingExactly(ref string, views []lifecycle.View) (none lifecycle.View, _ error) {
	view, err := FindPending(ref, views)
	if err != nil {
		return none, err
	}
	if ref != view.Pod && ref != view.Key.ID && (len(ref) < ShortID || !strings.HasPrefix(view.Key.ID, ref)) {
		return none, fmt.Errorf("%q is too short, name sandbox %q by its id or as %q: %w", ref, view.Key.ID, view.Pod, errdefs.ErrInvalidArgument)
	}
	return view, nil
}

// Inspect returns all details of the sandbox for a reference. If no view matches, it searches the
// sandboxes that have ended. It fails like [Find].
func Inspect(ref string, views []lifecycle.View, readEnded func() ([]*podfsmv1.InspectResponse, error)) (*podfsmv1.InspectResponse, error) {
	view, err := Find(ref, views)
	if err == nil {
		return Inspection(view)
	}
	if !errdefs.IsNotFound(err) {
		return nil, err
	}
	ended, err := readEnded()
	if err != nil {
		return nil, err
	}
	return find(ref, ended, func(r *podfsmv1.InspectResponse) named { return nameOf(r.GetSandbox()) })
}

func find[T any](ref string, all []T, name func(T) named) (none T, _ error) {
	found, err := match(ref, all, name)
	if err != nil {
		return none, err
	}
	slices.SortStableFunc(found, func(a, b T) int { return name(a).created.Compare(name(b).created) })
	if last := name(found[len(found)-1]); len(found) > 1 && slices.ContainsFunc(found, func(f T) bool { return name(f).pod != last.pod }) {
		return none, ambiguous(ref, found, name)
	}
	return found[len(found)-1], nil
}

// Match returns all sandboxes that a reference matches, of one pod or of several. Errors: NotFound
// if there is none, InvalidArgument if ref is empty.
func Match(ref string, all []*podfsmv1.Sandbox) ([]*podfsmv1.Sandbox, error) {
	return match(ref, all, nameOf)
}

func match[T any](ref string, all []T, name func(T) named) ([]T, error) {
	if ref == "" {
		return nil, fmt.Errorf("name a sandbox by its id or its pod: %w", errdefs.ErrInvalidArgument)
	}
	for _, matches := range []func(named) bool{
		func(n named) bool { return n.id == ref },
		func(n named) bool { return n.pod == ref || strings.HasSuffix(n.pod, "/"+ref) },
		func(n named) bool { return strings.HasPrefix(n.id, ref) },
	} {
		found := slices.DeleteFunc(slices.Clone(all), func(one T) bool { return !matches(name(one)) })
		if len(found) > 0 {
			return found, nil
		}
	}
	return nil, errdefs.ErrNotFound.WithMessage(fmt.Sprintf("no sandbox of podfsm matches %q: the kubelet has not asked podfsm for it, "+
		"or podfsm refused it before the first step; see kubectl describe pod and podfsm doctor", ref))
}

// LeaksOf returns the leaks of some sandboxes, each given by its id or the start of its id. Without
// sandboxes, it returns all leaks. It fails with InvalidArgument for fewer than [ShortID]
// characters of an id, because the caller may remove what it returns.
func LeaksOf(things []leaks.Thing, sandboxes []string) ([]leaks.Thing, error) {
	if len(sandboxes) == 0 {
		return things, nil
	}
	for _, ref := range sandboxes {
		if len(ref) < ShortID {
			return nil, fmt.Errorf("%q is too short, name a sandbox by its id or its first %d characters: %w", ref, ShortID, errdefs.ErrInvalidArgument)
		}
	}
	return slices.DeleteFunc(slices.Clone(things), func(thing leaks.Thing) bool {
		return !slices.ContainsFunc(sandboxes, func(ref string) bool { return strings.HasPrefix(thing.ID, ref) })
	}), nil
}

func ambiguous[T any](ref string, found []T, name func(T) named) error {
	const most = 8
	var names []string
	for _, one := range found[:min(len(found), most)] {
		names = append(names, name(one).id+" ("+name(one).pod+")")
	}
	if len(found) > most {
		names = append(names, "…")
	}
	return fmt.Errorf("%q matches %d sandboxes, name one by its id: %s: %w", ref, len(found), strings.Join(names, ", "), errdefs.ErrInvalidArgument)
}
