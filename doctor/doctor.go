// Package doctor looks at whether a node has what podfsm's pods need, and says what to do where it hasn't.
//
// Every check tries for real what it can try, and changes nothing that stays: what it makes is in a directory or in a mount namespace of
// its own, and gone when it is done. A check says what it has seen (its evidence), not what ought to be.
//
// The daemon examines itself when it starts, and whenever somebody runs "podfsm doctor". While it is down the CLI examines the node as
// far as that goes without the daemon's configuration. Before podfsm is in place at all, the CLI examines the node by what the containerd
// that is there tells (Stock).
package doctor

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/singleflight"
)

// Verdict is what comes out of a check.
type Verdict string

// Verdicts, from good to bad.
const (
	OK      Verdict = "ok"
	Unknown Verdict = "unknown" // it could not be found out
	Warn    Verdict = "warn"    // pods run, but something is missing or will be
	Fail    Verdict = "fail"    // some or all pods don't run
)

// Pods are those that can't run with what a check has found.
type Pods string

// Pods that need something.
const (
	NoPods      Pods = ""
	AllPods     Pods = "all"
	UserNSPods  Pods = "with a user namespace"
	NetworkPods Pods = "with a network of their own"
	// TmpfsPods are refused with their containers: what volumes a pod has isn't known before.
	TmpfsPods Pods = "with a user namespace and a volume on tmpfs"
)

// Finding is what one check says of the node, or of one of several things that it looks at.
type Finding struct {
	Check   string
	Subject string // what was looked at, where a check looks at several things
	Verdict Verdict
	// Evidence is what was seen: a number, a path, an error.
	Evidence string
	// Remedy is what to do about it. Empty for OK.
	Remedy string
	// Stops are the pods that podfsm refuses because of it, and Handlers the runtime handlers that they are of, all where it is nil.
	Stops    Pods
	Handlers []string
}

// Need is what a pod needs of the node.
type Need struct {
	Handler string // the runtime handler, by its own name
	UserNS  bool   // a user namespace of its own
	Network bool   // a network namespace of its own
}

// stops says whether a pod with this need can't run.
func (f Finding) stops(need Need) bool {
	if f.Handlers != nil && !slices.Contains(f.Handlers, need.Handler) {
		return false
	}
	switch f.Stops {
	case AllPods:
		return true
	case UserNSPods:
		return need.UserNS
	case NetworkPods:
		return need.Network
	default:
		return false
	}
}

// check is one thing that is looked at. It returns at least one finding, without the check's name.
type check struct {
	name string
	look func(context.Context, Node) []Finding
}

// checks are all, in the order in which they are shown.
var checks = []check{
	{"podfsm", controller},
	{"kernel", kernel},
	{"user namespaces", userNamespaces},
	{"keys", keys},
	{"inotify", inotify},
	{"pidfd", pidfd},
	{"statmount", statMount},
	{"cgroups", cgroups},
	{"oom score", oomScore},
	{"supplementary groups", supplementaryGroups},
	{"handlers", handlers},
	{"pause", pauseProgram},
	{"runtime", runtimes},
	{"snapshotter", snapshotters},
	{"overlay", overlays},
	{"tmpfs", tmpfs},
	{"directories", directories},
	{"netns directory", netNSDirectory},
	{"networks", networks},
	{"id pool", idPool},
	{"ledger", ledger},
	{"disk space", diskSpace},
	{"debts", debts},
}

const (
	// checkTimeout bounds each check. They all run at the same time.
	checkTimeout = 5 * time.Second
	// firstWait is how long after New a pod waits for the first examination: until then nobody knows what the node lacks.
	firstWait = 2 * time.Second
)

// Doctor examines one node, and remembers what it found last. Its methods may be called by many goroutines.
type Doctor struct {
	node    Node
	ctx     context.Context // ends with Close
	close   context.CancelFunc
	running singleflight.Group // a check that hangs is joined by the next examination, so there is one of it at most

	examined chan struct{} // closed at the end of the first examination
	once     sync.Once
	begun    time.Time

	mu    sync.Mutex
	known map[string][]Finding // by check
}

// New makes the doctor of a node. Close ends it.
func New(node Node) *Doctor {
	d := &Doctor{node: node, examined: make(chan struct{}), begun: time.Now(), known: map[string][]Finding{}}
	d.ctx, d.close = context.WithCancel(context.Background())
	return d
}

// Close ends what the doctor does.
func (d *Doctor) Close() { d.close() }

// Examine makes all checks and returns what they found, in a fixed order. It takes checkTimeout at most, and ends with ctx: a check that
// hasn't come to its end by then is Unknown.
func (d *Doctor) Examine(ctx context.Context) []Finding {
	defer d.once.Do(func() { close(d.examined) })
	all := checks
	if d.node.Stock != nil {
		all = slices.Concat(stockChecks, checks)
	}
	found := make([][]Finding, len(all))
	var work sync.WaitGroup
	for i, c := range all {
		work.Go(func() { found[i] = d.run(ctx, c) })
	}
	work.Wait()
	return slices.Concat(found...)
}

// run makes one check, or joins it where it is being made, and remembers what came out.
func (d *Doctor) run(ctx context.Context, c check) []Finding {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	done := d.running.DoChan(c.name, func() (any, error) {
		found := c.run(d.ctx, d.node)
		d.mu.Lock()
		defer d.mu.Unlock()
		d.known[c.name] = found
		return found, nil
	})
	stop := context.AfterFunc(d.ctx, cancel)
	defer stop()
	select {
	case result := <-done:
		return result.Val.([]Finding)
	case <-ctx.Done():
		return []Finding{{
			Check: c.name, Verdict: Unknown, Evidence: "the check has not come to an end: " + ctx.Err().Error(),
			Remedy: "look for a filesystem that doesn't answer, and try again",
		}}
	}
}

// run makes the check, also where it panics.
func (c check) run(ctx context.Context, node Node) (found []Finding) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			found = []Finding{{Verdict: Unknown, Evidence: fmt.Sprintf("the check panicked: %v", p), Remedy: "report this as a bug of podfsm"}}
		}
		for i := range found {
			found[i].Check = c.name
		}
	}()
	return c.look(ctx, node)
}

// Admit fails with FailedPrecondition, naming the remedy, if a pod needs what the node was seen to lack. What was seen is looked at again
// first, so a node that was repaired runs pods at once. The first examination is waited for, for a short while.
func (d *Doctor) Admit(ctx context.Context, need Need) error {
	if err := d.awaitFirst(ctx); err != nil {
		return err
	}
	for _, c := range checks {
		if d.stopping(c.name, need) == nil {
			continue
		}
		d.run(ctx, c)
		if f := d.stopping(c.name, need); f != nil {
			return fmt.Errorf("this node lacks what the pod needs: %s: %s; %s: %w", f.Title(), f.Evidence, f.Remedy, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// awaitFirst waits for the first examination, but not longer than firstWait after New.
func (d *Doctor) awaitFirst(ctx context.Context) error {
	patience := time.NewTimer(time.Until(d.begun.Add(firstWait)))
	defer patience.Stop()
	select {
	case <-d.examined:
	case <-patience.C:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// stopping is a known finding of a check that keeps a pod from running; nil when there is none.
func (d *Doctor) stopping(check string, need Need) *Finding {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, f := range d.known[check] {
		if f.stops(need) {
			return &f
		}
	}
	return nil
}

// Title is the check and what it looked at.
func (f Finding) Title() string { return strings.TrimSpace(f.Check + " " + f.Subject) }
