package owners

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// The extended attributes that hold ids.
const (
	nameCapability = "security.capability"
	nameACL        = "system.posix_acl_access"
	nameDefaultACL = "system.posix_acl_default"
)

// attribute is an extended attribute.
type attribute struct {
	name  string
	value []byte
}

// shifter returns the function that maps the ids in an attribute's value, nil for an attribute
// without ids.
func shifter(name string) func([]byte, Map) ([]byte, error) {
	switch name {
	case nameCapability:
		return shiftCapability
	case nameACL, nameDefaultACL:
		return shiftACL
	default:
		return nil
	}
}

// The value of file capabilities, see capabilities(7) and linux/capability.h. The first word has the
// revision and flags. Two pairs of words have the capabilities. In revision 3 a last word has the
// root id: the capabilities only count in user namespaces whose root has this uid. In revision 2
// the root id is 0. All words are little endian.
const (
	capabilityRevision = 0xff000000
	capabilityV2       = 0x02000000
	capabilityV3       = 0x03000000

	capabilitySizeV2 = 4 + 4*4
	capabilitySizeV3 = capabilitySizeV2 + 4
)

// shiftCapability maps the root id of file capabilities. Root id 0 is written as
// revision 2, as the kernel does.
func shiftCapability(value []byte, m Map) ([]byte, error) {
	if len(value) < 4 {
		return nil, errors.New("file capabilities are truncated")
	}
	word := binary.LittleEndian.Uint32(value)
	var root uint32
	switch revision := word & capabilityRevision; {
	case revision == capabilityV2 && len(value) == capabilitySizeV2:
	case revision == capabilityV3 && len(value) == capabilitySizeV3:
		root = binary.LittleEndian.Uint32(value[capabilitySizeV2:])
	default:
		return nil, fmt.Errorf("unknown revision %d of file capabilities, in %d bytes", revision>>24, len(value))
	}
	root, err := m.uid(root)
	if err != nil {
		return nil, err
	}
	revision := uint32(capabilityV3)
	if root == 0 {
		revision = capabilityV2
	}
	shifted := binary.LittleEndian.AppendUint32(nil, word&^capabilityRevision|revision)
	shifted = append(shifted, value[4:capabilitySizeV2]...)
	if root != 0 {
		shifted = binary.LittleEndian.AppendUint32(shifted, root)
	}
	return shifted, nil
}

// Access control lists, linux/posix_acl_xattr.h: a word with the version, then
// entries of tag, permissions (both of 16 bits) and id, all little endian.
const (
	aclVersion  = 2
	aclHeader   = 4
	aclEntry    = 8
	aclTagUser  = 0x02
	aclTagGroup = 0x08
)

// shiftACL maps the users and groups that an access control list names.
func shiftACL(value []byte, m Map) ([]byte, error) {
	if len(value) < aclHeader || (len(value)-aclHeader)%aclEntry != 0 {
		return nil, fmt.Errorf("access control list of %d bytes is truncated", len(value))
	}
	if version := binary.LittleEndian.Uint32(value); version != aclVersion {
		return nil, fmt.Errorf("unknown version %d of an access control list", version)
	}
	shifted := slices.Clone(value)
	for entry := range slices.Chunk(shifted[aclHeader:], aclEntry) {
		id, err := binary.LittleEndian.Uint32(entry[4:]), error(nil)
		switch binary.LittleEndian.Uint16(entry) {
		case aclTagUser:
			id, err = m.uid(id)
		case aclTagGroup:
			id, err = m.gid(id)
		}
		if err != nil {
			return nil, err
		}
		binary.LittleEndian.PutUint32(entry[4:], id)
	}
	return shifted, nil
}
