package doctor

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// controller checks whether podfsm runs pods, or will run pods once it is installed.
func controller(_ context.Context, n Node) []Finding {
	if n.Stock != nil {
		return n.notYet()
	}
	if n.Refusal == nil {
		return down()
	}
	if err := n.Refusal(); err != nil {
		return []Finding{fail(NoPods, err.Error(), "correct what it names and restart containerd: until then podfsm refuses every pod")}
	}
	if since, draining := n.Draining(); draining {
		return []Finding{fail(NoPods, fmt.Sprintf("draining since %s, new pods are refused", since.Format(time.RFC3339)),
			"podfsm drain --cancel, unless the node is on its way to a containerd without podfsm")}
	}
	return []Finding{ok("podfsm runs pods")}
}

// handlers lists podfsm's runtime handlers.
func handlers(_ context.Context, n Node) []Finding {
	if n.Config == nil {
		return n.unconfigured()
	}
	if len(n.Config.Handlers) == 0 {
		return []Finding{warn("no runtime handler has sandboxer = \"podfsm\", so no pod uses podfsm",
			"set sandboxer = \"podfsm\" in [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.NAME] and restart containerd")}
	}
	var texts []string
	for _, h := range n.Config.Handlers {
		text := fmt.Sprintf("%s (users by %s)", h.Name, h.Mode)
		switch {
		case h.Planned:
			text = fmt.Sprintf("%s (not configured yet, users by %s)", h.Name, h.Mode)
		case h.Default:
			text = fmt.Sprintf("%s (the default, users by %s)", h.Name, h.Mode)
		}
		texts = append(texts, text)
	}
	return []Finding{ok(strings.Join(texts, ", "))}
}

// snapshotters checks that the handlers' snapshotters are loaded and offer remap-ids.
func snapshotters(_ context.Context, n Node) []Finding {
	if n.Config == nil {
		return n.unconfigured()
	}
	if n.Daemon == 0 {
		return down()
	}
	var found []Finding
	for _, g := range grouped(n.Config.Handlers, func(h Handler) Snapshotter { return h.Snapshotter }, equal) {
		f := ok(fmt.Sprintf("snapshotter %q offers remap-ids", g.of.Name))
		switch {
		case !g.of.Loaded:
			f = fail(AllPods, fmt.Sprintf("snapshotter %q isn't loaded", g.of.Name),
				"look for it in ctr plugins ls and containerd's log, or set snapshotter = \"overlayfs\" for the handler")
		case !g.of.RemapIDs:
			f = fail(UserNSPods, fmt.Sprintf("snapshotter %q can't map ids: it doesn't offer remap-ids", g.of.Name),
				"set snapshotter = \"overlayfs\" for the handler, with Linux 5.19 or later, and restart containerd")
		}
		f.Subject, f.Handlers = g.subject(), g.handlers
		found = append(found, f)
	}
	return orNone(found)
}

// orNone returns the findings, or one finding if podfsm has no handlers.
func orNone(found []Finding) []Finding {
	if len(found) == 0 {
		return []Finding{ok("podfsm has no runtime handler")}
	}
	return found
}
