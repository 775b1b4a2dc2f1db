package kubelet

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// A kubelet assumes that the machine is its own: it uses fixed paths in /var, looks for its user in
// /etc/passwd, changes kernel settings such as panic_on_oops, and more. This kubelet runs in a
// mount namespace with private files in their place.

// directories are the fixed paths of the kubelet: the socket for device plugins in
// /var/lib/kubelet, and links to logs in /var/log/containers.
var directories = []string{"/var/lib", "/var/log"}

// settings are the kernel settings that the kubelet changes
// (setupKernelTunables in pkg/kubelet/cm/container_manager_linux.go).
var settings = []string{
	"/proc/sys/vm/overcommit_memory", "/proc/sys/vm/panic_on_oom",
	"/proc/sys/kernel/panic", "/proc/sys/kernel/panic_on_oops",
	"/proc/sys/kernel/keys/root_maxkeys", "/proc/sys/kernel/keys/root_maxbytes",
}

// The subordinate ids of the user "kubelet", from which pods with hostUsers: false get theirs.
// Without that user, the kubelet uses all 32 bits.
const (
	FirstID = 65536
	IDs     = 256 * 65536
)

const passwd = "/etc/passwd"

// makeStandIns makes empty directories, copies of the kernel settings, users that include the
// kubelet's, and the program that reports its subordinate ids.
func (k *Kubelet) makeStandIns() error {
	if err := k.makeUser(); err != nil {
		return err
	}
	for _, dir := range directories {
		if err := os.MkdirAll(k.standIn(dir), 0o755); err != nil {
			return err
		}
	}
	for _, file := range settings {
		value, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(k.standIn(file)), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(k.standIn(file), value, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// makeUser makes the user of the kubelet. A program reports its ids instead of /etc/subuid, because
// some machines lack shadow's program that reads this file.
func (k *Kubelet) makeUser() error {
	users, err := os.ReadFile(passwd)
	if err != nil {
		return err
	}
	for path, content := range map[string]string{
		k.standIn(passwd):       string(users) + "kubelet:x:65533:65534::/:/bin/false\n",
		k.path("bin/getsubids"): fmt.Sprintf("#!/bin/sh\necho 0: kubelet %d %d\n", FirstID, IDs),
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// standIn returns the path of the replacement of path.
func (k *Kubelet) standIn(path string) string { return filepath.Join(k.path("machine"), path) }

// shareRoot makes the root directory of the kubelet a shared mount, so that volumes mounted in the
// kubelet's namespace appear in the others.
func (k *Kubelet) shareRoot() error {
	root := k.path("root")
	if err := unix.Mount(root, root, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("failed to bind %q: %w", root, err)
	}
	if err := unix.Mount("", root, "", unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("failed to share the mounts in %q: %w", root, err)
	}
	return nil
}

// unshareRoot fails while a volume is mounted.
func (k *Kubelet) unshareRoot() error {
	err := unix.Unmount(k.path("root"), unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: not a mount
		return fmt.Errorf("failed to unmount %q: %w", k.path("root"), err)
	}
	return nil
}

// enterView moves the calling thread to the mount namespace of the kubelet, permanently.
func (k *Kubelet) enterView() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("failed to make a mount namespace: %w", err)
	}
	// The clone has the volumes that an earlier kubelet has mounted.
	root, err := unix.OpenTree(unix.AT_FDCWD, k.path("root"), unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return fmt.Errorf("failed to clone the mount %q: %w", k.path("root"), err)
	}
	defer unix.Close(root)
	// Mounts of the machine propagate into this namespace, and none propagate back, except for
	// those in the clone, which remains a peer.
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("failed to stop the propagation of mounts to the machine: %w", err)
	}
	if err := unix.MoveMount(root, "", unix.AT_FDCWD, k.path("root"), unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("failed to mount %q: %w", k.path("root"), err)
	}
	for _, path := range slices.Concat(directories, settings, []string{passwd}) {
		if err := unix.Mount(k.standIn(path), path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("failed to replace %q with %q: %w", path, k.standIn(path), err)
		}
	}
	return nil
}
