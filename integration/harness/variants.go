package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
)

// Variants are test daemons built from other sources than the working tree. Each has its own
// podfsm-init and podfsm beside it, and a folder in the build cache. Its release is the commit, or
// the name of the change.
const (
	commitPrefix  = "commit/"
	changedPrefix = "changed/"
)

// At returns the test daemon of a commit of this repository, which is named by its full hash.
func At(commit string) Daemon { return Daemon(commitPrefix + commit) }

// Changed returns the test daemon of the working tree with replaced or added files: files maps
// paths below the repository to contents. A name must always have the same files.
func Changed(name string, files map[string]string) Daemon {
	changed.Lock()
	defer changed.Unlock()
	if changed.files == nil {
		changed.files = map[Daemon]map[string]string{}
	}
	d := Daemon(changedPrefix + name)
	changed.files[d] = files
	return d
}

// changed has the files of the daemons that Changed has returned.
var changed struct {
	sync.Mutex
	files map[Daemon]map[string]string
}

func (d Daemon) isVariant() bool {
	return strings.HasPrefix(string(d), commitPrefix) || strings.HasPrefix(string(d), changedPrefix)
}

// variantDir returns the folder in which a variant is built, below the repository.
func (d Daemon) variantDir() string { return filepath.Join(".build/variants", string(d)) }

// variant builds a variant.
func (b *builder) variant(ctx context.Context, d Daemon) error {
	if b.prebuilt {
		return fmt.Errorf("daemon %q can be built only from sources: unset %s: %w", d, prebuiltEnv, errdefs.ErrFailedPrecondition)
	}
	i := install{module: ".", bin: filepath.Join(d.variantDir(), "bin"), produces: "testdaemon of " + string(d), release: filepath.Base(string(d))}
	i.args = []string{"./integration/testdaemon", "./cmd/podfsm", "./cmd/podfsm-init"}
	if commit, ok := strings.CutPrefix(string(d), commitPrefix); ok {
		i.module = filepath.Join(d.variantDir(), "src")
		if err := b.once("sources of "+commit, func() error { return b.checkout(ctx, commit, i.module) }); err != nil {
			return err
		}
		return b.install(ctx, i)
	}
	overlay, err := b.overlay(d)
	if err != nil {
		return err
	}
	i.args = append([]string{"-overlay=" + overlay}, i.args...)
	return b.install(ctx, i)
}

// checkout puts the sources of a commit into a folder below the repository,
// unless they are there.
func (b *builder) checkout(ctx context.Context, commit, to string) error {
	dir := filepath.Join(b.repo, to)
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	git := func(args ...string) *exec.Cmd {
		return exec.CommandContext(ctx, "git", append([]string{"-C", b.repo}, args...)...)
	}
	if err := run(git("cat-file", "-e", commit+"^{commit}")); err != nil {
		return fmt.Errorf("failed to find commit %q: %w; the test needs the repository's history: run git fetch --unshallow", commit, err)
	}
	next := dir + ".new"
	if err := errors.Join(os.RemoveAll(next), os.MkdirAll(next, 0o755)); err != nil {
		return err
	}
	var sources bytes.Buffer
	archive := git("archive", "--format=tar", commit, "--", ".", ":(exclude)*_test.go") // tests that walk the repository would find these
	archive.Stdout = &sources
	if err := archive.Run(); err != nil {
		return fmt.Errorf("failed to read the sources of commit %q: %w", commit, err)
	}
	extract := exec.CommandContext(ctx, "tar", "-x", "-C", next)
	extract.Stdin = &sources
	if err := run(extract); err != nil {
		return err
	}
	return os.Rename(next, dir) // the rename is atomic: a killed build leaves no partial sources
}

// overlay writes the files of a variant and a list of them for go build -overlay, whose path it
// returns.
func (b *builder) overlay(d Daemon) (list string, err error) {
	changed.Lock()
	files := changed.files[d]
	changed.Unlock()
	if len(files) == 0 {
		return "", fmt.Errorf("daemon %q has no changed files: %w", d, errdefs.ErrInvalidArgument)
	}
	dir := filepath.Join(b.repo, d.variantDir())
	replace := map[string]string{}
	for path, content := range files {
		file := filepath.Join(dir, "src", path)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return "", err
		}
		if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
			return "", err
		}
		replace[filepath.Join(b.repo, path)] = file
	}
	data, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	list = filepath.Join(dir, "overlay.json")
	return list, os.WriteFile(list, data, 0o644)
}
