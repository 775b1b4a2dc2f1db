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

// taskDir is where containerd's runtime has the bundles with the pods' root filesystems, below its state directory.
const taskDir = "io.containerd.runtime.v2.task"

// directories looks whether the ids of a pod may pass to its root filesystem, which is mounted in a bundle: the runtime enters it with
// them. What else containerd has below its directories is mounted by root, whatever their modes.
func directories(_ context.Context, n Node) []Finding {
	closed, err := closedAbove(filepath.Join(n.State, taskDir, "k8s.io"))
	if err != nil {
		return []Finding{unknown(err.Error(), "look at the directories above "+n.State)}
	}
	if len(closed) == 0 {
		return []Finding{ok("all may pass to the root filesystems below " + filepath.Join(n.State, taskDir))}
	}
	var texts []string
	for _, d := range closed {
		texts = append(texts, fmt.Sprintf("%s has mode %04o", d.path, d.mode))
	}
	return []Finding{fail(UserNSPods, strings.Join(texts, ", ")+": the ids of a pod may not pass to its root filesystem", "chmod o+x "+paths(closed))}
}

// closedDir is a directory that not all may pass.
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

// closedAbove are the directories from the root to path, path included, that not all may pass, outermost first. Those that aren't there
// yet are made with the right mode.
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
