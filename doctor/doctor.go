// Package doctor examines whether a node has what podfsm's pods need, and gives the remedy for what
// it lacks.
//
// Every check tries what it can try, and leaves nothing behind: it works in a directory or a mount
// namespace of its own and removes both. A check reports its evidence: what it has seen.
//
// The daemon examines itself at its start and for each "podfsm doctor". While the daemon is down,
// the CLI examines the node without the daemon's configuration. Before podfsm is installed, the CLI
// examines the node by the configuration of its containerd (Stock).
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

// Status is the result of a check.
type Status string

// Statuses, from good to bad.
const (
	OK      Status = "ok"
	Unknown Status = "unknown" // the check could not find out
	Warn    Status = "warn"    // pods run, but something is missing or soon will be
	Fail    Status = "fail"    // some or all pods don't run
)

// Pods is a kind of pods that can't run because of a finding.
type Pods string

// Kinds of pods.
const (
	NoPods      Pods = ""
	AllPods     Pods = "all"
	UserNSPods  Pods = "with a user namespace"
	NetworkPods Pods = "with a network of their own"
	// TmpfsPods are refused with their containers, because podfsm doesn't know a pod's volumes
	// before.
	TmpfsPods Pods = "with a user namespace and a volume on tmpfs"
)

// Finding is a result of one check, for the node or for one of several subjects.
type Finding struct {
	Check   string
	Subject string // "" for the node
	Status  Status
	// Evidence is what the check has seen: a number, a path, an error.
	Evidence string
	// Remedy is what the operator can do; "" for OK.
	Remedy string
	// Stops are the pods that podfsm refuses because of the finding. Handlers are their runtime
	// handlers; nil for all.
	Stops    Pods
	Handlers []string
}

// Need is what a pod needs of the node.
type Need struct {
	Handler string // the runtime handler, by its own name
	UserNS  bool   // a user namespace of its own
	Network bool   // a network namespace of its own
}

// stops says whether a pod with this need can't run because of the finding.
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

// check is one check. look returns at least one finding, without the check's name.
type check struct {
	name string
	look func(context.Context, Node) []Finding
}

// checks are all checks, in the order of display.
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
	{"pending cleanups", pendingCleanups},
}

const (
	// checkTimeout bounds each check. All checks run in parallel.
	checkTimeout = 5 * time.Second
	// firstWait is how long after New a pod waits for the first examination.
	firstWait = 2 * time.Second
)

// Doctor examines one node and keeps the last findings. It is safe for concurrent use.
type Doctor struct {
	node    Node
	ctx     context.Context // ends with Close
	close   context.CancelFunc
	running singleflight.Group // so a check that hangs runs only once: the next examination joins it

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

// Close ends all checks.
func (d *Doctor) Close() { d.close() }

// Examine makes all checks and returns their findings, in a fixed order. It takes at most
// checkTimeout, and ends with ctx. A check that has not ended by then is Unknown.
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

// run makes one check, or joins it if it is running, and keeps its findings.
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
			Check: c.name, Status: Unknown, Evidence: "the check did not end: " + ctx.Err().Error(),
			Remedy: "find the filesystem that doesn't answer, and try again",
		}}
	}
}

// run makes the check. A panic is a finding, too.
func (c check) run(ctx context.Context, node Node) (found []Finding) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			found = []Finding{{Status: Unknown, Evidence: fmt.Sprintf("the check panicked: %v", p), Remedy: "report this as a bug of podfsm"}}
		}
		for i := range found {
			found[i].Check = c.name
		}
	}()
	return c.look(ctx, node)
}

// Admit fails with FailedPrecondition and the remedy if the node lacks what a pod needs. It repeats
// the failed check first, so a repaired node runs pods at once. It waits at most firstWait for the
// first examination.
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

// Failed says for each check whether its last run failed. A check that was not made, or is Unknown,
// has not failed.
func (d *Doctor) Failed() map[string]bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	failed := map[string]bool{}
	for _, c := range checks {
		failed[c.name] = slices.ContainsFunc(d.known[c.name], func(f Finding) bool { return f.Status == Fail })
	}
	return failed
}

// FailedChecks returns the names of the checks whose last run failed, in the order of the checks.
func (d *Doctor) FailedChecks() (names []string) {
	failed := d.Failed()
	for _, c := range checks {
		if failed[c.name] {
			names = append(names, c.name)
		}
	}
	return names
}

// awaitFirst waits for the first examination, at most until firstWait after New.
func (d *Doctor) awaitFirst(ctx context.Context) error {
	timer := time.NewTimer(time.Until(d.begun.Add(firstWait)))
	defer timer.Stop()
	select {
	case <-d.examined:
	case <-timer.C:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// stopping returns a kept finding of a check that stops a pod; nil for none.
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

// Title returns the check and its subject.
func (f Finding) Title() string { return strings.TrimSpace(f.Check + " " + f.Subject) }
