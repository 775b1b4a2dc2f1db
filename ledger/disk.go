package ledger

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// disk is how the logs change files. Tests replace it to inject faults.
type disk interface {
	// create makes an empty file. It truncates a file that exists.
	create(path string) (logFile, error)
	// open opens a file that exists, and returns its size.
	open(path string) (logFile, int64, error)
	rename(from, to string) error
	syncDir(path string) error
}

// logFile is an open file of a log.
type logFile interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Truncate(size int64) error
	// Sync returns once the file's bytes and size are on the disk.
	Sync() error
}

type osDisk struct{}

func (osDisk) create(path string) (logFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osDisk) open(path string) (logFile, int64, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return osFile{f}, info.Size(), nil
}

func (osDisk) rename(from, to string) error { return os.Rename(from, to) }

func (osDisk) syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

type osFile struct{ *os.File }

// Sync doesn't sync the time of the last write as fsync(2) does: on some filesystems, that costs a
// second write.
func (f osFile) Sync() error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("fdatasync", err)
		}
	}
}

// withClass adds the class and the remedy to an error of the operating system.
func withClass(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: free some space there: %w", errdefs.ErrResourceExhausted, err)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: remount the filesystem read-write: %w", errdefs.ErrUnavailable, err)
	case errors.Is(err, unix.EIO):
		return fmt.Errorf("%w: check the disk: %w", errdefs.ErrUnavailable, err)
	}
	return fmt.Errorf("%w: %w", errdefs.ErrInternal, err)
}
