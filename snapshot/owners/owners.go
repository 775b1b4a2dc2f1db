// Package owners gives the files of an image the owners that a user namespace maps
// them to, where no mount can do it.
package owners

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

// workers is how many directories are worked on at a time. Of 1, 2, 4 and 8 on two
// busy cores (BenchmarkShift) 2 and 4 came out alike, 1 slower, and 8 no better: a
// copy waits for the locks and the journal of its filesystem, too, so that there may
// be more than cores.
const workers = 4

// Stats counts what Shift has done.
type Stats struct {
	// Inodes and Paths are files of all kinds, the root included: a hard linked
	// file is one inode with several paths.
	Inodes, Paths int64
	// Bytes is the size of the regular files: what was copied, where the
	// filesystem copies a file whose owner changes.
	Bytes int64
}

// Shift gives every file below root, and root itself, the host ids that m says:
// its owner and group, the users and groups of its access control lists, and the
// root id of its file capabilities. All else stays, but for the time of the last
// status change: permissions with setuid and setgid bits (chown(2) clears these),
// content, further extended attributes, modification times.
//
// root is a directory opened for reading, best that of a mount which nobody else
// can reach: one filesystem whose files stand still. Symbolic links and mounts
// below it are never followed, even when they appear meanwhile. On overlayfs
// every path is copied up, also each path of a hard linked file. With index=on the
// paths stay one file, with metacopy=on the content isn't copied.
//
// An id that m doesn't map, an immutable file and a mount below root are
// FailedPrecondition errors: the request is sound, but not for this image. An id
// that isn't mapped changes no more files once seen, and the error names the first
// such file in order and how many there are, so that it is the same each time. A
// map that is none is an InvalidArgument error. After an error the tree is mixed,
// and of no use; to shift a tree twice is to shift it too far.
//
// It ends soon after ctx has, with its error, though not before the file that is
// being copied. It needs Linux 5.8, /proc, and as few as a dozen descriptors. What
// it wrote isn't on disk until the filesystem is synced (syncfs(2)).
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
