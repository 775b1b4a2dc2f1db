package ledger

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

const (
	logName = "ledger.log"
	// newSuffix is the suffix of a file that is about to replace another.
	newSuffix = ".new"
	// logSlack is the size in bytes at which a log is rewritten first. From then on the log may
	// double between rewrites, so that their cost stays in proportion to the writes.
	logSlack = 4 << 20
)

// logWriter appends to a log. It is not safe for concurrent use.
type logWriter struct {
	path string
	disk disk
	// synced is true for the durable log: when append or rewrite returns, the data is on the disk.
	synced bool

	f    logFile // nil if there is no file to append to
	size int64
	// limit is the size above which the log is rewritten.
	limit int64
	// cut says that there may be bytes beyond size, from a failed or torn append.
	cut bool
	// suspect says that a sync has failed. The kernel then counts the unwritten pages as clean, and
	// the next sync succeeds without them. So only a new file can be trusted.
	suspect bool
	// keep says that the log has damaged bytes. A rewrite keeps them aside.
	keep bool
	// first goes before the frames of the next append: the header of this boot, for a log that
	// could not be rewritten.
	first []byte
}

// usable says that the log can be appended to without a rewrite.
func (w *logWriter) usable() bool { return w.f != nil && !w.suspect }

// outgrown says that the log has to be rewritten.
func (w *logWriter) outgrown() bool { return w.size > w.limit }

// append writes frames with one write and one sync, and returns their offset. If it fails, the next
// append overwrites what it has written.
func (w *logWriter) append(frames []byte) (at int64, err error) {
	if w.cut {
		if err := w.f.Truncate(w.size); err != nil {
			return 0, fmt.Errorf("failed to cut %s back to %d bytes after a failed write: %w", w.path, w.size, withClass(err))
		}
		w.cut = false
	}
	b := slices.Concat(w.first, frames)
	if _, err := w.f.WriteAt(b, w.size); err != nil {
		w.cut = w.f.Truncate(w.size) != nil
		return 0, fmt.Errorf("failed to append to %s: %w", w.path, withClass(err))
	}
	if w.synced {
		if err := w.f.Sync(); err != nil {
			w.suspect = true
			return 0, fmt.Errorf("failed to sync %s: %w", w.path, withClass(err))
		}
	}
	at = w.size + int64(len(w.first))
	w.size += int64(len(b))
	w.first = nil
	return at, nil
}

// read returns the log as it is in the file.
func (w *logWriter) read() logContent {
	if w.f == nil {
		b, err := os.ReadFile(w.path)
		return logContent{path: w.path, bytes: b, err: err}
	}
	b := make([]byte, w.size)
	n, err := w.f.ReadAt(b, 0)
	if errors.Is(err, io.EOF) {
		err = nil // the file was truncated
	}
	return logContent{path: w.path, bytes: b[:n], err: err}
}

// logged is the content for the rewrite of a log.
type logged struct {
	header     header
	tombstones []*operation // of sandboxes that the other log may still have
	live       live
	frame      func(stored) ([]byte, error) // returns a record's frame
}

// rewrite replaces the log, and returns the records with their offsets in the new one. If it fails,
// for example because a record can't be read, the old log stays. kept is the path of the old log if
// it is kept aside.
func (w *logWriter) rewrite(content logged) (_ live, kept string, _ error) {
	temp := w.path + newSuffix
	f, err := w.disk.create(temp)
	if err != nil {
		return nil, "", fmt.Errorf("failed to create %s: %w", temp, withClass(err))
	}
	moved, size, err := content.write(f)
	if err == nil && w.synced {
		err = withClass(f.Sync())
	}
	if err != nil {
		err = fmt.Errorf("failed to write %s: %w", temp, err)
	} else {
		kept, err = w.replace(temp)
	}
	if err != nil {
		f.Close()
		os.Remove(temp)
		return nil, "", err
	}
	if w.f != nil {
		w.f.Close() // unlinked; its errors don't matter
	}
	*w = logWriter{path: w.path, disk: w.disk, synced: w.synced, f: f, size: size, limit: max(logSlack, 2*size)}
	if w.synced {
		if err := w.disk.syncDir(filepath.Dir(w.path)); err != nil {
			w.suspect = true // a power cut may bring the old log back
			return nil, kept, fmt.Errorf("failed to sync the directory of %s: %w", w.path, withClass(err))
		}
	}
	return moved, kept, nil
}

// replace puts a new log in the place of the old one.
func (w *logWriter) replace(temp string) (kept string, err error) {
	if w.keep {
		if kept, err = keepAside(w.path); err != nil {
			return "", err
		}
	}
	if err := w.disk.rename(temp, w.path); err != nil {
		return "", fmt.Errorf("failed to replace %s: %w", w.path, withClass(err))
	}
	return kept, nil
}

// write writes a whole log.
func (c logged) write(f io.WriterAt) (moved live, size int64, err error) {
	for _, history := range c.live {
		c.header.Records += len(history)
	}
	frame, err := entry{Header: &c.header}.frame()
	if err != nil {
		return nil, 0, err
	}
	out := bufio.NewWriterSize(io.NewOffsetWriter(f, 0), 64<<10) // Flush returns the error of any write
	add := func(frame []byte) {
		out.Write(frame)
		size += int64(len(frame))
	}
	add(frame)
	for _, op := range c.tombstones {
		add(op.frame)
	}
	moved = make(live, len(c.live))
	for k, history := range c.live {
		places := make([]stored, len(history))
		for i, s := range history {
			if frame, err = c.frame(s); err != nil {
				return nil, 0, err
			}
			places[i] = s.loggedAt(size)
			add(frame)
		}
		moved[k] = places
	}
	return moved, size, withClass(out.Flush())
}

// reuse appends to the log that Open found, because a new one could not be made. If the log can't
// be opened either, there is no log until a rewrite succeeds.
func (w *logWriter) reuse(found *image, h header) error {
	if !found.found || found.newer || w.f != nil {
		return nil
	}
	first, err := entry{Header: &h}.frame()
	if err != nil {
		return err
	}
	f, size, err := w.disk.open(w.path)
	if err != nil {
		log.L.WithError(err).Warnf("failed to open %s for writing, will make another", w.path)
		return nil
	}
	w.f, w.size, w.limit, w.first = f, size, size+logSlack, first
	if found.torn > 0 {
		w.size, w.cut = found.torn, true
	}
	return nil
}

func (w *logWriter) close() error {
	if w.f == nil {
		return nil
	}
	return w.f.Close()
}

// logContent is the content of a log.
type logContent struct {
	path  string
	bytes []byte
	err   error // why bytes are incomplete
}

// frame returns the frame of a record, from memory or from the log. It returns DataLoss if the log
// doesn't have the frame as it was written.
func (c logContent) frame(s stored) ([]byte, error) {
	if s.frame != nil {
		return s.frame, nil
	}
	b := c.bytes[min(s.at, int64(len(c.bytes))):]
	_, size, err := cutFrame(b)
	switch {
	case err == nil && frameSum(b) != s.sum:
		err = errors.New("the frame is of another record")
	case err == nil:
		return b[:size], nil
	case errors.Is(err, errShort) && c.err != nil:
		err = c.err
	}
	return nil, fmt.Errorf("failed to read record %d at offset %d of %s: %w: %w", s.seq, s.at, c.path, errdefs.ErrDataLoss, err)
}

// record decodes a record of k. It returns an Unreadable record if that fails.
func (c logContent) record(k Key, s stored) Record {
	var e entry
	frame, err := c.frame(s)
	if err == nil {
		e, err = decodeFrame(frame)
	}
	if err != nil {
		return Record{Seq: s.seq, Key: k, Kind: Unreadable, Error: err.Error(), Durable: s.durable}
	}
	return *e.Record // its checksum shows that it is the right one
}

// readLog reads a log. It never fails: all errors become damage.
func readLog(path string) *image {
	m := newImage(path)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return m
	}
	m.found = true
	if err != nil {
		m.damaged(Key{}, "failed to read: %v", err)
	} else {
		scanLog(m, b)
	}
	m.finish()
	return m
}

// scanLog takes all frames of b. After a damaged frame, it goes on at the next whole one.
func scanLog(m *image, b []byte) {
	m.content = logContent{path: m.path, bytes: b}
	if len(b) == 0 {
		m.damaged(Key{}, "empty")
	}
	for at := 0; at < len(b); {
		frame, e, err := firstFrame(b[at:])
		if err == nil {
			m.take(e, frame, int64(at))
			at += len(frame)
			continue
		}
		next := nextFrame(b, at+1)
		m.damaged(Key{}, "%d bytes at offset %d: %v", next-at, at, err)
		if next == len(b) && isTorn(b[at:], at, err) {
			m.damage[len(m.damage)-1].Torn = true
			m.torn = int64(at)
		}
		at = next
	}
}

// isTorn says that the end of a log is an unfinished append. Either the frame is cut off. Or after
// a power cut, the file has its full size but zeros in place of the lost bytes. Frames don't end
// with a zero.
func isTorn(rest []byte, at int, err error) bool {
	return errors.Is(err, errShort) || at > 0 && rest[len(rest)-1] == 0
}

func firstFrame(b []byte) ([]byte, entry, error) {
	_, size, err := cutFrame(b)
	if err != nil {
		return nil, entry{}, err
	}
	e, err := decodeFrame(b[:size])
	return b[:size], e, err
}

// nextFrame returns the offset of the first whole frame at or after from, or the end of b.
func nextFrame(b []byte, from int) int {
	for from < len(b) {
		i := bytes.Index(b[from:], []byte(magic))
		if i < 0 {
			break
		}
		from += i
		if _, _, err := firstFrame(b[from:]); err == nil {
			return from
		}
		from++
	}
	return len(b)
}
