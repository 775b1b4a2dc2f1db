package owners

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// forest makes random trees of all kinds of files.
type forest struct {
	T      testing.TB
	Random *rand.Rand
	root   string
	dirs   []string
	files  []string // all but directories
}

// Move says where the tree is now.
func (f *forest) Move(root string) {
	for _, paths := range [][]string{f.dirs, f.files} {
		for n, path := range paths {
			paths[n] = root + strings.TrimPrefix(path, f.root)
		}
	}
	f.root = root
}

// Grow makes a number of files, links included.
func (f *forest) Grow(files int) {
	if len(f.dirs) == 0 {
		f.dirs = append(f.dirs, f.root)
		f.decorate(f.root)
	}
	for range files {
		f.one()
	}
	// Directories are written to meanwhile, and time goes on.
	for _, path := range f.dirs {
		f.age(path)
	}
}

func (f *forest) one() {
	path := filepath.Join(f.dirs[f.Random.IntN(len(f.dirs))], f.name())
	switch n := f.Random.IntN(100); {
	case n < 15:
		f.must(os.Mkdir(path, 0o755))
		f.dirs = append(f.dirs, path)
	case n < 30 && len(f.files) > 0:
		f.must(os.Link(f.files[f.Random.IntN(len(f.files))], path))
		f.files = append(f.files, path)
		return // as the file is
	case n < 40:
		targets := []string{"/etc/passwd", "..", "nothing", "/", strings.Repeat("../", 30) + "etc/passwd", f.root}
		f.must(os.Symlink(targets[f.Random.IntN(len(targets))], path))
		f.files = append(f.files, path)
	case n < 45:
		kinds := []uint32{unix.S_IFIFO, unix.S_IFCHR, unix.S_IFBLK, unix.S_IFSOCK}
		kind := kinds[f.Random.IntN(len(kinds))]
		f.must(unix.Mknod(path, kind|0o600, int(unix.Mkdev(1, uint32(1+f.Random.IntN(9))))))
		f.files = append(f.files, path)
	default:
		f.must(os.WriteFile(path, f.content(), 0o644))
		if f.Random.IntN(12) == 0 { // a hole
			f.must(os.Truncate(path, int64(f.Random.IntN(4)+1)<<20))
		}
		f.files = append(f.files, path)
	}
	f.decorate(path)
}

// Prune removes, replaces and rewrites some of the files.
func (f *forest) Prune() {
	var left []string
	for _, path := range f.files {
		switch f.Random.IntN(6) {
		case 0:
			f.must(os.Remove(path))
			continue
		case 1:
			f.must(os.Remove(path))
			f.must(os.Mkdir(path, 0o755))
			f.dirs = append(f.dirs, path)
			continue
		case 2:
			f.decorate(path)
		}
		left = append(left, path)
	}
	f.files = left
	gone := f.dirs[1+f.Random.IntN(len(f.dirs)-1)]
	f.must(os.RemoveAll(gone))
	f.must(os.Mkdir(gone, 0o700))
	below := func(path string) bool { return strings.HasPrefix(path, gone+"/") }
	f.dirs, f.files = slices.DeleteFunc(f.dirs, below), slices.DeleteFunc(f.files, below)
}

func (f *forest) name() string {
	names := []string{"a b", "line\nbreak", "\xff\xfe", "ünï", strings.Repeat("long", 60), "-rf", "'\"", "."}
	return fmt.Sprintf("%s%d", names[f.Random.IntN(len(names))], f.Random.Uint32())
}

func (f *forest) content() []byte {
	sizes := []int{0, 1, 100, 4096, 70000}
	return bytes.Repeat([]byte{byte(f.Random.Uint32())}, sizes[f.Random.IntN(len(sizes))])
}

// decorate gives a file owners, permissions, attributes and a time.
func (f *forest) decorate(path string) {
	f.must(os.Lchown(path, f.id(), f.id()))
	info, err := os.Lstat(path)
	f.must(err)
	if kind := info.Mode().Type(); kind != os.ModeSymlink {
		modes := []uint32{0o644, 0o755, 0, 0o4755, 0o2755, 0o6711, 0o2644, 0o4000, 0o1777, 0o7777}
		f.must(unix.Chmod(path, modes[f.Random.IntN(len(modes))]))
		f.attributes(path, kind)
	}
	f.age(path)
}

func (f *forest) attributes(path string, kind os.FileMode) {
	set := func(name string, value []byte) { f.must(unix.Setxattr(path, name, value, 0)) }
	some := func() bool { return f.Random.IntN(4) == 0 }
	if some() {
		set(nameACL, f.acl())
	}
	if kind == os.ModeDir && some() {
		set(nameDefaultACL, f.acl())
	}
	if kind != 0 && kind != os.ModeDir {
		return
	}
	if some() {
		set("user.comment", []byte(f.name()))
	}
	if some() {
		set("trusted.comment", []byte("of the node"))
	}
	if kind == 0 && some() {
		set(nameCapability, words(capabilityV2|1, f.Random.Uint32(), f.Random.Uint32(), 0, 0))
	} else if kind == 0 && some() {
		set(nameCapability, words(capabilityV3, f.Random.Uint32(), f.Random.Uint32(), 0, 0, uint32(f.id())))
	}
}

// acl names a user and a group.
func (f *forest) acl() []byte {
	none := ^uint32(0)
	return words(aclVersion, entry(0x01, 7), none, entry(aclTagUser, uint32(f.Random.IntN(8))), uint32(f.id()), entry(0x04, 5), none,
		entry(aclTagGroup, 4), uint32(f.id()), entry(0x10, 7), none, entry(0x20, 0), none)
}

func (f *forest) id() int {
	ids := []int{0, 0, 0, 1, 33, 1000, 65534, 65535, f.Random.IntN(65536)}
	return ids[f.Random.IntN(len(ids))]
}

func (f *forest) age(path string) {
	at := unix.NsecToTimespec(time.Unix(int64(f.Random.IntN(1<<30)), int64(f.Random.IntN(1e9))).UnixNano())
	f.must(unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW))
}

func (f *forest) must(err error) {
	f.T.Helper()
	require.NoError(f.T, err)
}
