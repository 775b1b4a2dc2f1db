package main

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// keep keeps a file as it is. A second link keeps also its owner and labels, and
// takes no space, which a rollback on a full disk may not have.
func keep(from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	err := os.Link(from, to)
	if errors.Is(err, unix.EXDEV) {
		return copyFile(from, to)
	}
	return err
}

// bringBack brings a file back that keep has kept.
func bringBack(kept, path string) error {
	old, err := os.Lstat(kept)
	if err != nil {
		return err
	}
	if now, err := os.Lstat(path); err == nil && os.SameFile(old, now) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	err = os.Link(kept, temporary(path))
	if errors.Is(err, unix.EXDEV) {
		return copyFile(kept, path)
	}
	if err != nil {
		return err
	}
	return rename(temporary(path), path)
}

// copyFile copies a file with its mode, or a symlink, as a whole or not at all. It writes
// nothing if the copy is there already.
func copyFile(from, to string) error {
	info, err := os.Lstat(from)
	if err != nil {
		return err
	}
	if info.Mode().Type() == fs.ModeSymlink {
		return copyLink(from, to)
	}
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if there, err := os.Lstat(to); err == nil && there.Mode() == info.Mode() {
		if has, err := os.ReadFile(to); err == nil && bytes.Equal(has, content) {
			return nil
		}
	}
	return writeFile(to, content, info.Mode().Perm())
}

func copyLink(from, to string) error {
	target, err := os.Readlink(from)
	if err != nil {
		return err
	}
	if err := removeFile(temporary(to)); err != nil {
		return err
	}
	if err := os.Symlink(target, temporary(to)); err != nil {
		return err
	}
	return rename(temporary(to), to)
}

// writeFile makes a file, and the directories above it. A power cut leaves the
// old file or the new one.
func writeFile(path string, content []byte, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	// What a SIGKILL has left may be a link to the file that is kept.
	if err := removeFile(temporary(path)); err != nil {
		return err
	}
	file, err := os.OpenFile(temporary(path), os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = file.Write(content)
	err = errors.Join(err, file.Chmod(mode), file.Sync(), file.Close())
	if err == nil {
		err = rename(file.Name(), path)
	}
	if err != nil {
		return errors.Join(err, removeFile(file.Name()))
	}
	return nil
}

// rename survives a power cut.
func rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return syncDir(filepath.Dir(to))
}

// rewriteFile gives a file new content. It keeps the mode and the owner: the file
// may have secrets.
func rewriteFile(path string, content []byte) error {
	var owner unix.Stat_t
	if err := unix.Stat(path, &owner); errors.Is(err, fs.ErrNotExist) {
		return writeFile(path, content, 0o644)
	} else if err != nil {
		return err
	}
	if err := writeFile(path, content, fs.FileMode(owner.Mode&0o777)); err != nil {
		return err
	}
	return os.Chown(path, int(owner.Uid), int(owner.Gid))
}

// temporary is a file's name until it is complete. A rollback finds it by its name.
func temporary(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".podfsm-deploy")
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// syncDirs syncs a directory and those below it.
func syncDirs(path string) error {
	return filepath.WalkDir(path, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.IsDir() {
			return err
		}
		return syncDir(path)
	})
}

// remove removes a file, and the directories above it that were made for podfsm
// and are empty now. It survives a power cut.
func remove(path string) error {
	if err := removeFile(path); err != nil {
		return err
	}
	dir := filepath.Dir(path)
	for strings.Contains(dir, "/podfsm") || filepath.Base(dir) == "containerd.service.d" {
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) { // it has more
			break
		}
		dir = filepath.Dir(dir)
	}
	if err := syncDir(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// removeFile removes a file that need not be there.
func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// resolve returns the file behind symlinks, or the path itself if there is nothing.
func resolve(path string) (string, error) {
	file, err := filepath.EvalSymlinks(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return file, err
	}
	if _, there := os.Lstat(path); there == nil {
		return "", err // a symlink that leads nowhere
	}
	return path, nil
}
