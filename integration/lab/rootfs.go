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

// platform is a release of Debian on an architecture.
type platform struct{ release, arch string }

var (
	debian13    = platform{"trixie", "amd64"}
	debian13arm = platform{"trixie", "arm64"}
	debian12    = platform{"bookworm", "amd64"}
)

func (p platform) String() string { return p.release + "-" + p.arch }

// packages are the packages of a node beside Debian's minimal system.
func (p platform) packages() []string {
	return []string{
		"systemd", "systemd-sysv", "dbus", "udev", "kmod", "linux-image-cloud-" + p.arch, // boots
		"apparmor", "iptables", "nftables", "iproute2", "libseccomp2", "procps", "e2fsprogs", // a node for Kubernetes
		"busybox-static", "crun", "strace", "util-linux", "attr", "libseccomp-dev", // for the integration tests and other builds
	}
}

// rootfs.sh makes a root filesystem. It runs in a mount namespace of its own: what it mounts ends with it.
//
//go:embed rootfs.sh
var rootfsScript string

// base is a read-only root filesystem with the kernel that boots it. sysroot has what cross builds
// need.
type base struct {
	platform
	image, kernel, initrd, sysroot string
}

// makeBase makes the root filesystem of a platform, or returns the cached one of an earlier run
// with the same input.
func makeBase(ctx context.Context, dir string, p platform) (base, error) {
	arguments := append([]string{p.release, p.arch}, p.packages()...)
	id := fmt.Sprintf("%x", sha256.Sum256([]byte(rootfsScript+strings.Join(arguments, " "))))[:12]
	name := fmt.Sprintf("rootfs-%s-%s", p, id)
	made := base{p, filepath.Join(dir, name, "root.img"), filepath.Join(dir, name, "vmlinuz"), filepath.Join(dir, name, "initrd.img"), filepath.Join(dir, name, "sysroot")}
	if _, err := os.Stat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
		return made, err
	}
	progress("making the root filesystem of Debian %s, %s (a minute or two; minutes for another architecture than this one)", p.release, p.arch)
	work, err := os.MkdirTemp(dir, "rootfs-*")
	if err != nil {
		return base{}, err
	}
	defer os.RemoveAll(work)
	command := append([]string{"--mount", "--propagation", "private", "bash", "-euo", "pipefail", "-c", rootfsScript, "rootfs", work}, arguments...)
	if err := run(ctx, filepath.Join(dir, "rootfs.log"), "unshare", command...); err != nil {
		return base{}, err
	}
	return made, os.Rename(work, filepath.Join(dir, name))
}
