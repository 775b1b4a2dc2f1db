package userns

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unsafe"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Mounts returns the host ids that idmapped mounts of this mount namespace map to. Kernels before
// 6.15 don't report these; there the idmapped mounts count as one use of all ids that pods may
// have.
func Mounts(ctx context.Context) ([]Use, error) {
	uses, err := listedMounts(ctx)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, errNotReported) {
		return flaggedMounts()
	}
	return uses, err
}

// errNotReported means that the kernel doesn't report the id maps of mounts.
var errNotReported = errors.New("statmount(2) does not report id maps")

// flaggedMounts returns one use of all ids by all idmapped mounts in mountinfo, because a search
// takes 8 MiB for each use of all ids. It returns none without such mounts.
func flaggedMounts() ([]Use, error) {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !slices.Contains(strings.Split(m.Options, ","), "idmapped"), false
	})
	if err != nil {
		return nil, fmt.Errorf("failed to list mounts: %w", err)
	}
	if len(mounts) == 0 {
		return nil, nil
	}
	by := "mount " + mounts[0].Mountpoint + ", whose id map this kernel does not report"
	if more := len(mounts) - 1; more > 0 {
		by = fmt.Sprintf("mount %s and %d more, whose id maps this kernel does not report", mounts[0].Mountpoint, more)
	}
	all := []Mapping{{HostID: MinHostID, Length: maxHostID - MinHostID + 1}}
	return []Use{{UIDs: all, GIDs: all, By: by}}, nil
}

// Constants and structures of listmount(2) and statmount(2), as in linux/mount.h.
const (
	lsmtRoot        = ^uint64(0)
	mountAttrIDMap  = 0x00100000
	statMountBasic  = 0x2
	statMountPoint  = 0x10
	statMountUIDMap = 0x2000
	statMountGIDMap = 0x4000
)

// mountRequest is the first version of struct mnt_id_req.
type mountRequest struct {
	size, spare uint32
	id, param   uint64
}

const mountRequestSize = uint32(unsafe.Sizeof(mountRequest{}))

// listedMounts returns the idmapped mounts by listmount(2) and statmount(2).
func listedMounts(ctx context.Context) (uses []Use, err error) {
	var last uint64
	ids, reply := make([]uint64, 512), make([]byte, 1<<16) // the maximum of 340 extents takes 11 KiB
	for {
		request := mountRequest{size: mountRequestSize, id: lsmtRoot, param: last}
		n, _, errno := unix.Syscall6(unix.SYS_LISTMOUNT, uintptr(unsafe.Pointer(&request)), uintptr(unsafe.Pointer(&ids[0])), uintptr(len(ids)), 0, 0, 0)
		if errno != 0 {
			return nil, fmt.Errorf("failed to list mounts: %w", errno)
		}
		for _, id := range ids[:n] {
			if err := ctx.Err(); err != nil {
				return nil, fmt.Errorf("failed to look at mounts: %w", err)
			}
			use, idmapped, err := statMount(id, reply)
			if err != nil {
				return nil, err
			}
			if idmapped {
				uses = append(uses, use)
			}
		}
		if int(n) < len(ids) {
			return uses, nil
		}
		last = ids[n-1]
	}
}

// statMount returns the ids that one mount maps to, false if it is not idmapped or is gone.
func statMount(id uint64, reply []byte) (use Use, idmapped bool, err error) {
	request := mountRequest{size: mountRequestSize, id: id, param: statMountBasic | statMountPoint | statMountUIDMap | statMountGIDMap}
	_, _, errno := unix.Syscall6(unix.SYS_STATMOUNT, uintptr(unsafe.Pointer(&request)), uintptr(unsafe.Pointer(&reply[0])), uintptr(len(reply)), 0, 0, 0)
	switch {
	case errno == unix.ENOENT:
		return use, false, nil
	case errno != 0:
		return use, false, fmt.Errorf("failed to look at mount %d: %w", id, errno)
	}
	return parseStatMount(reply)
}

// parseStatMount reads struct statmount. Its strings follow after its 512 bytes.
func parseStatMount(reply []byte) (use Use, idmapped bool, err error) {
	const fixed = 512
	if len(reply) < fixed {
		return use, false, fmt.Errorf("statmount(2) returned %d bytes: %w", len(reply), errdefs.ErrInternal)
	}
	word := func(offset int) uint32 { return binary.NativeEndian.Uint32(reply[offset:]) }
	texts := func(offset, n uint32) string {
		rest := reply[fixed:]
		rest = rest[min(uint64(offset), uint64(len(rest))):]
		var all []byte
		for ; n > 0 && len(rest) > 0; n-- {
			text, after, _ := bytes.Cut(rest, []byte{0})
			all, rest = append(append(all, text...), '\n'), after
		}
		return string(all)
	}
	if binary.NativeEndian.Uint64(reply[64:])&mountAttrIDMap == 0 {
		return use, false, nil
	}
	if mask := binary.NativeEndian.Uint64(reply[8:]); mask&statMountUIDMap == 0 || mask&statMountGIDMap == 0 {
		return use, false, errNotReported
	}
	use.By = "mount " + strings.TrimSpace(texts(word(108), 1))
	return use, true, use.addMaps(texts(word(156), word(152)), texts(word(164), word(160)))
}

// ReportsMountMaps reports whether statmount(2) of this kernel returns the id maps of mounts, since
// Linux 6.15. Otherwise [Mounts] assumes all ids for an idmapped mount.
func ReportsMountMaps() bool {
	const supportedMask = 0x1000 // STATMOUNT_SUPPORTED_MASK came with the id maps
	var stat unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, "/", 0, unix.STATX_MNT_ID_UNIQUE, &stat); err != nil {
		return false
	}
	reply := make([]byte, 1<<12)
	request := mountRequest{size: mountRequestSize, id: stat.Mnt_id, param: supportedMask}
	_, _, errno := unix.Syscall6(unix.SYS_STATMOUNT, uintptr(unsafe.Pointer(&request)), uintptr(unsafe.Pointer(&reply[0])), uintptr(len(reply)), 0, 0, 0)
	return errno == 0 && binary.NativeEndian.Uint64(reply[144:])&(statMountUIDMap|statMountGIDMap) == statMountUIDMap|statMountGIDMap
}
