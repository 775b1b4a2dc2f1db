package owners

import (
	"archive/tar"
	"fmt"

	"github.com/containerd/errdefs"
)

// xattrRecord is the prefix of PAX records that hold extended attributes.
const xattrRecord = "SCHILY.xattr."

// Header maps the ids of an entry of a tar stream, as Shift does for a file. An id outside of m is
// a FailedPrecondition error.
func (m Map) Header(h *tar.Header) error {
	uid, err := m.uid(uint32(h.Uid))
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	gid, err := m.gid(uint32(h.Gid))
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	h.Uid, h.Gid = int(uid), int(gid)
	//lint:ignore SA1019 a reader sets it, and a writer prefers it to the records
	h.Xattrs = nil
	for _, name := range []string{nameCapability, nameACL, nameDefaultACL} {
		value, ok := h.PAXRecords[xattrRecord+name]
		if !ok {
			continue
		}
		shifted, err := shifter(name)([]byte(value), m)
		if err != nil {
			return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
		}
		h.PAXRecords[xattrRecord+name] = string(shifted)
	}
	return nil
}
