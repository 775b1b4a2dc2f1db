package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v3"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/apimachinery/pkg/util/duration"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/history"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/pause"
	"github.com/podfsm/podfsm/show"
)

// The directories of containerd's plugins below its root and state directories.
const (
	ledgerDir  = "io.containerd.podsandbox.controller.v1.podfsm"
	criDir     = "io.containerd.grpc.v1.cri"
	bundlesDir = "io.containerd.runtime.v2.task"
)

// downError says that no daemon listens.
type downError struct{ error }

// savedLedger is what a daemon that is down has recorded.
type savedLedger struct {
	ledger.Snapshot
	views []lifecycle.View
	ended []*podfsmv1.InspectResponse
	// draining is the start of a drain that the next daemon continues; zero without a drain.
	draining time.Time
	host     leaks.Host
}

// readLedger reads the ledger if err says that the daemon is down, and tells the operator. It
// returns any other err.
func readLedger(ctx context.Context, cmd *cli.Command, err error) (*savedLedger, error) {
	var down downError
	if !errors.As(err, &down) {
		return nil, err
	}
	p := locate(ctx, cmd)
	saved, err := ledger.OpenReadOnly(p.rootLedger(), p.stateLedger())
	if err != nil {
		return nil, explainLedger(down, p, err)
	}
	views, err := records.Replay(saved.Sandboxes)
	if err != nil {
		return nil, err
	}
	plugins, err := cni.GroupsOf(p.stateLedger())
	if err != nil {
		return nil, err
	}
	w := cmd.Root().ErrWriter
	ended, err := history.Read(filepath.Join(p.rootLedger(), history.FileName))
	if err != nil {
		complain(w, "%v", err)
	}
	draining, err := records.DrainingSince(p.rootLedger())
	if err != nil {
		complain(w, "%v", err)
	}
	why := "the daemon is down"
	if saved.InUse {
		why = inUse(p.root)
	}
	complain(w, "%v", down)
	complain(w, "%s; this is its ledger, last written %s ago", why, duration.HumanDuration(time.Since(saved.Written)))
	for _, damage := range saved.Damage {
		complain(w, "the ledger is damaged, sandboxes may be missing: %s: %s", damage.File, printable(damage.Reason))
	}
	return &savedLedger{
		Snapshot: *saved,
		views:    views,
		ended:    ended,
		draining: draining,
		host: leaks.Host{
			// Only the daemon's configuration says which directory it uses. podfsm's names are
			// unique in both.
			NetNSDirs: []string{"/var/run/netns", filepath.Join(p.state, criDir, "netns")},
			Plugins:   plugins,
			Files:     pause.Files{RootDir: filepath.Join(p.root, criDir), StateDir: filepath.Join(p.state, criDir)},
			Bundles:   filepath.Join(p.state, bundlesDir),
			Namespace: records.Namespace,
		},
	}, nil
}

// orLedger returns the answer of the daemon, or the content of its ledger while the daemon is down.
func orLedger[T any](ctx context.Context, cmd *cli.Command, answer T, err error, look func(*savedLedger) (T, error)) (none T, _ error) {
	if err == nil {
		return answer, nil
	}
	found, err := readLedger(ctx, cmd, err)
	if err != nil {
		return none, err
	}
	return look(found)
}

func explainLedger(down downError, p place, err error) error {
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("%w\nthere is no ledger in %s and %s either (--root-dir and --state-dir name containerd's directories)", down, p.root, p.state)
	}
	return fmt.Errorf("%w\nand its ledger can't be read: %w", down, err)
}

// inUse is the text for a daemon that runs but does not answer.
func inUse(root string) string {
	return fmt.Sprintf("a daemon has the ledger in %s open: it starts, hangs, or listens elsewhere", root)
}

func (l *savedLedger) list(ended bool) *podfsmv1.ListResponse {
	var past []*podfsmv1.InspectResponse
	if ended {
		past = l.ended
	}
	response := show.List(l.views, past...)
	if !l.draining.IsZero() {
		response.DrainingSince = timestamppb.New(l.draining)
	}
	return response
}

// status returns the state of podfsm as far as its ledger shows.
func (l *savedLedger) status() *podfsmv1.StatusResponse {
	response := show.Status(l.views)
	if !l.draining.IsZero() {
		response.DrainingSince = timestamppb.New(l.draining)
	}
	return response
}

func (l *savedLedger) inspect(ref string) (*podfsmv1.InspectResponse, error) {
	return show.Inspect(ref, l.views, func() ([]*podfsmv1.InspectResponse, error) { return l.ended, nil })
}

// leaks returns the leaks that can be found without containerd.
func (l *savedLedger) leaks(ctx context.Context, sandboxes []string) (*podfsmv1.LeaksResponse, error) {
	known := map[string]bool{}
	for _, s := range l.Sandboxes {
		known[s.Key.ID] = true
	}
	things, err := l.host.WithoutStores(ctx, func(id string) bool { return known[id] })
	if err != nil {
		return nil, err
	}
	if things, err = show.LeaksOf(things, sandboxes); err != nil {
		return nil, err
	}
	response := &podfsmv1.LeaksResponse{DamagedLedgerFiles: l.Aside}
	for _, thing := range things {
		response.Leaks = append(response.Leaks, show.Leak(thing))
	}
	return response, nil
}
