package main

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// packages are what a node has besides Debian's minimal system.
var packages = []string{
	"systemd", "systemd-sysv", "dbus", "udev", "kmod", "linux-image-cloud-amd64", // boots
	"apparmor", "iptables", "iproute2", "libseccomp2", "procps", "e2fsprogs", // a node for Kubernetes
	"busybox-static", "crun", "strace", "util-linux", "attr", // for the integration tests
}

const release = "trixie"

// rootfs.sh makes a root filesystem. It runs in a mount namespace of its own: what it mounts ends with it.
//
//go:embed rootfs.sh
var rootfsScript string

// base is a root filesystem that no machine writes to, with the kernel that boots it.
type base struct{ image, kernel, initrd string }

// makeBase makes the root filesystem, or finds the one that an earlier run has made the same way.
func makeBase(ctx context.Context, dir string) (base, error) {
	arguments := append([]string{release}, packages...)
	id := fmt.Sprintf("%x", sha256.Sum256([]byte(rootfsScript+strings.Join(arguments, " "))))[:12]
	dir = filepath.Join(dir, "rootfs-"+release+"-"+id)
	made := base{filepath.Join(dir, "root.img"), filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "initrd.img")}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return made, err
	}
	progress("making the root filesystem of Debian %s (a minute or two)", release)
	work, err := os.MkdirTemp(filepath.Dir(dir), "rootfs-*")
	if err != nil {
		return base{}, err
	}
	defer os.RemoveAll(work)
	command := append([]string{"--mount", "--propagation", "private", "bash", "-euo", "pipefail", "-c", rootfsScript, "rootfs", work}, arguments...)
	if err := run(ctx, filepath.Join(filepath.Dir(dir), "rootfs.log"), "unshare", command...); err != nil {
		return base{}, err
	}
	return made, os.Rename(work, dir)
}
