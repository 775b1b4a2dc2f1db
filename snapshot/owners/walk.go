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

// walk is one pass over a tree. A directory is changed before its entries, and its entries are
// changed one after the other. overlayfs saves and restores the modification time of a directory
// around each copy-up of an entry; concurrent copy-ups would restore a wrong one.
type walk struct {
	root  int
	ids   Map
	group *errgroup.Group // of visitors
	links links
	counters
	unmapped unmapped
}

// start changes the root and everything below it.
func (w *walk) start(ctx context.Context) error {
	v := &visitor{walk: w, buffer: make([]byte, maxAttribute)}
	if _, err := v.visit(w.root, ".", "."); err != nil {
		return err
	}
	return v.descend(ctx, ".")
}

// visitor is the state of one goroutine of a walk.
type visitor struct {
	*walk
	buffer []byte // for the names and values of extended attributes
}

// descend changes everything below a directory. It shares directories with other visitors when the
// group has room for one more. Pending directories are kept as paths, so that a visitor has at most
// two open, however deep and wide the tree is.
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

// share passes a directory to a new visitor, if the group has room.
func (v *visitor) share(ctx context.Context, path string) bool {
	return v.group.TryGo(func() error {
		other := &visitor{walk: v.walk, buffer: make([]byte, maxAttribute)}
		return other.descend(ctx, path)
	})
}

// directory changes the entries of a directory, and returns the paths of its subdirectories.
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

// batch is the number of names that are read from a directory at a time.
const batch = 1024

// openDirectory opens a directory below root, in several steps if the path is longer than the
// kernel accepts.
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

// maxPath is below the kernel's PATH_MAX, and above the maximum length of a name.
const maxPath = unix.PathMax - 1

// visit changes the file called name in the directory dir, and reports whether it is a directory.
// path is for messages.
func (v *visitor) visit(dir int, name, path string) (isDirectory bool, err error) {
	var st unix.Statx_t
	if err := stat(dir, name, &st); err != nil {
		return false, fmt.Errorf("failed to look at file %q: %w", path, err)
	}
	if st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 && name != "." {
		return false, fmt.Errorf("file %q is a mount point; unmount it: %w", path, errdefs.ErrFailedPrecondition)
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
		return false, fmt.Errorf("file %q is immutable or append-only; change that with chattr -i -a: %w: %w", path, err, errdefs.ErrFailedPrecondition)
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

// changeLink changes one path of a file with hard links.
func (v *visitor) changeLink(dir int, name string, st *unix.Statx_t) error {
	file, first := v.links.of(st)
	file.mu.Lock()
	defer file.mu.Unlock()
	if first {
		v.count(st)
	}
	if file.plan == nil {
		// Stat again, now that no other path of the file is being changed.
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

// stat stats a file. On overlayfs with index=on, one path of a file may be ESTALE while another
// visitor copies up another path: the index has the copy before its inode (ovl_verify_inode in
// fs/overlayfs/inode.c). A retry succeeds.
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
