package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
)

// The layout of a bbolt file, version 2, in the byte order of the machine (bbolt's internal/common: page.go, meta.go,
// bucket.go, inode.go). It has not changed since 2013.
const (
	boltMagic   = 0xED0CDAED
	boltVersion = 2

	boltPageHeader = 16 // id uint64, flags uint16, count uint16, overflow uint32
	boltElement    = 16 // branch: pos uint32, ksize uint32, pgid uint64; leaf: flags, pos, ksize, vsize uint32
	boltMeta       = 64 // magic, version, page size, flags uint32; root pgid, sequence, freelist, high water, txid, checksum uint64
	boltBucket     = 16 // root pgid uint64, sequence uint64; root 0: the bucket's only page follows inline

	boltBranchPage   = 0x01
	boltLeafPage     = 0x02
	boltMetaFlag     = 0x04
	boltFreelistPage = 0x10
	boltBucketEntry  = 0x01
)

var order = binary.NativeEndian

// boltWalk reads a bbolt file that holds one bucket of plain values with nothing but bounds-checked reads.
//
// It is there because bbolt trusts its file. On a damaged one it panics, faults beyond the end of its memory map, recurses
// for ever on a branch page that names itself, or allocates whatever a freelist claims; the last two end the process and
// can't be recovered from. A file in which boltWalk finds no problem is safe to be opened by bbolt: all pages up to the
// high water mark are either in the tree, once, with their keys in order and within their parent's bounds, or in the freelist.
type boltWalk struct {
	r         io.ReaderAt
	size      int64
	pageSize  int64
	highWater uint64
	seen      map[uint64]bool // pages in the tree
	bucket    []byte
	visit     func(key, value []byte)
	problems  []error
}

// walkBolt calls visit with every key and value that it can reach in the bucket, also when parts of the file are damaged.
// It returns what is wrong with the file.
func walkBolt(r io.ReaderAt, size int64, bucket []byte, visit func(key, value []byte)) []error {
	w := &boltWalk{r: r, size: size, seen: map[uint64]bool{}, bucket: bucket, visit: visit}
	meta, ok := w.meta()
	if !ok {
		return w.problems
	}
	if err := w.tree(meta.root, nil, nil, w.rootEntry); err != nil {
		w.problem(err)
	}
	if len(w.problems) > 0 {
		return w.problems // the freelist can be checked only against a whole tree
	}
	if err := w.freelist(meta.freelist); err != nil {
		w.problem(err)
	}
	return w.problems
}

func (w *boltWalk) problem(err error) { w.problems = append(w.problems, err) }

// boltMetaPage is the content of one.
type boltMetaPage struct {
	pageSize                        int64
	root, freelist, highWater, txid uint64
}

// meta returns the newer of the valid meta pages. bbolt would silently go on with the older state when one is invalid;
// here that is a problem, since a transaction is lost then.
func (w *boltWalk) meta() (newest boltMetaPage, ok bool) {
	pageSize := int64(os.Getpagesize())
	for id := range int64(2) {
		m, err := w.readMeta(id, id*pageSize)
		if err != nil {
			w.problem(fmt.Errorf("meta page %d: %w", id, err))
			continue
		}
		pageSize = m.pageSize
		if !ok || m.txid > newest.txid {
			newest, ok = m, true
		}
	}
	if !ok {
		return boltMetaPage{}, false
	}
	w.pageSize, w.highWater = newest.pageSize, newest.highWater
	if pages := uint64(w.size / w.pageSize); w.highWater > pages {
		w.problem(fmt.Errorf("file is cut off: %d of %d pages are there", pages, w.highWater))
		w.highWater = pages
	}
	return newest, true
}

func (w *boltWalk) readMeta(id, offset int64) (boltMetaPage, error) {
	page := make([]byte, boltPageHeader+boltMeta)
	if _, err := w.r.ReadAt(page, offset); err != nil {
		return boltMetaPage{}, fmt.Errorf("failed to read: %w", err)
	}
	if got, flags := order.Uint64(page), order.Uint16(page[8:]); got != uint64(id) || flags != boltMetaFlag {
		return boltMetaPage{}, fmt.Errorf("says that it is page %d with flags %#x", got, flags)
	}
	b := page[boltPageHeader:]
	sum := fnv.New64a()
	sum.Write(b[:56])
	if order.Uint32(b) != boltMagic || order.Uint64(b[56:]) != sum.Sum64() {
		return boltMetaPage{}, errors.New("invalid")
	}
	if v := order.Uint32(b[4:]); v != boltVersion {
		return boltMetaPage{}, fmt.Errorf("bbolt file format %d instead of %d", v, boltVersion)
	}
	m := boltMetaPage{
		pageSize:  int64(order.Uint32(b[8:])),
		root:      order.Uint64(b[16:]),
		freelist:  order.Uint64(b[32:]),
		highWater: order.Uint64(b[40:]),
		txid:      order.Uint64(b[48:]),
	}
	if m.pageSize < 512 || m.pageSize > 64<<10 || m.pageSize&(m.pageSize-1) != 0 {
		return boltMetaPage{}, fmt.Errorf("page size %d", m.pageSize)
	}
	return m, nil
}

// boltPage is one page with its overflow, or a page inside a bucket's value.
type boltPage struct {
	flags uint16
	count int
	b     []byte
}

func parseBoltPage(b []byte) (boltPage, error) {
	if len(b) < boltPageHeader {
		return boltPage{}, errors.New("page is cut off")
	}
	return boltPage{flags: order.Uint16(b[8:]), count: int(order.Uint16(b[10:])), b: b}, nil
}

// page reads a page that nothing has referred to so far.
func (w *boltWalk) page(id uint64) (boltPage, error) {
	if id < 2 || id >= w.highWater {
		return boltPage{}, fmt.Errorf("page %d is out of bounds", id)
	}
	head := make([]byte, boltPageHeader)
	if _, err := w.r.ReadAt(head, int64(id)*w.pageSize); err != nil {
		return boltPage{}, fmt.Errorf("failed to read page %d: %w", id, err)
	}
	if got := order.Uint64(head); got != id {
		return boltPage{}, fmt.Errorf("page %d says that it is page %d", id, got)
	}
	pages := uint64(order.Uint32(head[12:])) + 1
	if id+pages > w.highWater {
		return boltPage{}, fmt.Errorf("page %d with %d overflow pages is out of bounds", id, pages-1)
	}
	for i := id; i < id+pages; i++ {
		if w.seen[i] {
			return boltPage{}, fmt.Errorf("page %d is referred to twice", i)
		}
		w.seen[i] = true
	}
	b := make([]byte, int64(pages)*w.pageSize)
	if _, err := w.r.ReadAt(b, int64(id)*w.pageSize); err != nil {
		return boltPage{}, fmt.Errorf("failed to read page %d: %w", id, err)
	}
	p, err := parseBoltPage(b)
	if err != nil {
		return boltPage{}, fmt.Errorf("page %d: %w", id, err)
	}
	return p, nil
}

type boltEntry struct {
	flags      uint32
	key, value []byte
	child      uint64
}

// entries returns the page's elements; those before one that is out of bounds come with the error.
func (p boltPage) entries() ([]boltEntry, error) {
	var all []boltEntry
	for i := range p.count {
		at := boltPageHeader + i*boltElement
		if at+boltElement > len(p.b) {
			return all, fmt.Errorf("claims %d elements", p.count)
		}
		e := p.b[at : at+boltElement]
		var entry boltEntry
		var pos, ksize, vsize uint64
		switch p.flags {
		case boltBranchPage:
			pos, ksize = uint64(order.Uint32(e)), uint64(order.Uint32(e[4:]))
			entry.child = order.Uint64(e[8:])
		case boltLeafPage:
			entry.flags = order.Uint32(e)
			pos, ksize, vsize = uint64(order.Uint32(e[4:])), uint64(order.Uint32(e[8:])), uint64(order.Uint32(e[12:]))
		}
		begin := uint64(at) + pos
		if begin+ksize+vsize > uint64(len(p.b)) || ksize == 0 {
			return all, fmt.Errorf("element %d is out of bounds", i)
		}
		entry.key, entry.value = p.b[begin:begin+ksize], p.b[begin+ksize:begin+ksize+vsize]
		all = append(all, entry)
	}
	return all, nil
}

// tree walks the tree below a page. All its keys must lie in [low, high); nil is no bound.
func (w *boltWalk) tree(id uint64, low, high []byte, leaf func(boltEntry)) error {
	p, err := w.page(id)
	if err != nil {
		return err
	}
	if err := w.node(p, low, high, leaf); err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	return nil
}

func (w *boltWalk) node(p boltPage, low, high []byte, leaf func(boltEntry)) error {
	if p.flags != boltBranchPage && p.flags != boltLeafPage {
		return fmt.Errorf("unexpected page flags %#x", p.flags)
	}
	entries, err := p.entries()
	if err == nil {
		err = checkKeys(entries, low, high)
	}
	if p.flags == boltBranchPage && p.count == 0 {
		err = errors.New("branch without children")
	}
	for i, e := range entries {
		if p.flags == boltLeafPage {
			leaf(e)
			continue
		}
		next := high
		if i+1 < len(entries) {
			next = entries[i+1].key
		}
		if err := w.tree(e.child, e.key, next, leaf); err != nil {
			w.problem(err)
		}
	}
	return err
}

func checkKeys(entries []boltEntry, low, high []byte) error {
	for i, e := range entries {
		if i > 0 && bytes.Compare(entries[i-1].key, e.key) >= 0 ||
			low != nil && bytes.Compare(e.key, low) < 0 ||
			high != nil && bytes.Compare(e.key, high) >= 0 {
			return fmt.Errorf("key %d is out of order", i)
		}
	}
	return nil
}

// rootEntry takes an entry of the root bucket: there may be only our bucket.
func (w *boltWalk) rootEntry(e boltEntry) {
	if e.flags != boltBucketEntry || !bytes.Equal(e.key, w.bucket) || len(e.value) < boltBucket {
		w.problem(fmt.Errorf("unexpected entry %q in the root bucket", e.key))
		return
	}
	var err error
	if root := order.Uint64(e.value); root != 0 {
		err = w.tree(root, nil, nil, w.bucketEntry)
	} else {
		err = w.inline(e.value[boltBucket:])
	}
	if err != nil {
		w.problem(err)
	}
}

func (w *boltWalk) inline(b []byte) error {
	p, err := parseBoltPage(b)
	if err == nil && p.flags != boltLeafPage {
		err = fmt.Errorf("unexpected page flags %#x", p.flags)
	}
	if err == nil {
		err = w.node(p, nil, nil, w.bucketEntry)
	}
	if err != nil {
		return fmt.Errorf("inline page of bucket %q: %w", w.bucket, err)
	}
	return nil
}

func (w *boltWalk) bucketEntry(e boltEntry) {
	if e.flags != 0 {
		w.problem(fmt.Errorf("unexpected bucket %q", e.key))
		return
	}
	w.visit(e.key, e.value)
}

// freelist checks that the pages outside of the tree are those in the freelist: bbolt writes to what is listed there.
func (w *boltWalk) freelist(id uint64) error {
	p, err := w.page(id)
	if err != nil {
		return fmt.Errorf("freelist: %w", err)
	}
	if p.flags != boltFreelistPage {
		return fmt.Errorf("freelist: unexpected page flags %#x", p.flags)
	}
	ids := p.b[boltPageHeader:]
	count := uint64(p.count)
	if count == 0xffff { // then the first element is the count
		count, ids = order.Uint64(ids), ids[8:]
	}
	if count > uint64(len(ids)/8) {
		return fmt.Errorf("freelist: claims %d pages", count)
	}
	for ; count > 0; count, ids = count-1, ids[8:] {
		free := order.Uint64(ids)
		if free < 2 || free >= w.highWater || w.seen[free] {
			return fmt.Errorf("freelist: page %d is out of bounds or in use", free)
		}
		w.seen[free] = true
	}
	if lost := w.highWater - 2 - uint64(len(w.seen)); lost != 0 {
		return fmt.Errorf("freelist: %d pages are neither free nor in use", lost)
	}
	return nil
}
