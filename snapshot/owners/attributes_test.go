package owners

import (
	"encoding/binary"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
)

// podMap is a map as pods have it, with different ids for users and groups.
var podMap = Map{
	UIDs: []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 65536}},
	GIDs: []specs.LinuxIDMapping{{ContainerID: 0, HostID: 300000, Size: 65536}},
}

// words writes numbers as the kernel writes them into attributes.
func words(numbers ...uint32) (value []byte) {
	for _, n := range numbers {
		value = binary.LittleEndian.AppendUint32(value, n)
	}
	return value
}

// entry is the first word of an entry of an access control list.
func entry(tag, permissions uint32) uint32 { return permissions<<16 | tag }

func TestShiftAttributes(t *testing.T) {
	type test struct {
		name, attribute string
		value, shifted  []byte
		err             string
	}
	const effective = 1
	for _, c := range []test{
		{name: "capabilities without a root id", attribute: nameCapability,
			value:   words(capabilityV2|effective, 1<<10, 1<<10, 3, 4),
			shifted: words(capabilityV3|effective, 1<<10, 1<<10, 3, 4, 200000)},
		{name: "capabilities of root id 0", attribute: nameCapability,
			value:   words(capabilityV3, 1, 2, 3, 4, 0),
			shifted: words(capabilityV3, 1, 2, 3, 4, 200000)},
		{name: "capabilities of a namespace inside", attribute: nameCapability,
			value:   words(capabilityV3, 1, 2, 3, 4, 1000),
			shifted: words(capabilityV3, 1, 2, 3, 4, 201000)},
		{name: "capabilities of a root id that isn't mapped", attribute: nameCapability,
			value: words(capabilityV3, 1, 2, 3, 4, 65536), err: "uid 65536 is not mapped"},
		{name: "capabilities of revision 1", attribute: nameCapability,
			value: words(0x01000000, 1, 2), err: "unknown revision 1 of file capabilities, in 12 bytes"},
		{name: "capabilities that are too long", attribute: nameCapability,
			value: words(capabilityV2, 1, 2, 3, 4, 5), err: "unknown revision 2 of file capabilities, in 24 bytes"},
		{name: "capabilities cut short", attribute: nameCapability,
			value: []byte{0, 0, 2}, err: "file capabilities are truncated"},
		{name: "a list that names users and groups", attribute: nameACL,
			value:   words(2, entry(0x01, 6), ^uint32(0), entry(0x02, 7), 5, entry(0x04, 5), ^uint32(0), entry(0x08, 4), 6, entry(0x10, 7), ^uint32(0), entry(0x20, 0), ^uint32(0)),
			shifted: words(2, entry(0x01, 6), ^uint32(0), entry(0x02, 7), 200005, entry(0x04, 5), ^uint32(0), entry(0x08, 4), 300006, entry(0x10, 7), ^uint32(0), entry(0x20, 0), ^uint32(0))},
		{name: "an empty list", attribute: nameDefaultACL, value: words(2), shifted: words(2)},
		{name: "a list with a group that isn't mapped", attribute: nameACL,
			value: words(2, entry(0x08, 4), 70000), err: "gid 70000 is not mapped"},
		{name: "a list cut short", attribute: nameACL, value: words(2, 1), err: "access control list of 8 bytes is truncated"},
		{name: "a list of another version", attribute: nameACL, value: words(1), err: "unknown version 1 of an access control list"},
	} {
		t.Run(c.name, func(t *testing.T) {
			shifted, err := shifter(c.attribute)(c.value, podMap)
			if c.err != "" {
				require.EqualError(t, err, c.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, c.shifted, shifted)
		})
	}
	require.Nil(t, shifter("user.comment"))
	require.Nil(t, shifter("trusted.overlay.origin"))
}

// What the parsers accept, they can turn back into what it was, and hostile bytes
// are errors at most.
func FuzzShiftAttributes(f *testing.F) {
	f.Add(words(capabilityV2|1, 1, 2, 3, 4))
	f.Add(words(capabilityV3, 1, 2, 3, 4, 1000))
	f.Add(words(2, entry(0x02, 7), 5, entry(0x08, 4), 6, entry(0x10, 7), ^uint32(0)))
	f.Fuzz(func(t *testing.T, value []byte) {
		for _, name := range []string{nameCapability, nameACL} {
			shifted, err := shifter(name)(value, podMap)
			if err != nil {
				continue
			}
			back, err := shifter(name)(shifted, podMap.Inverse())
			require.NoError(t, err)
			again, err := shifter(name)(back, podMap)
			require.NoError(t, err)
			require.Equal(t, shifted, again)
			if name == nameACL {
				require.Equal(t, value, back)
			}
		}
	})
}

func TestInvalidMaps(t *testing.T) {
	one := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	for _, c := range []struct {
		name string
		m    Map
		err  string
	}{
		{"no users", Map{GIDs: one}, "the uid map is empty"},
		{"no groups", Map{UIDs: one}, "the gid map is empty"},
		{"no ids", Map{UIDs: []specs.LinuxIDMapping{{HostID: 7}}, GIDs: one}, "the uid map has an extent of 0 ids from 0 to 7"},
		{"no id", Map{UIDs: one, GIDs: []specs.LinuxIDMapping{{HostID: 1<<32 - 2, Size: 2}}}, "none above 4294967294"},
		{"one id twice", Map{UIDs: append([]specs.LinuxIDMapping{{ContainerID: 65535, HostID: 1, Size: 1}}, one...), GIDs: one}, "the uid map has overlapping extents from 65535 and 0"},
		{"two ids at once", Map{UIDs: append([]specs.LinuxIDMapping{{ContainerID: 65536, HostID: 165535, Size: 1}}, one...), GIDs: one}, "the uid map has overlapping extents from 65536 and 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := c.m.validate()
			require.ErrorContains(t, err, c.err)
			require.True(t, errdefs.IsInvalidArgument(err))
		})
	}
	require.NoError(t, Map{UIDs: append([]specs.LinuxIDMapping{{ContainerID: 65536, HostID: 1, Size: 1}}, one...), GIDs: one}.validate())
}
