package journal

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.etcd.io/bbolt"
)

// boltFile makes a bbolt file by writing and deleting many values of many sizes.
func boltFile(t testing.TB, seed uint64, transactions int) (content []byte, want map[string]string) {
	path := filepath.Join(t.TempDir(), "bolt")
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoSync: true, PageSize: 1024})
	require.NoError(t, err)
	random := rand.New(rand.NewPCG(seed, 0))
	want = map[string]string{}
	for range transactions {
		require.NoError(t, db.Update(func(tx *bbolt.Tx) error {
			b, err := tx.CreateBucketIfNotExists(bucketName)
			require.NoError(t, err)
			for range random.IntN(20) {
				k := fmt.Sprintf("k8s.io/%03d/%016x", random.IntN(60), random.IntN(3))
				if random.IntN(3) == 0 {
					require.NoError(t, b.Delete([]byte(k)))
					delete(want, k)
					continue
				}
				v := make([]byte, random.IntN(10)*random.IntN(10)*random.IntN(40))
				require.NoError(t, b.Put([]byte(k), v))
				want[k] = string(v)
			}
			return nil
		}))
	}
	require.NoError(t, db.Close())
	content, err = os.ReadFile(path)
	require.NoError(t, err)
	return content, want
}

func walk(b []byte) (got map[string]string, problems []error) {
	got = map[string]string{}
	problems = walkBolt(bytes.NewReader(b), int64(len(b)), bucketName, func(k, v []byte) { got[string(k)] = string(v) })
	return got, problems
}

// boltAgrees lets bbolt open, check and write a file in which the walk found nothing wrong.
func boltAgrees(t testing.TB, content []byte, want map[string]string) {
	path := filepath.Join(t.TempDir(), "bolt")
	require.NoError(t, os.WriteFile(path, content, 0o600))
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoSync: true})
	require.NoError(t, err)
	require.NoError(t, db.View(func(tx *bbolt.Tx) error {
		for err := range tx.Check() {
			t.Errorf("bbolt's check: %v", err)
		}
		got := map[string]string{}
		require.NoError(t, tx.Bucket(bucketName).ForEach(func(k, v []byte) error {
			got[string(k)] = string(v)
			return nil
		}))
		require.Equal(t, want, got)
		return nil
	}))
	for i := range 5 {
		require.NoError(t, db.Update(func(tx *bbolt.Tx) error {
			return tx.Bucket(bucketName).Put(fmt.Appendf(nil, "new-%d", i), make([]byte, 3000))
		}))
	}
	require.NoError(t, db.Close())
}

func TestWalkReadsWhatBoltWrites(t *testing.T) {
	for seed := range uint64(30) {
		content, want := boltFile(t, seed, 1+int(seed)*3)
		got, problems := walk(content)
		require.Empty(t, problems, "seed %d", seed)
		require.Equal(t, want, got, "seed %d", seed)
	}
}

func TestWalkOfTruncatedFile(t *testing.T) {
	content, want := boltFile(t, 1, 40)
	for size := 0; size < len(content); size += 97 {
		got, problems := walk(content[:size])
		if len(problems) == 0 { // bbolt allocates more than it uses
			require.Equal(t, want, got)
			continue
		}
		for k, v := range got {
			require.Equal(t, want[k], v, "what can still be read is right")
		}
	}
	_, problems := walk(content[:len(content)/2])
	require.ErrorContains(t, problems[0], "cut off")
}

// Each flip is either found or harms neither what is read nor bbolt. (A flip inside a value is for the frame's checksum to find.)
func TestWalkOfFlippedFile(t *testing.T) {
	content, _ := boltFile(t, 7, 15)
	unnoticed := 0
	for at := 0; at < len(content); at += flipStep {
		content[at] ^= 1 << (at % 8)
		got, problems := walk(content)
		if len(problems) == 0 && at%1024 < 200 { // where pages have their structure
			if unnoticed++; unnoticed%100 == 0 { // each costs some milliseconds
				boltAgrees(t, content, got)
			}
		}
		content[at] ^= 1 << (at % 8)
	}
	require.NotZero(t, unnoticed)
}

// These end a process that hands the file to bbolt: no recover helps against a stack overflow.
func TestWalkOfLoops(t *testing.T) {
	content, _ := boltFile(t, 7, 60)
	loops := 0
	for id := 2; id < len(content)/1024; id++ {
		page := content[id*1024 : (id+1)*1024]
		if order.Uint16(page[8:]) != boltBranchPage || order.Uint16(page[10:]) == 0 {
			continue
		}
		looped := bytes.Clone(content)
		order.PutUint64(looped[id*1024+boltPageHeader+8:], uint64(id))
		if _, problems := walk(looped); len(problems) > 0 {
			require.ErrorContains(t, problems[0], "referred to twice")
			loops++
		}
	}
	require.NotZero(t, loops, "no branch page is in use: make the file larger")
}

// Structure that is sound page by page but not as a whole.
func TestWalkOfAlteredStructure(t *testing.T) {
	sound, _ := boltFile(t, 7, 60)
	keyOf := func(page []byte, element int) []byte {
		e := page[boltPageHeader+element*boltElement:]
		return e[order.Uint32(e[4:]):][:order.Uint32(e[8:])]
	}
	setKey := func(page []byte, element int, value byte) { keyOf(page, element)[0] = value }
	copyKey := func(page []byte, from, to int) { copy(keyOf(page, to), keyOf(page, from)) }
	for name, tc := range map[string]struct {
		flags  uint16
		alter  func(page []byte)
		reason string
	}{
		"key like the one before":      {boltLeafPage, func(p []byte) { copyKey(p, 0, 1) }, "key 1 is out of order"},
		"key below its parent's":       {boltLeafPage, func(p []byte) { setKey(p, 0, 'a') }, "key 0 is out of order"},
		"key beyond its parent's next": {boltLeafPage, func(p []byte) { setKey(p, int(order.Uint16(p[10:]))-1, 'z') }, "is out of order"},
		"element beyond the page":      {boltLeafPage, func(p []byte) { order.PutUint32(p[boltPageHeader+12:], 1<<30) }, "element 0 is out of bounds"},
		"more elements than fit":       {boltLeafPage, func(p []byte) { order.PutUint16(p[10:], 0xffff) }, ""},
		"overflow beyond the file":     {boltLeafPage, func(p []byte) { order.PutUint32(p[12:], 0xffffffff) }, "overflow pages is out of bounds"},
		"another page's number":        {boltLeafPage, func(p []byte) { order.PutUint64(p, 1000) }, "says that it is page 1000"},
		"no kind of page":              {boltLeafPage, func(p []byte) { order.PutUint16(p[8:], 7) }, "unexpected page flags 0x7"},
		"branch without children":      {boltBranchPage, func(p []byte) { order.PutUint16(p[10:], 0) }, "branch without children"},
		"child beyond the file":        {boltBranchPage, func(p []byte) { order.PutUint64(p[boltPageHeader+8:], 1<<40) }, "out of bounds"},
		"free page that is not listed": {boltFreelistPage, func(p []byte) { order.PutUint16(p[10:], order.Uint16(p[10:])-1) }, "neither free nor in use"},
		"free page that is in use":     {boltFreelistPage, func(p []byte) { order.PutUint64(p[boltPageHeader:], 0) }, "out of bounds or in use"},
		"more free pages than memory":  {boltFreelistPage, func(p []byte) { order.PutUint16(p[10:], 0xffff); order.PutUint64(p[boltPageHeader:], 1<<50) }, "claims"},
		"freelist that is no freelist": {boltFreelistPage, func(p []byte) { order.PutUint16(p[8:], boltLeafPage) }, "freelist: unexpected page flags"},
	} {
		t.Run(name, func(t *testing.T) {
			found := 0
			for at := 2 * 1024; at < len(sound); at += 1024 {
				page := sound[at : at+1024]
				if order.Uint64(page) != uint64(at/1024) || order.Uint16(page[8:]) != tc.flags || order.Uint16(page[10:]) < 3 {
					continue
				}
				content := bytes.Clone(sound)
				tc.alter(content[at:])
				_, problems := walk(content)
				if len(problems) > 0 && strings.Contains(errors.Join(problems...).Error(), tc.reason) {
					found++ // other pages of this kind are out of use
				}
			}
			require.NotZero(t, found)
		})
	}
}

func TestWalkRefusesForeignFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bolt")
	db, err := bbolt.Open(path, 0o600, nil)
	require.NoError(t, err)
	require.NoError(t, db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucket(bucketName)
		require.NoError(t, err)
		_, err = b.CreateBucket([]byte("nested"))
		require.NoError(t, err)
		_, err = tx.CreateBucket([]byte("other"))
		return err
	}))
	require.NoError(t, db.Close())
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	_, problems := walk(content)
	require.Len(t, problems, 2)
	require.ErrorContains(t, problems[0], `unexpected bucket "nested"`)
	require.ErrorContains(t, problems[1], `unexpected entry "other"`)
}

// FuzzWalk writes a number anywhere into a sound file: the walk must end, and what it approves must do bbolt no harm.
func FuzzWalk(f *testing.F) {
	sound := make([][]byte, 8)
	for i := range sound {
		sound[i], _ = boltFile(f, uint64(i), 1+3*i)
		f.Add(i, uint(boltPageHeader), uint64(1))
		f.Add(i, uint(2048+10), uint64(0xffff))
	}
	f.Fuzz(func(t *testing.T, file int, at uint, with uint64) {
		content := bytes.Clone(sound[uint(file)%8])
		order.PutUint64(content[at%uint(len(content)-7):], with)
		if got, problems := walk(content); len(problems) == 0 && len(got) > 0 {
			boltAgrees(t, content, got)
		}
	})
}
