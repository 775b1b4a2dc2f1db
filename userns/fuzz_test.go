package userns

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// FuzzParseStatMount has what statmount(2) answers: a mount point that a pod may have named, and maps.
func FuzzParseStatMount(f *testing.F) {
	reply := func(point, uids, gids string) []byte {
		b := make([]byte, 512)
		put := binary.NativeEndian
		put.PutUint64(b[8:], statMountBasic|statMountPoint|statMountUIDMap|statMountGIDMap)
		put.PutUint64(b[64:], mountAttrIDMap)
		texts := point + "\x00" + uids + "\x00" + gids + "\x00"
		put.PutUint32(b[108:], 0)
		put.PutUint32(b[152:], 1)
		put.PutUint32(b[156:], uint32(len(point)+1))
		put.PutUint32(b[160:], 1)
		put.PutUint32(b[164:], uint32(len(point)+len(uids)+2))
		return append(b, texts...)
	}
	f.Add(reply("/mnt", "0 131072 65536", "0 131072 65536"))
	f.Add(reply("/a\nb \x01", "0 4294967295 2", ""))
	f.Add(reply("", "x", "0 1 1")[:520])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, reply []byte) {
		use, idmapped, err := parseStatMount(reply)
		if err == nil && idmapped {
			requireIDs(t, use)
		}
	})
}

// FuzzProcess has what /proc says of a process, whose name and user namespace are a pod's to choose.
func FuzzProcess(f *testing.F) {
	f.Add("Name:\tpause\nUid:\t131072\t131072\t131072\t131072\nGid:\t131072\t1\t1\t1\nGroups:\t131073 \n", "0 131072 65536\n", "0 131072 65536\n")
	f.Add("Name:\tUid: 131072\\nGid: 5\nUid:\t-1\t4294967296\nGroups:\n", "         0          0 4294967295\n", "")
	f.Add("Uid", "0 1", "0 0 0")
	f.Fuzz(func(t *testing.T, status, uids, gids string) {
		use := runsAs(status)
		if err := use.addMaps(uids, gids); err == nil {
			requireIDs(t, use)
		}
	})
}

func requireIDs(t *testing.T, use Use) {
	for _, extents := range [][]Mapping{use.UIDs, use.GIDs} {
		for _, m := range extents {
			require.NotZero(t, m.Length)
			require.LessOrEqual(t, m.last(), uint64(1<<32-1))
		}
	}
}

// FuzzHistory has the file in which the pool keeps the order of use. Whatever is in it, the order is one of the pool's ranges, and the
// same when the file is read again.
func FuzzHistory(f *testing.F) {
	f.Add([]byte("131072 131072\n196608 196608\n131072 131072\n"))
	f.Add([]byte("131072 131072"))
	f.Add([]byte("1 2 3\n\n-1 5\n131072\t131072\n 196608 196608\n\xff"))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text []byte) {
		path := filepath.Join(dir, "history")
		require.NoError(t, os.WriteFile(path, text, 0o600))
		order := func() (order []uint32) {
			ranges := Ranges{UIDs: []Extent{{First: 131072, Size: 3 * RangeSize}}, GIDs: []Extent{{First: 131072, Size: 3 * RangeSize}}}
			pool, err := OpenPool("test", ranges, path)
			require.NoError(t, err)
			require.Len(t, pool.slots, 3)
			var used []*slot
			for _, s := range pool.slots {
				if s.lastUsed > 0 {
					used = append(used, s)
				}
			}
			for len(used) > 0 {
				first := 0
				for i := range used {
					if used[i].lastUsed < used[first].lastUsed {
						first = i
					}
				}
				order = append(order, used[first].mappings.UIDs.HostID)
				used = append(used[:first], used[first+1:]...)
			}
			return order
		}
		first := order()
		written, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, len(first), bytes.Count(written, []byte("\n")), "it is written anew with a line for each range")
		require.Equal(t, first, order())
	})
}
