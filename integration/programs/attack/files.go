package main

import (
	"os"

	"golang.org/x/sys/unix"
)

// openFile opens args[0] for reading and writing.
func openFile(args []string) error {
	f, err := os.OpenFile(args[0], os.O_RDWR, 0)
	if err != nil {
		return failed("open", err)
	}
	return f.Close()
}

// chownFile gives the file args[0] to the container's root.
func chownFile(args []string) error { return failed("chown", unix.Chown(args[0], 0, 0)) }

// openByHandle opens the root of the filesystem of the volume args[0] by its handle, without a path.
// On ext4 the inode of the root is 2. This is the "shocker" of 2014.
func openByHandle(args []string) error {
	volume, err := os.Open(args[0])
	if err != nil {
		return failed("open", err)
	}
	defer volume.Close()
	handle := unix.NewFileHandle(1, []byte{2, 0, 0, 0, 0, 0, 0, 0}) // FILEID_INO32_GEN: inode, generation
	root, err := unix.OpenByHandleAt(int(volume.Fd()), handle, unix.O_RDONLY)
	if err != nil {
		return failed("open_by_handle_at", err)
	}
	return unix.Close(root)
}

// makeImmutable makes the container's own file args[0] immutable (CAP_LINUX_IMMUTABLE).
func makeImmutable(args []string) error {
	f, err := os.Open(args[0])
	if err != nil {
		return failed("open", err)
	}
	defer f.Close()
	const immutable = 0x10 // FS_IMMUTABLE_FL
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		return failed("read", err)
	}
	return failed("ioctl", unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags|immutable))
}
