package owners

import (
	"bytes"
	"crypto/sha256"
	"encoding/gob"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// viewer tells the test binary to show the tree in its third descriptor, and nothing else.
const viewer = "PODFSM_TEST_VIEWER"

func TestMain(m *testing.M) {
	if os.Getenv(viewer) == "" {
		os.Exit(m.Run())
	}
	tree, err := look("/proc/self/fd/3/.")
	if err == nil {
		err = gob.NewEncoder(os.Stdout).Encode(tree)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// file is what a process sees of a file.
type file struct {
	Mode       string
	UID, GID   uint32
	Links      uint64
	Same       string // the first path of the same inode
	Size       int64
	Blocks     int64
	Device     uint64
	Target     string
	Content    string
	Modified   string
	Attributes map[string]string
}

// lookInside returns what the root of a user namespace with this map sees of the tree in a directory, by path.
func lookInside(t testing.TB, dir string, m Map) (tree map[string]file) {
	t.Helper()
	root, err := os.Open(dir)
	require.NoError(t, err)
	defer root.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), viewer+"=1")
	cmd.ExtraFiles = []*os.File{root}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:                 syscall.CLONE_NEWUSER,
		UidMappings:                sysProcIDMap(m.UIDs),
		GidMappings:                sysProcIDMap(m.GIDs),
		GidMappingsEnableSetgroups: true,
		Credential:                 &syscall.Credential{},
	}
	var problems bytes.Buffer
	cmd.Stderr = &problems
	out, err := cmd.Output()
	require.NoError(t, err, problems.String())
	require.NoError(t, gob.NewDecoder(bytes.NewReader(out)).Decode(&tree))
	return tree
}

func sysProcIDMap(extents []specs.LinuxIDMapping) (ids []syscall.SysProcIDMap) {
	for _, e := range extents {
		ids = append(ids, syscall.SysProcIDMap{ContainerID: int(e.ContainerID), HostID: int(e.HostID), Size: int(e.Size)})
	}
	return ids
}

// look returns what this process sees of the tree in a directory.
func look(dir string) (map[string]file, error) {
	tree := map[string]file{}
	same := map[inode]string{}
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		f, id, err := lookAt(path)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if _, known := same[id]; !known {
			same[id] = name
		}
		f.Same = same[id]
		tree[name] = f
		return nil
	})
	return tree, err
}

func lookAt(path string) (f file, id inode, err error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return f, id, err
	}
	f = file{Mode: fmt.Sprintf("%o", st.Mode), UID: st.Uid, GID: st.Gid, Device: st.Rdev, Modified: fmt.Sprint(st.Mtim)}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR: // overlayfs gives merged directories one link, and sizes of its own
	case unix.S_IFLNK:
		f.Links = st.Nlink
		f.Target, err = os.Readlink(path)
	case unix.S_IFREG:
		f.Links, f.Size, f.Blocks = st.Nlink, st.Size, st.Blocks
		var content []byte
		content, err = os.ReadFile(path)
		f.Content = fmt.Sprintf("%x", sha256.Sum256(content))
	default:
		f.Links = st.Nlink
	}
	if err == nil {
		f.Attributes, err = attributes(path)
	}
	return f, inode{number: st.Ino, minor: uint32(st.Dev)}, err
}

// attributes are the extended attributes that a process without privileges on the node can see.
func attributes(path string) (map[string]string, error) {
	names := make([]byte, maxAttribute)
	size, err := unix.Llistxattr(path, names)
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	for _, name := range strings.Split(string(names[:size]), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.") {
			continue
		}
		value := make([]byte, maxAttribute)
		size, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		found[name] = hex.EncodeToString(value[:size])
	}
	return found, nil
}
