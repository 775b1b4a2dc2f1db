package owners

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// walk is one pass over a tree. A directory is changed before what is in it, and
// all its entries are changed one after the other: overlayfs puts a directory's
// modification time back after each entry that it copies up, and would take the
// time of another copy for the right one.
type walk struct {
	root  int
	ids   Map
	group *errgroup.Group // works on directories
	links links
	counters
	unmapped unmapped
}

// start changes the root, and all below.
func (w *walk) start(ctx context.Context) error {
	v := &visitor{walk: w, buffer: make([]byte, maxAttribute)}
	if _, err := v.visit(w.root, ".", "."); err != nil {
		return err
	}
	return v.descend(ctx, ".")
}

// visitor is a goroutine's part of a walk.
type visitor struct {
	*walk
	buffer []byte // for the names and values of extended attributes
}

// descend changes all below a directory, which it shares with other visitors as
// soon as the group takes one more. Directories are kept by their paths, so that
// a visitor has two open at most, however deep and wide the tree is.
func (v *visitor) descend(ctx context.Context, path string) error {
	todo := []string{path}
	for len(todo) > 0 {
		for len(todo) > 1 && v.share(ctx, todo[0]) {
			todo = todo[1:]
		}
		last := len(todo) - 1
		next := todo[last]
		below, err := v.directory(ctx, next)
		if err != nil {
			return err
		}
		todo = append(todo[:last], below...)
	}
	return nil
}

// share gives a directory to another visitor, if there may be one more.
func (v *visitor) share(ctx context.Context, path string) bool {
	return v.group.TryGo(func() error {
		other := &visitor{walk: v.walk, buffer: make([]byte, maxAttribute)}
		return other.descend(ctx, path)
	})
}

// directory changes the entries of a directory and returns the paths of those
// that are directories.
func (v *visitor) directory(ctx context.Context, path string) (below []string, err error) {
	dir, err := openDirectory(v.root, path)
	if err != nil {
		return nil, fmt.Errorf("failed to open directory %q: %w", path, err)
	}
	defer dir.Close()
	for {
		names, err := dir.Readdirnames(batch)
		if errors.Is(err, io.EOF) {
			return below, nil
		}
		if err != nil {
			return nil, fmt.Errorf("failed to read directory %q: %w", path, err)
		}
		for _, name := range names {
			if err := context.Cause(ctx); err != nil {
				return nil, err
			}
			entry := strings.TrimPrefix(path+"/"+name, "./")
			isDirectory, err := v.visit(int(dir.Fd()), name, entry)
			if err != nil {
				return nil, err
			}
			if isDirectory {
				below = append(below, entry)
			}
		}
	}
}

// batch is how many names of a directory are read at a time.
const batch = 1024

// openDirectory opens a directory below root, by steps where the path is longer
// than the kernel takes at once.
func openDirectory(root int, path string) (*os.File, error) {
	at := root
	for {
		step, rest := path, ""
		if len(path) > maxPath {
			cut := strings.LastIndexByte(path[:maxPath], '/')
			step, rest = path[:cut], path[cut+1:]
		}
		fd, err := unix.Openat2(at, step, &unix.OpenHow{
			Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC | unix.O_NOATIME,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
		})
		if at != root {
			unix.Close(at)
		}
		if err != nil {
			return nil, err
		}
		if rest == "" {
			return os.NewFile(uintptr(fd), step), nil
		}
		at, path = fd, rest
	}
}

// maxPath is less than the kernel's PATH_MAX, and more than a name can be long.
const maxPath = unix.PathMax - 1

// visit changes one file, which is called name in the directory dir, and says
// whether it is a directory. path is for messages.
func (v *visitor) visit(dir int, name, path string) (isDirectory bool, err error) {
	var st unix.Statx_t
	if err := stat(dir, name, &st); err != nil {
		return false, fmt.Errorf("failed to look at file %q: %w", path, err)
	}
	if st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 && name != "." {
		return false, fmt.Errorf("file %q is a mount point: unmount it: %w", path, errdefs.ErrFailedPrecondition)
	}
	isDirectory = st.Mode&unix.S_IFMT == unix.S_IFDIR
	change := v.changeFile
	if st.Nlink > 1 && !isDirectory {
		change = v.changeLink
	}
	err = change(dir, name, &st)
	if id := (*unmappedError)(nil); errors.As(err, &id) {
		v.unmapped.add(path, id)
		return isDirectory, nil
	}
	if errors.Is(err, unix.EPERM) && st.Attributes&(unix.STATX_ATTR_IMMUTABLE|unix.STATX_ATTR_APPEND) != 0 {
		return false, fmt.Errorf("file %q can't be changed, it is immutable or append-only (chattr -i -a): %w: %w", path, err, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return false, fmt.Errorf("failed to change file %q: %w", path, err)
	}
	v.paths.Add(1)
	return isDirectory, nil
}

// changeFile changes a file with one path.
func (v *visitor) changeFile(dir int, name string, st *unix.Statx_t) error {
	p, err := v.plan(dir, name, st)
	if err != nil {
		return err
	}
	v.count(st)
	return v.apply(dir, name, p)
}

// changeLink changes one path of a file that has several.
func (v *visitor) changeLink(dir int, name string, st *unix.Statx_t) error {
	file, first := v.links.of(st)
	file.mu.Lock()
	defer file.mu.Unlock()
	if first {
		v.count(st)
	}
	if file.plan == nil {
		// Looked at again, now that no other path changes it.
		if err := stat(dir, name, st); err != nil {
			return err
		}
		p, err := v.plan(dir, name, st)
		if err != nil {
			return err
		}
		file.plan = &p
	}
	return v.apply(dir, name, *file.plan)
}

func (v *visitor) count(st *unix.Statx_t) {
	v.inodes.Add(1)
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		v.bytes.Add(int64(st.Size))
	}
}

// stat looks at a file. overlayfs with index=on may say ESTALE of one path of a file
// while another visitor has another path of it copied up: its index has the copy
// before its inode does (ovl_verify_inode in fs/overlayfs/inode.c). That passes.
func stat(dir int, name string, st *unix.Statx_t) (err error) {
	for range staleTries {
		err = unix.Statx(dir, name, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, st)
		if err != unix.ESTALE {
			break
		}
		time.Sleep(staleWait)
	}
	return err
}

const (
	staleTries = 1000
	staleWait  = time.Millisecond
)
