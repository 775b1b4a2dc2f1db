package records

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/lifecycle"
)

// named is what a sandbox can be referred to by.
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

// Find looks a reference up: a whole id, a pod's "namespace/name" or name, the start of an id. Of the sandboxes of one pod it finds
// the newest. Errors: NotFound; InvalidArgument when it is empty, or matches several pods.
func Find(ref string, views []lifecycle.View) (lifecycle.View, error) {
	return find(ref, views, func(v lifecycle.View) named { return named{v.Key.ID, v.Pod, v.Created} })
}

// FindPending looks a reference up, as [Find] does, among the sandboxes with a pending cleanup. It fails with InvalidArgument also for
// several sandboxes of one pod: what is done about one of them isn't meant for another.
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

// ShortID is how many characters of an id are shown in tables.
const ShortID = 13

// FindPendingExactly looks a reference up as [FindPending] does, for what can't be taken back. It fails with InvalidArgument for a
// reference that may fit by accident: a pod's name without its namespace, fewer than [ShortID] characters of an id.
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

// Inspect is all there is to know of the sandbox that a reference names, for which it looks among those that have ended if there is no
// other. For its errors see [Find].
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

// Match are the sandboxes that a reference names, which may be several of one pod, or of several. Errors: NotFound when it names none,
// InvalidArgument when it is empty.
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
	return nil, fmt.Errorf("no sandbox of podfsm matches %q: %w", ref, errdefs.ErrNotFound)
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
