package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v3"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/apimachinery/pkg/util/duration"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/history"
	"github.com/podfsm/podfsm/journal"
	"github.com/podfsm/podfsm/leaks"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/pause"
	"github.com/podfsm/podfsm/records"
)

// Where containerd's plugins have their directories, below its root and state.
const (
	ledgerDir  = "io.containerd.podsandbox.controller.v1.podfsm"
	criDir     = "io.containerd.grpc.v1.cri"
	bundlesDir = "io.containerd.runtime.v2.task"
)

// directoryFlags say where the daemon keeps its ledger, for when it is down.
func directoryFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{
			Name:  "root",
			Usage: "containerd's root directory, read while the daemon is down",
			Value: defaults.DefaultRootDir,
		},
		&cli.StringFlag{
			Name:  "state",
			Usage: "containerd's state directory, read while the daemon is down",
			Value: defaults.DefaultStateDir,
		},
	}
}

// downError says that no daemon listens.
type downError struct{ error }

// ledger is what a daemon that is down has left on record.
type ledger struct {
	journal.Snapshot
	views []lifecycle.View
	ended []*podfsmv1.InspectResponse
	// draining is when a drain began that the next daemon goes on with; zero for
	// none.
	draining time.Time
	host     leaks.Host
}

// readLedger reads the ledger if err says that the daemon is down, and tells
// the operator so; else it returns err.
func readLedger(cmd *cli.Command, err error) (*ledger, error) {
	var down downError
	if !errors.As(err, &down) {
		return nil, err
	}
	root, state := cmd.String("root"), cmd.String("state")
	saved, err := journal.OpenReadOnly(filepath.Join(root, ledgerDir), filepath.Join(state, ledgerDir))
	if err != nil {
		return nil, explainLedger(down, root, state, err)
	}
	views, err := records.Replay(saved.Sandboxes)
	if err != nil {
		return nil, err
	}
	plugins, err := cni.GroupsOf(filepath.Join(state, ledgerDir))
	if err != nil {
		return nil, err
	}
	w := cmd.Root().ErrWriter
	ended, err := history.Read(filepath.Join(root, ledgerDir, history.FileName))
	if err != nil {
		fmt.Fprintf(w, "podfsm: %v\n", err)
	}
	draining, err := records.DrainingSince(filepath.Join(root, ledgerDir))
	if err != nil {
		fmt.Fprintf(w, "podfsm: %v\n", err)
	}
	why := "the daemon is down"
	if saved.InUse {
		why = inUse(root)
	}
	fmt.Fprintf(w, "podfsm: %v\n", down)
	fmt.Fprintf(w, "podfsm: %s; this is its ledger, last written %s ago\n", why, duration.HumanDuration(time.Since(saved.Written)))
	for _, damage := range saved.Damage {
		fmt.Fprintf(w, "podfsm: the ledger is damaged, sandboxes may be missing: %s: %s\n", damage.File, printable(damage.Reason))
	}
	return &ledger{
		Snapshot: *saved,
		views:    views,
		ended:    ended,
		draining: draining,
		host: leaks.Host{
			// The daemon's configuration says which of them; podfsm's names are in no other.
			NetNSDirs: []string{"/var/run/netns", filepath.Join(state, criDir, "netns")},
			Plugins:   plugins,
			Files:     pause.Files{RootDir: filepath.Join(root, criDir), StateDir: filepath.Join(state, criDir)},
			Bundles:   filepath.Join(state, bundlesDir),
			Namespace: records.Namespace,
		},
	}, nil
}

// orLedger is the daemon's answer, or what its ledger says while it is down.
func orLedger[T any](cmd *cli.Command, answer T, err error, look func(*ledger) (T, error)) (none T, _ error) {
	if err == nil {
		return answer, nil
	}
	found, err := readLedger(cmd, err)
	if err != nil {
		return none, err
	}
	return look(found)
}

func explainLedger(down downError, root, state string, err error) error {
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("%w\nthere is no ledger in %s and %s either (--root and --state name containerd's directories)", down, root, state)
	}
	return fmt.Errorf("%w\nand its ledger can't be read: %w", down, err)
}

// inUse says of a daemon that doesn't answer that there is one all the same.
func inUse(root string) string {
	return fmt.Sprintf("a daemon has the ledger in %s open: it starts, hangs, or listens elsewhere", root)
}

func (l *ledger) list(ended bool) *podfsmv1.ListResponse {
	var past []*podfsmv1.InspectResponse
	if ended {
		past = l.ended
	}
	response := records.List(l.views, past...)
	if !l.draining.IsZero() {
		response.DrainingSince = timestamppb.New(l.draining)
	}
	return response
}

func (l *ledger) inspect(ref string) (*podfsmv1.InspectResponse, error) {
	return records.Inspect(ref, l.views, func() ([]*podfsmv1.InspectResponse, error) { return l.ended, nil })
}

// leaks are those that can be seen without containerd.
func (l *ledger) leaks(ctx context.Context) (*podfsmv1.LeaksResponse, error) {
	known := map[string]bool{}
	for _, s := range l.Sandboxes {
		known[s.Key.ID] = true
	}
	things, err := l.host.WithoutStores(ctx, func(id string) bool { return known[id] })
	if err != nil {
		return nil, err
	}
	response := &podfsmv1.LeaksResponse{DamagedLedgerFiles: l.Aside}
	for _, thing := range things {
		response.Leaks = append(response.Leaks, records.Leak(thing))
	}
	return response, nil
}
