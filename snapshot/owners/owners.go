// Package owners changes the owners of the files of an image for a user namespace, on nodes where
// no mount can map them.
package owners

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

// workers is the number of directories that are processed in parallel. Of 1, 2, 4 and 8 on two busy
// cores (BenchmarkShift), 2 and 4 were equal, 1 slower, and 8 not faster. A copy also waits for the
// locks and the journal of its filesystem, so more workers than cores help.
const workers = 4

// Stats counts the work of Shift.
type Stats struct {
	// Inodes and Paths count files of all types, the root included. A file with hard links is one
	// inode with several paths.
	Inodes, Paths int64
	// Bytes is the size of the regular files. The filesystem copies as many if it copies a file
	// whose owner changes.
	Bytes int64
}

// Shift changes root and all files below it to the host ids that m maps to: owner and group, the
// users and groups in access control lists, and the root id of file capabilities. Everything else
// stays, except the time of the last status change: permissions with setuid and setgid bits
// (chown(2) clears these), content, other extended attributes, modification times.
//
// root is a directory opened for reading, on a single filesystem that does not change meanwhile. A
// mount that no other process can reach is best. Shift follows neither symlinks nor mounts below
// root, even if they appear meanwhile. On overlayfs, Shift copies up each path, including each hard
// link. With index=on, hard links stay one file; with metacopy=on, content is not copied.
//
// An id outside of m, an immutable file and a mount below root are FailedPrecondition errors: the
// request is valid, but not for this image. Once an id outside of m is found, no more files are
// changed. The error names the first such file in order and the number of others, so that it is the
// same each time. An invalid m is an InvalidArgument error. After an error, the tree has mixed
// owners and must be discarded. Shift is not idempotent.
//
// Shift ends soon after ctx, with its error, but finishes the file being copied. It needs Linux
// 5.8, /proc, and about a dozen descriptors. The changes are not on disk until the filesystem is
// synced (syncfs(2)).
func Shift(ctx context.Context, root *os.File, m Map) (Stats, error) {
	return shift(ctx, root, m, workers)
}

func shift(ctx context.Context, root *os.File, m Map, parallel int) (Stats, error) {
	if err := m.validate(); err != nil {
		return Stats{}, err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(parallel)
	w := &walk{root: int(root.Fd()), ids: m, group: group, links: links{files: map[inode]*link{}}}
	group.Go(func() error { return w.start(ctx) })
	err := group.Wait()
	runtime.KeepAlive(root)
	if err != nil {
		return w.stats(), fmt.Errorf("failed to change the owners of files: %w", err)
	}
	if err := w.unmapped.err(m); err != nil {
		return w.stats(), fmt.Errorf("failed to change the owners of files: %w", err)
	}
	return w.stats(), nil
}

type counters struct {
	inodes, paths, bytes atomic.Int64
}

func (c *counters) stats() Stats {
	return Stats{Inodes: c.inodes.Load(), Paths: c.paths.Load(), Bytes: c.bytes.Load()}
}
