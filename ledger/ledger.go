package ledger

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// BootIDFile is the path of the boot id, which changes at each boot: see proc_sys_kernel(5),
// random/boot_id. Tests of reboots set it before they open a ledger.
var BootIDFile = "/proc/sys/kernel/random/boot_id"

// Ledger is an open ledger. All methods are safe for concurrent use, except that Append and Forget
// of one sandbox must not run at the same time: their order is undefined.
type Ledger struct {
	rootDir     string
	stateDir    string
	bootID      string
	bootSeq     uint64
	bootChanged bool
	incomplete  bool
	damage      []Damage
	forgot      map[Key]uint64 // the forgotten sandboxes that Open found, with their last sequence numbers
	seq         atomic.Uint64  // the last assigned

	queue         *queue
	committerDone chan struct{}
	lock          *os.File
	durable       logWriter // only the committer uses it until it has ended

	// mu is held across writes to the log: serialising them is its purpose.
	mu      sync.Mutex
	live    live
	log     logWriter
	waiting []*operation // tombstones and records that the durable log lacks, each sandbox's in Seq order
	closed  bool
}

// Open opens the ledger in two directories. It creates them with mode 0700 if they don't exist.
// rootDir must outlive a reboot, stateDir may be on a tmpfs. Open succeeds even if the files are
// damaged or can't be written: Append then fails until they can.
//
// It returns Unavailable if another process keeps the ledger locked for some seconds. It fails if a
// directory can't be created or the boot id can't be read.
func Open(rootDir, stateDir string) (*Ledger, error) {
	return open(osDisk{}, rootDir, stateDir, BootIDFile)
}

func open(on disk, rootDir, stateDir, bootIDFile string) (_ *Ledger, retErr error) {
	bootID, err := readBootID(bootIDFile)
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{rootDir, stateDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("failed to create the ledger's directory: %w", withClass(err))
		}
	}
	lock, err := lockDir(rootDir, lockWait)
	if err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			lock.Close()
		}
	}()
	durable, inLog := readLog(durablePath(rootDir)).inMemory(), readLog(logPath(stateDir))
	r := replay(durable, inLog, bootID)

	l := &Ledger{
		rootDir:       rootDir,
		stateDir:      stateDir,
		bootID:        bootID,
		bootSeq:       r.bootSeq,
		bootChanged:   r.bootChanged,
		incomplete:    !durable.complete && !inLog.complete,
		live:          r.live,
		forgot:        r.forgot,
		lock:          lock,
		durable:       logWriter{path: durable.path, disk: on, synced: true, keep: durable.found && !durable.intact()},
		log:           logWriter{path: inLog.path, disk: on, keep: inLog.found && !inLog.intact()},
		queue:         newQueue(),
		committerDone: make(chan struct{}),
	}
	l.seq.Store(r.lastSeq)
	if err := l.openDurable(durable, inLog); err != nil {
		return nil, err
	}
	if err := l.openLog(inLog); err != nil {
		return nil, errors.Join(err, l.durable.close())
	}
	l.damage = slices.Concat(durable.damage, inLog.damage)
	go l.runCommitter()
	return l, nil
}

func readBootID(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("failed to read the boot id: %w", withClass(err))
	}
	return strings.TrimSpace(string(b)), nil
}

// openDurable rewrites the durable log with the live records. If that fails, it goes on with the
// old log. If the old log can't be opened, there is no log until the committer can make one.
func (l *Ledger) openDurable(found, inLog *image) error {
	_, kept, err := l.durable.rewrite(logged{header: l.header(), live: l.live.durable(), frame: inLog.content.frame})
	found.keptAs(kept)
	if err == nil {
		return nil
	}
	log.L.WithError(err).Warn("failed to rewrite the ledger, going on with the old one")
	if l.waiting, err = l.live.lacking(found.records, inLog.content); err != nil {
		return err
	}
	tombstones, err := inLog.tombstonesFor(found)
	if err != nil {
		return err
	}
	l.waiting = append(l.waiting, tombstones...)
	return l.durable.reuse(found, l.header())
}

// openLog rewrites the state directory's log with the live records. If that fails, it goes on with
// the old log. If the old log can't be opened, there is no log until an append can make one.
func (l *Ledger) openLog(found *image) error {
	kept, err := l.rewriteLog(found.content)
	found.keptAs(kept)
	if err == nil {
		return nil
	}
	log.L.WithError(err).Warn("failed to rewrite the ledger's log, going on with the old one")
	return l.log.reuse(found, l.header())
}

func (l *Ledger) header() header {
	return header{Format: format, BootID: l.bootID, BootSeq: l.bootSeq, LastSeq: l.seq.Load()}
}

// Append records r and sets its Seq, and At and Durable as documented there. When Append returns, a
// durable record is on the disk, unless it can wait. If Append fails, the record may or may not be
// there, so the caller must not do what it announces.
//
// Errors: InvalidArgument for a record without a kind, with an invalid key, or of more than 16 MiB;
// NotFound for a sandbox that was not begun or has been forgotten; ResourceExhausted for a full
// disk; Unavailable for a disk that fails or is read-only; FailedPrecondition after Close; the
// context's error. Append succeeds again as soon as the disk works.
func (l *Ledger) Append(ctx context.Context, r *Record) error {
	if err := l.append(ctx, r); err != nil {
		return fmt.Errorf("failed to record %s of sandbox %q: %w", strings.TrimSpace(string(r.Kind)+" "+r.Step), r.Key, err)
	}
	return nil
}

func (l *Ledger) append(ctx context.Context, r *Record) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := l.admit(r); err != nil {
		return err
	}
	if r.At.IsZero() {
		r.At = time.Now().UTC()
	}
	r.Durable = r.Durable || r.Kind == Begun || r.Kind == CleanupPending
	r.Seq = l.seq.Add(1)
	line := *r
	line.At = r.At.UTC()
	frame, err := entry{Record: &line}.frame()
	if err != nil {
		return err
	}
	s := newStored(r, frame)
	if r.Durable && !r.CanWait {
		return l.submit(ctx, &operation{key: r.Key, put: &s, frame: frame})
	}

	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return errClosed
	}
	if _, ok := l.live[r.Key]; !ok {
		return errNotBegun
	}
	at, err := l.appendLog(frame)
	if err != nil {
		return err
	}
	if r.Durable {
		l.wait(r.Key, s)
	}
	l.live.add(r.Key, s.loggedAt(at))
	l.trimLog()
	return nil
}

var errNotBegun = fmt.Errorf("the sandbox was not begun or has been forgotten: %w", errdefs.ErrNotFound)

// admit refuses a record that replay would drop or misread.
func (l *Ledger) admit(r *Record) error {
	if r.Kind == "" {
		return fmt.Errorf("the record has no kind: %w", errdefs.ErrInvalidArgument)
	}
	if r.Kind == Begun {
		if err := identifiers.Validate(r.Key.Namespace); err != nil {
			return fmt.Errorf("namespace: %w", err)
		}
		return identifiers.Validate(r.Key.ID)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.live[r.Key]; !ok {
		return errNotBegun
	}
	return nil
}

// Forget removes all records of a sandbox. It succeeds for an unknown sandbox.
//
// Forget succeeds even if a disk fails. If the durable log can't be written, the log in the state
// directory has the tombstone, and the durable log gets it later. Until then, a reboot brings the
// sandbox back. If neither log can be written, a restart does so, too.
//
// Errors: FailedPrecondition after Close, and the context's error. Forget can be repeated.
func (l *Ledger) Forget(ctx context.Context, k Key) error {
	if err := l.forget(ctx, k); err != nil {
		return fmt.Errorf("failed to forget sandbox %q: %w", k, err)
	}
	return nil
}

func (l *Ledger) forget(ctx context.Context, k Key) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	frame, err := entry{Forgot: &tombstone{Seq: l.seq.Add(1), Key: k}}.frame()
	if err != nil {
		return err
	}
	return l.submit(ctx, &operation{key: k, frame: frame})
}

// trimLog rewrites the log if it has outgrown the live records. The caller holds mu. live must have
// all records of the log.
func (l *Ledger) trimLog() {
	if !l.log.outgrown() {
		return
	}
	if _, err := l.rewriteLog(l.log.read()); err != nil {
		l.log.limit = l.log.size + logSlack // don't retry at each append
		log.L.WithError(err).Warn("failed to rewrite the ledger's log, going on with the old one")
	}
}

// appendLog appends to the log. It makes the log if there is none. The caller holds mu.
func (l *Ledger) appendLog(frames []byte) (at int64, err error) {
	if !l.log.usable() {
		if _, err := l.rewriteLog(l.log.read()); err != nil {
			return 0, err
		}
	}
	return l.log.append(frames)
}

// rewriteLog replaces the log, whose content is old. The caller holds mu, or is the only user of
// the ledger.
func (l *Ledger) rewriteLog(old logContent) (kept string, err error) {
	moved, kept, err := l.log.rewrite(logged{header: l.header(), tombstones: l.tombstones(), live: l.live, frame: old.frame})
	if err == nil {
		l.live = moved
	}
	return kept, err
}

// Sandboxes returns copies of all records of the sandboxes that are not forgotten, oldest sandbox
// first: those that Open found, and those appended since. A record is Unreadable if its bytes in
// the log were damaged since. After Close, all records in the log are.
func (l *Ledger) Sandboxes() []Sandbox {
	records, inLog := l.copyLive()
	return records.sandboxes(inLog) // not under the lock, because it takes milliseconds
}

// copyLive returns the live records and the log that has their frames.
func (l *Ledger) copyLive() (live, logContent) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := make(live, len(l.live))
	for k, history := range l.live {
		c[k] = slices.Clone(history)
	}
	return c, l.log.read()
}

// BootChanged says whether the node has rebooted since the ledger was last open. It is false for a
// new ledger, and true if that is unknown. After a kill during recovery, the next Open says false.
// So to tell whether a record is from before the reboot, compare its Seq with BootSeq.
func (l *Ledger) BootChanged() bool { return l.bootChanged }

// BootSeq returns the first sequence number of the current boot. Of what a record with a lower
// number describes, only files are left.
func (l *Ledger) BootSeq() uint64 { return l.bootSeq }

// Incomplete says that Open found neither file complete, so sandboxes may be missing in the ledger.
// A new ledger is incomplete.
func (l *Ledger) Incomplete() bool { return l.incomplete }

// Forgotten says that a sandbox was certainly forgotten before Open. It knows the sandboxes that
// were forgotten since the log was last rewritten, at least those since the previous Open. Any
// other sandbox that Open doesn't find may have been lost.
func (l *Ledger) Forgotten(k Key) bool {
	_, ok := l.forgot[k]
	return ok
}

// Damage returns the damage that Open found.
func (l *Ledger) Damage() []Damage { return slices.Clone(l.damage) }

// Sizes returns the sizes of the durable log and of the log in the state directory, in bytes.
func (l *Ledger) Sizes() (durable, log int64, err error) {
	info, err := os.Stat(durablePath(l.rootDir))
	if err != nil {
		return 0, 0, fmt.Errorf("failed to get the size of the ledger: %w", withClass(err))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return info.Size(), l.log.size, nil
}

// Aside returns the paths of the damaged files that are kept for the operator. The ledger removes
// the oldest when there are too many.
func (l *Ledger) Aside() ([]string, error) { return asideIn(l.rootDir, l.stateDir) }

// Close waits for the writes under way and closes the files. It is idempotent.
func (l *Ledger) Close() error {
	l.queue.close()
	<-l.committerDone
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	if err := errors.Join(l.log.close(), l.durable.close(), l.lock.Close()); err != nil {
		return fmt.Errorf("failed to close the ledger: %w", withClass(err))
	}
	return nil
}
