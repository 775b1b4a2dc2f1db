package journal

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

const (
	durableName = "ledger.db"
	// newSuffix is that of a file which is about to replace another.
	newSuffix = ".new"
	// lockWait bounds the wait for another process that has ledger.db locked: the command line tool does so for
	// some milliseconds, a daemon as long as it runs.
	lockWait = 3 * time.Second
	lockPoll = 20 * time.Millisecond
)

var (
	// The bucket holds the header and the records, each value one frame.
	bucketName = []byte("ledger")
	headerKey  = []byte("header")
)

// recordKey sorts a sandbox's records together and in order. Identifiers hold no slash.
func recordKey(k Key, seq uint64) []byte {
	return fmt.Appendf(nil, "%s/%s/%016x", k.Namespace, k.ID, seq)
}

func recordPrefix(k Key) []byte { return fmt.Appendf(nil, "%s/%s/", k.Namespace, k.ID) }

// parseRecordKey returns the sandbox that a key of the bucket belongs to, as far as it can be told.
func parseRecordKey(b []byte) Key {
	parts := bytes.Split(b, []byte("/"))
	if len(parts) != 3 {
		return Key{}
	}
	return Key{Namespace: string(parts[0]), ID: string(parts[1])}
}

// openLocked opens a file that exists and takes bbolt's lock on it: unix.LOCK_EX for writers, unix.LOCK_SH for readers.
// It polls, because a waiting flock(2) can't be ended, and opens anew each time, because the holder may replace the file.
// It returns Unavailable when the lock is still held after wait.
func openLocked(path string, flag, lock int, wait time.Duration) (*os.File, error) {
	for deadline := time.Now().Add(wait); ; time.Sleep(lockPoll) {
		f, err := tryLocked(path, flag, lock)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("failed to open %s: %w", path, withClass(err))
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("%s is locked by another process, most likely a running containerd: %w", path, errdefs.ErrUnavailable)
		}
	}
}

func tryLocked(path string, flag, lock int) (_ *os.File, retErr error) {
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			f.Close()
		}
	}()
	if err := unix.Flock(int(f.Fd()), lock|unix.LOCK_NB); err != nil {
		return nil, err
	}
	if !isAt(f, path) {
		return nil, unix.EWOULDBLOCK // replaced between open and lock: the lock that counts is another
	}
	return f, nil
}

func isAt(f *os.File, path string) bool {
	ours, err := f.Stat()
	if err != nil {
		return false
	}
	current, err := os.Stat(path)
	return err == nil && os.SameFile(ours, current)
}

// findDurable locks and reads ledger.db. All that can be wrong with its content becomes damage. The file is nil when there is none.
func findDurable(path string, flag, lock int, wait time.Duration) (*os.File, *image, error) {
	m := newImage(path)
	f, err := openLocked(path, flag, lock, wait)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, m, nil
	}
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("failed to stat %s: %w", path, withClass(err))
	}
	readDurable(m, f, info.Size())
	return f, m, nil
}

func readDurable(m *image, r io.ReaderAt, size int64) {
	m.found = true
	defer m.finish()
	problems := walkBolt(r, size, bucketName, func(key, value []byte) {
		e, err := decodeFrame(value)
		switch {
		case err != nil:
			m.damaged(parseRecordKey(key), "record %q: %v", key, err)
		case bytes.Equal(key, headerKey) && e.Header != nil,
			e.Record != nil && bytes.Equal(key, recordKey(e.Record.Key, e.Record.Seq)):
			m.take(e, bytes.Clone(value))
		default:
			m.damaged(parseRecordKey(key), "record %q holds something else", key)
		}
	})
	for _, p := range problems {
		m.damaged(Key{}, "%v", p)
	}
	// What a page does not count among its elements is no error of bbolt's format, but a loss all the same.
	if h := m.header; h != nil && h.Format <= format && h.Records != len(m.records) {
		m.damaged(Key{}, "holds %d records instead of %d", len(m.records), h.Records)
	}
}

// durableDB writes ledger.db. It is not safe for concurrent use.
type durableDB struct {
	f  *os.File
	db *bbolt.DB
	// records is the number of records in the bucket.
	records int
	// broken is set once bbolt has failed with anything but a full disk: what it then has in memory may differ from what is on
	// the disk, and writing on could destroy what is good.
	broken error
}

// attachDurable gives a locked file, sound or empty, with that many records to bbolt. It owns f from then on.
func attachDurable(f *os.File, records int) (*durableDB, error) {
	d := &durableDB{f: f, records: records}
	err := guarded(func() (err error) {
		d.db, err = bbolt.Open(f.Name(), 0o600, &bbolt.Options{
			OpenFile: func(string, int, os.FileMode) (*os.File, error) { return f, nil },
		})
		return err
	})
	if err != nil {
		release(f)
		return nil, fmt.Errorf("failed to open %s: %w", f.Name(), withClass(err))
	}
	return d, nil
}

// release ends the lock and closes the file. Closing alone does not end the lock if bbolt has left its memory map behind: that
// keeps the open file description, which holds the lock, see flock(2).
func release(f *os.File) error {
	return errors.Join(unix.Flock(int(f.Fd()), unix.LOCK_UN), f.Close())
}

// createDurable puts a new ledger.db with the given content in the place of the old one, if there is one.
// If keep is set, the old one is kept aside under the name that is returned.
func createDurable(path string, h header, l live, inLog logContent, keep bool) (_ *durableDB, kept string, retErr error) {
	temp := path + newSuffix
	f, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, "", fmt.Errorf("failed to create %s: %w", temp, withClass(err))
	}
	defer func() {
		if retErr != nil {
			os.Remove(temp)
		}
	}()
	d, err := attachDurable(f, 0)
	if err != nil {
		return nil, "", err
	}
	defer func() {
		if retErr != nil {
			d.close()
		}
	}()
	var ops []*operation
	for k, history := range l {
		for i, s := range history {
			// The first record stands for the sandbox, also where its Begun is lost: what ledger.db does not know is forgotten.
			if !s.durable && i > 0 {
				continue
			}
			frame, err := inLog.frame(s)
			if err != nil {
				return nil, "", err
			}
			ops = append(ops, &operation{key: k, put: &s, frame: frame})
		}
	}
	if err := d.commit(h, ops); err != nil {
		return nil, "", err
	}
	if keep {
		if kept, err = keepAside(path); err != nil {
			return nil, "", err
		}
	}
	if err := os.Rename(temp, path); err != nil {
		return nil, "", fmt.Errorf("failed to replace %s: %w", path, withClass(err))
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return nil, "", err
	}
	return d, kept, nil
}

// commit applies the operations and the header in one fsynced transaction.
func (d *durableDB) commit(h header, ops []*operation) error {
	if d.broken != nil {
		return fmt.Errorf("the ledger takes no durable records until containerd is restarted: %w: %w", errdefs.ErrUnavailable, d.broken)
	}
	h.Records = d.records
	err := guarded(func() error {
		return d.db.Update(func(tx *bbolt.Tx) error { return h.apply(tx, ops) })
	})
	if err == nil {
		d.records = h.Records
		return nil
	}
	err = fmt.Errorf("failed to commit to %s: %w", d.f.Name(), withClass(err))
	if !errdefs.IsResourceExhausted(err) {
		d.broken = err
	}
	return err
}

// apply carries out the operations, keeps count of the records, and then writes h itself.
func (h *header) apply(tx *bbolt.Tx, ops []*operation) error {
	b, err := tx.CreateBucketIfNotExists(bucketName)
	if err != nil {
		return err
	}
	for _, op := range ops {
		doomed := op.superseded
		if op.put == nil {
			doomed = recordsOf(b, op.key)
		}
		for _, k := range doomed {
			if b.Get(k) == nil {
				continue
			}
			if err := b.Delete(k); err != nil {
				return err
			}
			h.Records--
		}
		if op.put != nil {
			if err := b.Put(recordKey(op.key, op.put.seq), op.frame); err != nil {
				return err
			}
			h.Records++
		}
	}
	frame, err := entry{Header: h}.frame()
	if err != nil {
		return err
	}
	return b.Put(headerKey, frame)
}

// recordsOf returns the keys of a sandbox's records. They are copies: deleting moves what a cursor returns.
func recordsOf(b *bbolt.Bucket, k Key) (keys [][]byte) {
	prefix, c := recordPrefix(k), b.Cursor()
	for key, _ := c.Seek(prefix); bytes.HasPrefix(key, prefix); key, _ = c.Next() {
		keys = append(keys, bytes.Clone(key))
	}
	return keys
}

func (d *durableDB) close() error {
	if d.broken != nil {
		return release(d.f) // bbolt's Close could wait for ever for a mutex that its panic has left locked
	}
	return guarded(d.db.Close)
}

// guarded makes errors of bbolt's panics and of faults in its memory map (the file was cut under it, or its disk fails).
func guarded(fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("bbolt panicked: %v", p)
		}
	}()
	return fn()
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("failed to sync %s: %w", path, withClass(err))
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("failed to sync %s: %w", path, withClass(err))
	}
	return nil
}
