package owners

import (
	"sync"

	"golang.org/x/sys/unix"
)

// inode names a file however many paths it has.
type inode struct {
	major, minor uint32
	number       uint64
}

// link is a file with several paths. Its lock is held while it is looked at and
// while it is changed: the first path to come tells its owners from before any
// change, and they count for all paths.
type link struct {
	mu   sync.Mutex
	plan *plan

	left int // the paths that haven't come yet
}

// links are the files with several paths that have come by one and are awaited
// by others.
type links struct {
	mu    sync.Mutex
	files map[inode]*link
}

// of is the file's link, and whether it came for the first time.
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
