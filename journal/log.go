package journal

import (
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

// logFile is the part of *os.File that the log writes through. Tests put faults behind it.
type logFile interface {
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

// append writes frames with one system call. When that fails the log is cut back to what it was.
func (w *logWriter) append(frames []byte) error {
	if w.cut {
		if err := w.f.Truncate(w.size); err != nil {
			return fmt.Errorf("failed to cut %s back to %d bytes after a failed write: %w", w.path, w.size, withClass(err))
		}
		w.cut = false
	}
	if _, err := w.f.WriteAt(frames, w.size); err != nil {
		w.cut = w.f.Truncate(w.size) != nil
		return fmt.Errorf("failed to append to %s: %w", w.path, withClass(err))
	}
	w.size += int64(len(frames))
	return nil
}

// rewrite replaces the log by one with the given header and records. The old one stays when it fails. If the old one is to be
// kept aside, rewrite returns where.
func (w *logWriter) rewrite(h header, l live) (kept string, retErr error) {
	content, err := entry{Header: &h}.frame()
	if err != nil {
		return "", err
	}
	for _, history := range l {
		for _, s := range history {
			content = append(content, s.frame...)
		}
	}

	temp := w.path + ".new"
	f, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return "", fmt.Errorf("failed to create %s: %w", temp, withClass(err))
	}
	defer func() {
		if retErr != nil {
			f.Close()
			os.Remove(temp)
		}
	}()
	if _, err := f.Write(content); err != nil {
		return "", fmt.Errorf("failed to write %s: %w", temp, withClass(err))
	}
	if w.keep {
		if kept, err = keepAside(w.path); err != nil {
			return "", err
		}
	}
	if err := os.Rename(temp, w.path); err != nil {
		return "", fmt.Errorf("failed to replace %s: %w", w.path, withClass(err))
	}
	if w.f != nil {
		w.f.Close() // no longer linked; nothing of it is needed
	}
	size := int64(len(content))
	w.f, w.size, w.limit = f, size, max(logSlack, 2*size)
	w.cut, w.keep = false, false
	return kept, nil
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
	if len(b) == 0 {
		m.damaged(Key{}, "empty")
	}
	for at := 0; at < len(b); {
		frame, e, err := firstFrame(b[at:])
		if err == nil {
			m.take(e, bytes.Clone(frame)) // clone: the records that stay must not hold the whole file in memory
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
