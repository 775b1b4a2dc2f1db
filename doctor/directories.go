package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// taskDir is the directory of the bundles with the pods' root filesystems, below containerd's state
// directory.
const taskDir = "io.containerd.runtime.v2.task"

// directories checks that all users can traverse to the pods' root filesystems, which are mounted
// in bundles: the runtime enters them with the pod's ids. Everything else is mounted by root, so
// its modes don't matter.
func directories(_ context.Context, n Node) []Finding {
	closed, err := closedAbove(filepath.Join(n.State, taskDir, "k8s.io"))
	if err != nil {
		return []Finding{unknown(err.Error(), "check the directories above "+n.State)}
	}
	if len(closed) == 0 {
		return []Finding{ok("all users can traverse to the root filesystems below " + filepath.Join(n.State, taskDir))}
	}
	var texts []string
	for _, d := range closed {
		texts = append(texts, fmt.Sprintf("%s has mode %04o", d.path, d.mode))
	}
	return []Finding{fail(UserNSPods, strings.Join(texts, ", ")+": a pod's ids can't traverse to its root filesystem", "chmod o+x "+paths(closed))}
}

// closedDir is a directory that not all users can traverse.
type closedDir struct {
	path string
	mode fs.FileMode
}

func paths(dirs []closedDir) string {
	var all []string
	for _, d := range dirs {
		all = append(all, d.path)
	}
	return strings.Join(all, " ")
}

// closedAbove returns the directories from the root to path, including path, that not all users can
// traverse, outermost first. Missing directories don't count: they are made with the right mode.
func closedAbove(path string) (closed []closedDir, err error) {
	for dir := path; ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if err == nil && info.Mode().Perm()&0o001 == 0 {
			closed = append([]closedDir{{dir, info.Mode().Perm()}}, closed...)
		}
		if dir == filepath.Dir(dir) {
			return closed, nil
		}
	}
}
