package journal

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
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
	durable       *durableDB // the committer's alone until it has ended

	// mu is held across writes to the log: serialising them is its purpose.
	mu      sync.Mutex
	live    live
	log     logWriter
	waiting []*operation // durable records that are in the log alone, each sandbox's in Seq order
	closed  bool
}

// Open opens the ledger in two directories, which are created with mode 0700 if need be: rootDir must outlive a reboot,
// stateDir may be a tmpfs. Damage is never a reason to fail. It returns Unavailable when another process keeps ledger.db locked for
// some seconds, and other errors when files can't be created (ResourceExhausted for a full disk).
func Open(rootDir, stateDir string) (*Ledger, error) {
	return open(rootDir, stateDir, BootIDFile)
}

func open(rootDir, stateDir, bootIDFile string) (*Ledger, error) {
	bootID, err := readBootID(bootIDFile)
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{rootDir, stateDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("failed to create the ledger's directory: %w", withClass(err))
		}
	}
	dbFile, inDB, err := findDurable(filepath.Join(rootDir, durableName), os.O_RDWR, unix.LOCK_EX, lockWait)
	if err != nil {
		return nil, err
	}
	inLog := readLog(filepath.Join(stateDir, logName))
	r := replay(inDB, inLog, bootID)

	l := &Ledger{
		rootDir:       rootDir,
		stateDir:      stateDir,
		bootID:        bootID,
		bootSeq:       r.bootSeq,
		bootChanged:   r.bootChanged,
		incomplete:    !inDB.complete && !inLog.complete,
		live:          r.live,
		forgot:        forgotten(inDB, inLog),
		log:           logWriter{path: inLog.path},
		queue:         newQueue(),
		committerDone: make(chan struct{}),
	}
	l.seq.Store(r.lastSeq)
	if err := l.openDurable(dbFile, inDB, inLog.content); err != nil {
		return nil, err
	}
	if err := l.openLog(inLog); err != nil {
		return nil, errors.Join(err, l.durable.close())
	}
	l.damage = slices.Concat(inDB.damage, inLog.damage)
	go l.runCommitter()
	return l, nil
}

// forgotten are the sandboxes that are forgotten for sure: by their tombstones, or because a whole ledger.db lacks what the log knows,
// when a crash came before the tombstone.
func forgotten(inDB, inLog *image) map[Key]uint64 {
	forgot := maps.Clone(inLog.forgot)
	if !inDB.complete {
		return forgot
	}
	for _, s := range inLog.records {
		forgot[s.key] = max(forgot[s.key], s.seq)
	}
	for _, s := range inDB.records {
		delete(forgot, s.key)
	}
	return forgot
}

func readBootID(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("failed to read the boot id: %w", withClass(err))
	}
	return strings.TrimSpace(string(b)), nil
}

// openDurable goes on with the ledger.db that was found, or makes a new one when it is damaged or missing.
func (l *Ledger) openDurable(f *os.File, found *image, inLog logContent) error {
	if found.complete {
		os.Remove(found.path + newSuffix) // which a kill may have left; whoever has the lock is the only one to make it
		db, err := attachDurable(f, len(found.records))
		if err == nil {
			if l.waiting, err = l.live.lacking(found.records, inLog); err != nil {
				return errors.Join(err, db.close())
			}
			l.durable = db
			return nil
		}
		found.damaged(Key{}, "%v", err)
	}
	if f != nil {
		defer f.Close()
	}
	db, kept, err := createDurable(found.path, l.header(), l.live, inLog, found.found)
	if err != nil {
		return err
	}
	l.durable = db
	found.keptAs(kept)
	return nil
}

// openLog rewrites the log with what is live. When that fails, a log that we may append to is better than no ledger.
func (l *Ledger) openLog(found *image) error {
	l.log.keep = found.found && !found.complete
	logged, kept, err := l.log.rewrite(l.header(), l.live, found.content)
	if err == nil {
		l.live = logged
		found.keptAs(kept)
		return nil
	}
	if !found.found || found.newer {
		return err
	}
	log.L.WithError(err).Warn("failed to rewrite the ledger's log, going on with the old one")
	return l.log.reuse()
}

func (l *Ledger) header() header {
	return header{Format: format, BootID: l.bootID, BootSeq: l.bootSeq, LastSeq: l.seq.Load()}
}

// Append records r and sets its Seq (and At, and Durable, see there). A durable record is on the disk when Append returns, unless
// it can wait.
// On an error the record may or may not be there: what it would have announced must not be done.
//
// It returns InvalidArgument for a record without a kind, with an invalid key or of more than 16 MiB, NotFound for a sandbox that
// was not begun or has been forgotten, ResourceExhausted when a disk is full (Append works again once it isn't), Unavailable when
// ledger.db failed otherwise (until the ledger is opened anew), FailedPrecondition after Close, and the context's error.
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
	at, err := l.log.append(frame)
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

// Forget removes everything about a sandbox, from the disk before it returns. Forgetting what is not there is no error, so a
// failed Forget can be repeated: see Append for its errors.
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
	if l.log.size <= l.log.limit {
		return
	}
	logged, _, err := l.log.rewrite(l.header(), l.live, l.log.read())
	if err != nil {
		l.log.limit = l.log.size + logSlack // do not try at each append
		log.L.WithError(err).Warn("failed to rewrite the ledger's log, going on with the old one")
		return
	}
	l.live = logged
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

// Sizes are how many bytes the files have: ledger.db, and the log in the state directory.
func (l *Ledger) Sizes() (durable, log int64, err error) {
	db, err := os.Stat(filepath.Join(l.rootDir, durableName))
	if err != nil {
		return 0, 0, fmt.Errorf("failed to look at the ledger: %w", withClass(err))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return db.Size(), l.log.size, nil
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
	if err := errors.Join(l.log.f.Close(), l.durable.close()); err != nil {
		return fmt.Errorf("failed to close the ledger: %w", withClass(err))
	}
	return nil
}
