package journal

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	logName = "ledger.log"
	// logSlack is the size, in bytes, that the log may grow to before it is rewritten for the first time. After that it may
	// double between rewrites: their cost stays in proportion to what is written.
	logSlack = 4 << 20
)

// logFile is the part of *os.File that the log goes through. Tests put faults behind it.
type logFile interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Truncate(size int64) error
}

// logWriter appends to the log. It is not safe for concurrent use.
type logWriter struct {
	path string
	f    logFile
	size int64
	// limit is the size from which on the log is to be rewritten.
	limit int64
	// cut is set when a failed append may have left bytes beyond size.
	cut bool
	// keep is set when the log has damaged bytes, which are to be kept aside when it is rewritten.
	keep bool
}

// append writes frames with one system call and returns where they begin. When that fails the log is cut back to what it was.
func (w *logWriter) append(frames []byte) (at int64, err error) {
	if w.cut {
		if err := w.f.Truncate(w.size); err != nil {
			return 0, fmt.Errorf("failed to cut %s back to %d bytes after a failed write: %w", w.path, w.size, withClass(err))
		}
		w.cut = false
	}
	if _, err := w.f.WriteAt(frames, w.size); err != nil {
		w.cut = w.f.Truncate(w.size) != nil
		return 0, fmt.Errorf("failed to append to %s: %w", w.path, withClass(err))
	}
	at = w.size
	w.size += int64(len(frames))
	return at, nil
}

// read returns the log as it is now on the disk, at once: a restart needs all of it.
func (w *logWriter) read() logContent {
	b := make([]byte, w.size)
	n, err := w.f.ReadAt(b, 0)
	if errors.Is(err, io.EOF) {
		err = nil // somebody has cut it
	}
	return logContent{path: w.path, bytes: b[:n], err: err}
}

// rewrite replaces the log, whose content old is, by one with the given header and records, and returns the records as they stand there.
// The old one stays when it fails, also because a record can't be read. If the old one is to be kept aside, rewrite returns where.
func (w *logWriter) rewrite(h header, l live, old logContent) (_ live, kept string, retErr error) {
	temp := w.path + newSuffix
	f, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, "", fmt.Errorf("failed to create %s: %w", temp, withClass(err))
	}
	defer func() {
		if retErr != nil {
			f.Close()
			os.Remove(temp)
		}
	}()
	logged, size, err := writeLog(f, h, l, old)
	if err != nil {
		return nil, "", fmt.Errorf("failed to write %s: %w", temp, err)
	}
	if w.keep {
		if kept, err = keepAside(w.path); err != nil {
			return nil, "", err
		}
	}
	if err := os.Rename(temp, w.path); err != nil {
		return nil, "", fmt.Errorf("failed to replace %s: %w", w.path, withClass(err))
	}
	if w.f != nil {
		w.f.Close() // no longer linked; nothing of it is needed
	}
	w.f, w.size, w.limit = f, size, max(logSlack, 2*size)
	w.cut, w.keep = false, false
	return logged, kept, nil
}

// writeLog writes a whole log, whose records may have stood in the old one.
func writeLog(f io.Writer, h header, l live, old logContent) (logged live, size int64, err error) {
	frame, err := entry{Header: &h}.frame()
	if err != nil {
		return nil, 0, err
	}
	out := bufio.NewWriterSize(f, 64<<10) // it keeps an error for Flush
	out.Write(frame)
	size = int64(len(frame))
	logged = make(live, len(l))
	for k, history := range l {
		moved := make([]stored, len(history))
		for i, s := range history {
			if frame, err = old.frame(s); err != nil {
				return nil, 0, err
			}
			out.Write(frame)
			moved[i] = s.loggedAt(size)
			size += int64(len(frame))
		}
		logged[k] = moved
	}
	if err := out.Flush(); err != nil {
		return nil, 0, withClass(err)
	}
	return logged, size, nil
}

// reuse opens the log that is there, to go on at its end.
func (w *logWriter) reuse() error {
	f, err := os.OpenFile(w.path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("failed to open %s: %w", w.path, withClass(err))
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return fmt.Errorf("failed to stat %s: %w", w.path, withClass(err))
	}
	w.f, w.size, w.limit = f, info.Size(), info.Size()+logSlack
	return nil
}

// logContent is the log as it was read.
type logContent struct {
	path  string
	bytes []byte
	err   error // why that is not all
}

// frame returns the frame of a record, from memory or from where it stands in the log. It returns DataLoss when that isn't there any more
// as it was written.
func (c logContent) frame(s stored) ([]byte, error) {
	if s.frame != nil {
		return s.frame, nil
	}
	b := c.bytes[min(s.at, int64(len(c.bytes))):]
	_, size, err := cutFrame(b)
	switch {
	case err == nil && frameSum(b) != s.sum:
		err = errors.New("another frame is there")
	case err == nil:
		return b[:size], nil
	case errors.Is(err, errShort) && c.err != nil:
		err = c.err
	}
	return nil, fmt.Errorf("failed to read record %d at offset %d of %s: %w: %w", s.seq, s.at, c.path, errdefs.ErrDataLoss, err)
}

// record decodes a record of k, or says why it can't.
func (c logContent) record(k Key, s stored) Record {
	var e entry
	frame, err := c.frame(s)
	if err == nil {
		e, err = decodeFrame(frame)
	}
	if err != nil {
		return Record{Seq: s.seq, Key: k, Kind: Unreadable, Error: err.Error(), Durable: s.durable}
	}
	return *e.Record // by its checksum it is the one that was read before, or that Append has encoded
}

// readLog reads the log as it is. All that can be wrong with it becomes damage.
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

// scanLog takes all frames of b. After a damaged one it goes on at the next that is whole.
func scanLog(m *image, b []byte) {
	m.content = logContent{path: m.path, bytes: b}
	if len(b) == 0 {
		m.damaged(Key{}, "empty")
	}
	for at := 0; at < len(b); {
		frame, e, err := firstFrame(b[at:])
		if err == nil {
			m.takeAt(e, frame, int64(at))
			at += len(frame)
			continue
		}
		next := nextFrame(b, at+1)
		m.damaged(Key{}, "%d bytes at offset %d: %v", next-at, at, err)
		m.damage[len(m.damage)-1].Torn = next == len(b) && errors.Is(err, errShort)
		at = next
	}
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

// withClass gives an error of the operating system the class that its caller should see.
func withClass(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: free some space there: %w", errdefs.ErrResourceExhausted, err)
	}
	return fmt.Errorf("%w: %w", errdefs.ErrInternal, err)
}
