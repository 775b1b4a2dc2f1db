package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/podfsm/podfsm/snapshot/remapping"
)

// Strategy is a way to remap the owners of files for a user namespace, and whether it works.
type Strategy struct {
	Name     string // such as "idmap" or "metacopy"
	Works    bool
	Evidence string
	Remedy   string // "" if it works
}

// tryDir begins the name of the directory of a try. The process's id follows.
const tryDir = ".podfsm-doctor-"

// overlays tries the strategies on the filesystem of each snapshotter.
func overlays(ctx context.Context, n Node) []Finding {
	inRoot := group[Snapshotter]{of: Snapshotter{Root: n.Root, RemapIDs: true}}
	if n.Config == nil {
		return n.overlaysIn(ctx, inRoot)
	}
	var found []Finding
	for _, g := range grouped(n.Config.Handlers, func(h Handler) Snapshotter { return h.Snapshotter }, equal) {
		if g.of.Loaded && g.of.Root != "" { // otherwise the check of snapshotters has a finding
			found = append(found, n.overlaysIn(ctx, g)...)
		}
	}
	if len(found) == 0 && n.Daemon == 0 {
		return n.overlaysIn(ctx, inRoot) // no snapshotter was used yet
	}
	if len(found) == 0 {
		found = []Finding{unknown("the directories of the handlers' snapshotters are unknown", "see the check snapshotter")}
	}
	return found
}

// ownSnapshotter is the name of podfsm's own snapshotter, which works with any strategy.
const ownSnapshotter = "podfsm"

// overlaysIn returns a finding for each strategy. A strategy that doesn't work is a failure if the
// snapshotter needs it, a warning if no strategy works, and otherwise OK.
func (n Node) overlaysIn(ctx context.Context, g group[Snapshotter]) (found []Finding) {
	dir := existing(g.of.Root) // the first use of the snapshotter makes the directory
	strategies, err := n.Strategies(ctx, dir)
	if err != nil {
		return []Finding{unknown(err.Error(), "make sure that the directory exists and can be written")}
	}
	working := slices.ContainsFunc(strategies, func(s Strategy) bool { return s.Works })
	for _, s := range strategies {
		f := ok(fmt.Sprintf("%s in %s", s.Evidence, dir))
		switch needed := s.Name == StrategyIDMap && g.of.RemapIDs && g.of.Name != ownSnapshotter; {
		case s.Works:
		case needed || !working && g.of.Name == ownSnapshotter:
			f = fail(UserNSPods, f.Evidence, s.Remedy)
			f.Handlers = g.handlers
		case !working || s.Name == StrategyIDMap:
			f = warn(f.Evidence, s.Remedy)
		default:
			f.Evidence += "; not needed, because another strategy works"
		}
		f.Subject = s.Name
		found = append(found, f)
	}
	return found
}

// StrategyIDMap is the strategy that containerd's own snapshotters need.
const StrategyIDMap = string(remapping.IDMap)

// TryStrategies tries each strategy of podfsm's snapshotter in a directory below dir. After a kill,
// no mount stays, and the next try removes the directory.
func TryStrategies(ctx context.Context, dir string) (_ []Strategy, err error) {
	if err := removeTries(dir); err != nil {
		return nil, err
	}
	made, err := os.MkdirTemp(dir, fmt.Sprintf("%s%d-*", tryDir, os.Getpid()))
	if err != nil {
		return nil, fmt.Errorf("failed to make a directory in %s: %w", dir, errors.Unwrap(err))
	}
	defer func() { err = errors.Join(err, os.RemoveAll(made)) }()
	report, err := remapping.Probe(ctx, made)
	if err != nil {
		return nil, err
	}
	// Replace the random names of the try's directories, so that the evidence is the same each
	// time.
	names := regexp.MustCompile(regexp.QuoteMeta(made) + "(/probe-[0-9]+)?")
	var strategies []Strategy
	for _, v := range report {
		evidence := names.ReplaceAllLiteralString(v.Evidence, filepath.Join(dir, tryDir+"PID"))
		strategies = append(strategies, Strategy{Name: string(v.Strategy), Works: v.Works, Evidence: evidence, Remedy: v.Remedy})
	}
	return strategies, nil
}

// removeTries removes the directories of processes that were killed in a try.
func removeTries(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		rest, ours := strings.CutPrefix(e.Name(), tryDir)
		pid, _, _ := strings.Cut(rest, "-")
		if _, err := os.Stat("/proc/" + pid); !ours || err == nil {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}
