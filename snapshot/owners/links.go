package owners

import (
	"sync"

	"golang.org/x/sys/unix"
)

// inode identifies a file with one or more paths.
type inode struct {
	major, minor uint32
	number       uint64
}

// link is a file with several paths. Its lock is held while the file is examined or changed. The
// first visited path determines the original owners, for all paths.
type link struct {
	mu   sync.Mutex
	plan *plan

	left int // number of paths that were not visited yet
}

// links are the files with several paths, of which some were visited and some not.
type links struct {
	mu    sync.Mutex
	files map[inode]*link
}

// of returns the file's link, and whether this is its first visited path.
func (l *links) of(st *unix.Statx_t) (file *link, first bool) {
	key := inode{major: st.Dev_major, minor: st.Dev_minor, number: st.Ino}
	l.mu.Lock()
	defer l.mu.Unlock()
	file, known := l.files[key]
	if !known {
		file = &link{left: int(st.Nlink)}
		l.files[key] = file
	}
	file.left--
	if file.left == 0 {
		delete(l.files, key)
	}
	return file, !known
}
