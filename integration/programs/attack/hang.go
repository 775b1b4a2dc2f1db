package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// The constants of the FUSE protocol that are used here (linux/fuse.h).
const (
	fuseLookup  = 1
	fuseForget  = 2
	fuseGetattr = 3
	fuseOpen    = 14
	fuseRead    = 15
	fuseWrite   = 16
	fuseInit    = 26
)

// hangInKernel makes a process hang in the kernel with the lock of its memory map, so that reading
// its /proc/PID/cmdline and environ hangs, too. It serves a FUSE filesystem on the directory
// args[0], and starts a child that maps a file of it, writes to the map, and maps something else
// there. The kernel then writes the page back under the lock, and the WRITE never gets an answer.
// hangInKernel returns when the child has ended, which needs the end of this process.
func hangInKernel(args []string) error {
	dir := args[0]
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	device, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return failed("open", err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", device)
	if err := unix.Mount("attack", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		return failed("mount", err)
	}
	go serve(device)
	child := exec.Command("/proc/self/exe", "write-to-map", filepath.Join(dir, "file"))
	child.Stdout, child.Stderr = os.Stdout, os.Stderr
	return child.Run()
}

// writeToMap is the child of hangInKernel for the file args[0].
func writeToMap(args []string) error {
	fd, err := unix.Open(args[0], unix.O_RDWR, 0)
	if err != nil {
		return failed("open", err)
	}
	page := os.Getpagesize()
	memory, err := unix.MmapPtr(fd, 0, nil, uintptr(page), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return failed("mmap", err)
	}
	*(*byte)(memory) = 'x'
	fmt.Println("hangs", os.Getpid())
	_, err = unix.MmapPtr(-1, 0, memory, uintptr(page), unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED)
	return failed("mmap", err)
}

// serve answers all requests of a filesystem with one file, except for WRITE.
func serve(device int) {
	request := make([]byte, 1<<20+4096)
	for {
		n, err := unix.Read(device, request)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil || n < 40 {
			return
		}
		order := binary.NativeEndian
		opcode, unique, node := order.Uint32(request[4:]), order.Uint64(request[8:]), order.Uint64(request[16:])
		var reply []byte
		switch opcode {
		case fuseForget, fuseWrite:
			continue
		case fuseInit:
			reply = make([]byte, 64)
			order.PutUint32(reply, 7)
			order.PutUint32(reply[4:], 31)
			order.PutUint32(reply[20:], 1<<17) // max_write
		case fuseLookup:
			reply = make([]byte, 40, 128)
			order.PutUint64(reply, 2) // the file's node
			reply = append(reply, attributes(2)...)
		case fuseGetattr:
			reply = append(make([]byte, 16), attributes(node)...)
		case fuseOpen:
			reply = make([]byte, 16)
		case fuseRead:
			reply = make([]byte, 4096)
		}
		header := make([]byte, 16, 16+len(reply))
		order.PutUint32(header, uint32(16+len(reply)))
		if reply == nil {
			errno := -int32(unix.ENOSYS)
			order.PutUint32(header[4:], uint32(errno))
		}
		order.PutUint64(header[8:], unique)
		_, _ = unix.Write(device, append(header, reply...)) // fails for an interrupted request
	}
}

// attributes are struct fuse_attr of a node: 1 is the root, 2 the file.
func attributes(node uint64) []byte {
	attr := make([]byte, 88)
	order := binary.NativeEndian
	order.PutUint64(attr, node)
	order.PutUint64(attr[8:], 4096) // size
	mode := uint32(unix.S_IFREG | 0o666)
	if node == 1 {
		mode = unix.S_IFDIR | 0o777
	}
	order.PutUint32(attr[60:], mode)
	order.PutUint32(attr[64:], 1)    // nlink
	order.PutUint32(attr[80:], 4096) // blksize
	return attr
}
