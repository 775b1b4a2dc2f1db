package journal

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
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
	content, _ := boltFile(t, 7, 30)
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

func FuzzWalk(f *testing.F) {
	small, _ := boltFile(f, 1, 1)
	large, _ := boltFile(f, 2, 20)
	f.Add(small, 0, uint64(0))
	f.Add(large, 100, uint64(1))
	f.Fuzz(func(t *testing.T, b []byte, at int, with uint64) {
		// The page headers are all but unreachable by flipping bits of a whole file: help a little.
		if len(b) >= 8 {
			order.PutUint64(b[uint(at)%uint(len(b)-7):], with)
		}
		walk(b)
	})
}
