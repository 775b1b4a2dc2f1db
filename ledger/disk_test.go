package ledger

import (
	"errors"
	"path/filepath"
	"strings"
	"sync"
)

// change is one change to a disk.
type change struct{ what, path string }

// testDisk records all changes. It calls before with each change, and fails with its error. A
// failing write writes half of its bytes.
type testDisk struct {
	before func(change) error
	mu     sync.Mutex
	made   []change
}

func (d *testDisk) fails(what, path string) error {
	d.mu.Lock()
	c := change{what, path}
	d.made = append(d.made, c)
	before := d.before
	d.mu.Unlock()
	if before == nil {
		return nil
	}
	return before(c)
}

func (d *testDisk) set(before func(change) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.before = before
}

// changes are those of a file, in order.
func (d *testDisk) changes(path string) (whats []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.made {
		if c.path == path {
			whats = append(whats, c.what)
		}
	}
	return whats
}

func (d *testDisk) syncs() (n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.made {
		if c.what == "sync" {
			n++
		}
	}
	return n
}

func (d *testDisk) create(path string) (logFile, error) {
	if err := d.fails("create", path); err != nil {
		return nil, err
	}
	f, err := osDisk{}.create(path)
	return &testFile{f, d, path}, err
}

func (d *testDisk) open(path string) (logFile, int64, error) {
	if err := d.fails("open", path); err != nil {
		return nil, 0, err
	}
	f, size, err := osDisk{}.open(path)
	return &testFile{f, d, path}, size, err
}

func (d *testDisk) rename(from, to string) error {
	if err := d.fails("rename", from); err != nil {
		return err
	}
	return osDisk{}.rename(from, to)
}

func (d *testDisk) syncDir(path string) error {
	if err := d.fails("sync directory", filepath.Join(path, logName)); err != nil {
		return err
	}
	return osDisk{}.syncDir(path)
}

// testFile has the path that it was opened by, without the suffix of a new file.
type testFile struct {
	logFile
	disk *testDisk
	path string
}

func (f *testFile) name() string { return strings.TrimSuffix(f.path, newSuffix) }

func (f *testFile) WriteAt(b []byte, at int64) (int, error) {
	if err := f.disk.fails("write", f.name()); err != nil {
		n, short := f.logFile.WriteAt(b[:len(b)/2], at)
		return n, errors.Join(err, short)
	}
	return f.logFile.WriteAt(b, at)
}

func (f *testFile) Truncate(size int64) error {
	if err := f.disk.fails("truncate", f.name()); err != nil {
		return err
	}
	return f.logFile.Truncate(size)
}

func (f *testFile) Sync() error {
	if err := f.disk.fails("sync", f.name()); err != nil {
		return err
	}
	return f.logFile.Sync()
}
