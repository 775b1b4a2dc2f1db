package journal

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

// BootIDFile: see proc_sys_kernel(5), random/boot_id. The id is made anew at each boot. It is a variable for tests that reboot,
// and must be set before anything is opened.
var BootIDFile = "/proc/sys/kernel/random/boot_id"

// Ledger is an open ledger. All methods are safe for concurrent use, but Append and Forget of one sandbox must not run at the
// same time: which of them wins is not defined.
type Ledger struct {
	rootDir     string
	stateDir    string
	bootID      string
	bootSeq     uint64
	bootChanged bool
	incomplete  bool
	damage      []Damage
	forgot      map[Key]uint64 // those that Open has found to be forgotten, by their last sequence numbers
	seq         atomic.Uint64  // the last one given

	queue         *queue
	committerDone chan struct{}
	lock          *os.File
	durable       logWriter // the committer's alone until it has ended

	// mu is held across writes to the log: serialising them is its purpose.
	mu      sync.Mutex
	live    live
	log     logWriter
	waiting []*operation // what the durable log lacks: tombstones, and records that can wait, each sandbox's in Seq order
	closed  bool
}

// Open opens the ledger in two directories, which are created with mode 0700 if need be: rootDir must outlive a reboot,
// stateDir may be a tmpfs. Damage is never a reason to fail, and neither are files that can't be written to: Append fails until they can.
// Open returns Unavailable when another process keeps the ledger locked for some seconds, and other errors when a directory can't be
// created.
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

// openDurable rewrites the durable log with what is live. When that fails it goes on with the old one, or, where that can't be appended
// to, without any until the committer can make one.
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
	unburied, err := inLog.tombstonesFor(found)
	if err != nil {
		return err
	}
	l.waiting = append(l.waiting, unburied...)
	return l.durable.reuse(found, l.header())
}

// openLog rewrites the log with what is live. When that fails it goes on with the old one, or, where that can't be appended to, without
// any until a record can make one.
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

// Append records r and sets its Seq (and At, and Durable, see there). A durable record is on the disk when Append returns, unless
// it can wait.
// On an error the record may or may not be there: what it would have announced must not be done.
//
// It returns InvalidArgument for a record without a kind, with an invalid key or of more than 16 MiB, NotFound for a sandbox that
// was not begun or has been forgotten, ResourceExhausted when a disk is full, Unavailable when a disk fails or is read-only,
// FailedPrecondition after Close, and the context's error. Append works again once the disk does.
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
	r.Durable = r.Durable || r.Kind == Begun || r.Kind == Owed
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

// admit refuses records that replay would drop or misread.
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

// Forget removes everything about a sandbox. Forgetting what is not there is no error.
//
// No disk keeps a sandbox from being forgotten: where the durable log can't be written to, the log in the state directory says that the
// sandbox is forgotten, and the durable one follows when it can. Until then a reboot brings the sandbox back. Where neither can be
// written to, a restart does so, too. Forget returns FailedPrecondition after Close, and the context's error, and can be repeated then.
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

// trimLog rewrites the log when it has outgrown what is live. The caller holds mu and has filed in live all that is in the log.
func (l *Ledger) trimLog() {
	if !l.log.outgrown() {
		return
	}
	if _, err := l.rewriteLog(l.log.read()); err != nil {
		l.log.limit = l.log.size + logSlack // do not try at each append
		log.L.WithError(err).Warn("failed to rewrite the ledger's log, going on with the old one")
	}
}

// appendLog appends to the log, and makes one if there is none. The caller holds mu.
func (l *Ledger) appendLog(frames []byte) (at int64, err error) {
	if !l.log.usable() {
		if _, err := l.rewriteLog(l.log.read()); err != nil {
			return 0, err
		}
	}
	return l.log.append(frames)
}

// rewriteLog replaces the log, whose content old is. The caller holds mu, or has the ledger alone.
func (l *Ledger) rewriteLog(old logContent) (kept string, err error) {
	moved, kept, err := l.log.rewrite(logged{header: l.header(), tombstones: l.tombstones(), live: l.live, frame: old.frame})
	if err == nil {
		l.live = moved
	}
	return kept, err
}

// Sandboxes returns copies of all records of the sandboxes that are not forgotten, oldest sandbox first: what was found at Open
// and what was appended since. A record whose bytes in the log were damaged meanwhile is Unreadable, as all in the log are after Close.
func (l *Ledger) Sandboxes() []Sandbox {
	records, inLog := l.copyLive()
	return records.sandboxes(inLog) // decodes for milliseconds: not under the lock
}

// copyLive returns the records with the log that they stand in.
func (l *Ledger) copyLive() (live, logContent) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := make(live, len(l.live))
	for k, history := range l.live {
		c[k] = slices.Clone(history)
	}
	return c, l.log.read()
}

// BootChanged says whether the node has booted since the ledger was last open; false if it is new, true if it can't be told.
// When recovery itself is killed the next Open returns false, so to judge a single record compare its Seq to BootSeq.
func (l *Ledger) BootChanged() bool { return l.bootChanged }

// BootSeq is the first sequence number of the present boot: of what a record with a lower one tells, only files are left.
func (l *Ledger) BootSeq() uint64 { return l.bootSeq }

// Incomplete says that neither file was there as it was written, so there may be sandboxes that the ledger doesn't know. A new ledger
// is incomplete.
func (l *Ledger) Incomplete() bool { return l.incomplete }

// Forgotten says that a sandbox was forgotten before Open, for sure: of those that Open doesn't find, others may have been lost.
// It knows of those that were forgotten since the log was last rewritten, at least since the Open before.
func (l *Ledger) Forgotten(k Key) bool {
	_, ok := l.forgot[k]
	return ok
}

// Damage returns what Open could not read.
func (l *Ledger) Damage() []Damage { return slices.Clone(l.damage) }

// Sizes are how many bytes the files have: the durable log, and the log in the state directory.
func (l *Ledger) Sizes() (durable, log int64, err error) {
	info, err := os.Stat(durablePath(l.rootDir))
	if err != nil {
		return 0, 0, fmt.Errorf("failed to look at the ledger: %w", withClass(err))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return info.Size(), l.log.size, nil
}

// Aside returns the paths of the damaged files that are kept for somebody to look at; nothing else removes them but newer ones.
func (l *Ledger) Aside() ([]string, error) { return asideIn(l.rootDir, l.stateDir) }

// Close waits for the writes under way and closes the files. Closing twice is no error.
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
