package ledger

import (
	"bytes"
	"cmp"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"strings"
)

// image is one of the two logs as it is found.
type image struct {
	path     string
	found    bool
	header   *header // the newest; nil if none could be read
	newer    bool    // in a later format than ours: nothing of it is used
	records  []keyed
	content  logContent     // has the records' frames
	forgot   map[Key]uint64 // the highest tombstone of each key
	lastSeq  uint64         // the highest sequence number
	base     base
	damage   []Damage
	torn     int64 // the offset of the torn end; 0 for none
	complete bool  // found, without damage
}

// base describes what a log was written with, without later appends.
type base struct {
	lastSeq uint64 // of its header
	missing int    // how many of its records haven't been read
}

func newImage(path string) *image { return &image{path: path, forgot: map[Key]uint64{}} }

func (m *image) damaged(k Key, format string, args ...any) {
	m.damage = append(m.damage, Damage{File: m.path, Key: k, Reason: fmt.Sprintf(format, args...)})
}

// keptAs sets the path of the kept file in all damage.
func (m *image) keptAs(path string) {
	for i := range m.damage {
		m.damage[i].Kept = path
	}
}

// take adds one decoded frame, which is at offset at in the content.
func (m *image) take(e entry, frame []byte, at int64) {
	switch {
	case e.Header != nil:
		m.header = e.Header
		m.lastSeq = max(m.lastSeq, e.Header.LastSeq)
		if at == 0 {
			m.base = base{lastSeq: e.Header.LastSeq, missing: e.Header.Records}
		}
	case e.Record != nil:
		m.records = append(m.records, keyed{e.Record.Key, newStored(e.Record, frame).loggedAt(at)})
		m.lastSeq = max(m.lastSeq, e.Record.Seq)
		if len(m.damage) == 0 && m.base.missing > 0 {
			m.base.missing--
		}
	case e.Forgot != nil:
		m.forgot[e.Forgot.Key] = max(m.forgot[e.Forgot.Key], e.Forgot.Seq)
		m.lastSeq = max(m.lastSeq, e.Forgot.Seq)
	}
}

// finish checks the file once all of it has been read.
func (m *image) finish() {
	if m.header != nil && m.header.Format > format {
		m.newer, m.records, m.forgot, m.base = true, nil, nil, base{}
		m.damaged(Key{}, "written in format %d by a newer podfsm; this one reads up to %d", m.header.Format, format)
	}
	if m.header == nil && len(m.damage) == 0 {
		m.damaged(Key{}, "header is missing")
	}
	if m.base.missing > 0 && len(m.damage) == 0 {
		m.damaged(Key{}, "%d of the records that it was written with are missing", m.base.missing)
	}
	m.complete = len(m.damage) == 0
}

// intact says that the file was found and has no damage except a torn end, which a kill or a power
// cut may leave.
func (m *image) intact() bool {
	return m.found && m.base.missing == 0 && !slices.ContainsFunc(m.damage, func(d Damage) bool { return !d.Torn })
}

// compacted returns a sequence number. The file has every sandbox up to that number that was not
// forgotten.
func (m *image) compacted() uint64 {
	if m.base.missing > 0 {
		return 0
	}
	return m.base.lastSeq
}

// inMemory copies the frames into the records, because a record's offset is always one in the other
// log.
func (m *image) inMemory() *image {
	for i, s := range m.records {
		frame, err := m.content.frame(s.stored)
		if err == nil { // never fails: the frame was just read there
			m.records[i].frame = bytes.Clone(frame)
		}
	}
	m.content = logContent{}
	return m
}

// stored is one record in memory: its sort keys and the place of its frame.
type stored struct {
	seq     uint64
	says    uint64 // equal for records that say the same
	frame   []byte // nil if the log has it
	at      int64  // its offset in the log
	sum     uint32 // its checksum
	durable bool
}

// loggedAt returns the record with its frame at an offset in the log.
func (s stored) loggedAt(at int64) stored {
	s.frame, s.at = nil, at
	return s
}

// keyed is a record and the key of its sandbox.
type keyed struct {
	key Key
	stored
}

// saying has the fields by which two records of a sandbox say the same.
type saying struct {
	kind               Kind
	step, goal, claim  string
	from, event, state string
	holds              string
	atStop             bool
	typeURL, value     string
	writtenOff         string
	interrupted        bool
	durable            bool
}

var sayingSeed = maphash.MakeSeed()

func newStored(r *Record, frame []byte) stored {
	return stored{
		seq: r.Seq,
		says: maphash.Comparable(sayingSeed, saying{
			kind: r.Kind,
			step: r.Step, goal: r.Goal, claim: r.Claim,
			from: r.From, event: r.Event, state: r.State,
			holds: strings.Join(r.Holds, " "), atStop: r.AtStop,
			typeURL: r.Data.GetTypeUrl(), value: string(r.Data.GetValue()),
			writtenOff: r.WrittenOff, interrupted: r.Interrupted, durable: r.Durable,
		}),
		frame:   frame,
		sum:     frameSum(frame),
		durable: r.Durable,
	}
}

// live has the records of the sandboxes that are not forgotten, in Seq order. Each sandbox has at
// least one.
type live map[Key][]stored

// superseded returns the record that s replaces, if there is one: of those that say the same as s,
// the ledger keeps the first and the newest.
func (l live) superseded(k Key, s stored) (_ stored, ok bool) {
	first := true
	for _, old := range l[k] {
		if old.says != s.says || old.seq == s.seq {
			continue
		}
		if !first {
			return old, true
		}
		first = false
	}
	return stored{}, false
}

// durable returns the records that outlive a reboot. It includes the first record of each sandbox,
// so that no sandbox is lost if its Begun is.
func (l live) durable() live {
	d := make(live, len(l))
	for k, history := range l {
		for i, s := range history {
			if s.durable || i == 0 {
				d[k] = append(d[k], s)
			}
		}
	}
	return d
}

// lacking returns the durable records that the durable log lacks, in Seq order.
func (l live) lacking(durable []keyed, inLog logContent) (ops []*operation, err error) {
	there := make(map[uint64]bool, len(durable))
	for _, s := range durable {
		there[s.seq] = true
	}
	for k, history := range l.durable() {
		for _, s := range history {
			if there[s.seq] {
				continue
			}
			frame, err := inLog.frame(s)
			if err != nil {
				return nil, err
			}
			ops = append(ops, &operation{key: k, put: &s, frame: bytes.Clone(frame), logged: true}) // a clone doesn't keep the whole log in memory
		}
	}
	slices.SortFunc(ops, func(a, b *operation) int { return cmp.Compare(a.put.seq, b.put.seq) })
	return ops, nil
}

// add adds a record of k in place of the record that it supersedes. It is idempotent.
func (l live) add(k Key, s stored) {
	h := l[k]
	at, found := slices.BinarySearchFunc(h, s.seq, bySeq)
	if found {
		return
	}
	old, superseded := l.superseded(k, s)
	h = slices.Insert(h, at, s)
	if superseded {
		at, _ = slices.BinarySearchFunc(h, old.seq, bySeq)
		h = slices.Delete(h, at, at+1)
	}
	l[k] = h
}

func bySeq(s stored, seq uint64) int { return cmp.Compare(s.seq, seq) }

// sandboxes decodes all records, oldest sandbox first. Records that aren't in memory are in the
// log.
func (l live) sandboxes(inLog logContent) []Sandbox {
	keys := slices.SortedFunc(maps.Keys(l), func(a, b Key) int {
		return cmp.Compare(l[a][0].seq, l[b][0].seq)
	})
	all := make([]Sandbox, 0, len(keys))
	for _, k := range keys {
		sb := Sandbox{Key: k, Records: make([]Record, 0, len(l[k]))}
		for _, s := range l[k] {
			sb.Records = append(sb.Records, inLog.record(k, s))
		}
		all = append(all, sb)
	}
	return all
}

// tombstonesFor returns the tombstones that the durable log lacks for sandboxes that it has.
func (m *image) tombstonesFor(durable *image) (ops []*operation, err error) {
	for k, seq := range m.forgot {
		if !slices.ContainsFunc(durable.records, func(s keyed) bool { return s.key == k && s.seq <= seq && s.seq > durable.forgot[k] }) {
			continue
		}
		frame, err := entry{Forgot: &tombstone{Seq: seq, Key: k}}.frame()
		if err != nil {
			return nil, err
		}
		ops = append(ops, &operation{key: k, frame: frame, logged: true})
	}
	return ops, nil
}

// seqGap is added to the last known sequence number if the log in the state directory is lost or
// damaged, because only that log has the newest numbers. It can't be that far ahead of the durable
// log: each sandbox begins with a durable record and has only some tens of others.
const seqGap = 1 << 20

// replayed is the union of both logs.
type replayed struct {
	live        live
	forgot      map[Key]uint64 // the sandboxes that are certainly forgotten, with their last sequence numbers
	lastSeq     uint64
	bootSeq     uint64 // the first sequence number of the current boot
	bootChanged bool
}

// replay unites both logs. See the package comment for the rules.
func replay(durable, log *image, bootID string) replayed {
	r := replayed{lastSeq: max(durable.lastSeq, log.lastSeq)}
	r.unite(durable, log)
	fresh := !durable.found && !log.found
	if !log.complete && !fresh {
		r.lastSeq += seqGap
	}

	r.bootSeq, r.bootChanged = r.lastSeq+1, !fresh
	for _, h := range []*header{log.header, durable.header} {
		if h != nil && h.BootID == bootID {
			r.bootSeq, r.bootChanged = h.BootSeq, false
			break
		}
	}

	if !log.found && len(r.live) > 0 && !r.bootChanged {
		log.damaged(Key{}, "missing, although the node has not rebooted since it was written")
	}
	if !durable.found && len(r.live) > 0 {
		durable.damaged(Key{}, "missing, although there is a log in the state directory")
	}
	return r
}

func (r *replayed) unite(durable, log *image) {
	r.live, r.forgot = live{}, map[Key]uint64{}
	for _, m := range []*image{durable, log} {
		for k, seq := range m.forgot {
			r.forgot[k] = max(r.forgot[k], seq)
		}
	}
	begun := map[Key]uint64{} // the first record of each sandbox in the durable log
	for _, s := range durable.records {
		if first, ok := begun[s.key]; s.seq > r.forgot[s.key] && (!ok || s.seq < first) {
			begun[s.key] = s.seq
		}
	}
	newest := map[Key]uint64{}
	for _, s := range log.records {
		newest[s.key] = max(newest[s.key], s.seq)
	}
	lacks := map[Key]bool{}
	for _, s := range log.records {
		if _, exists := begun[s.key]; exists || newest[s.key] <= r.forgot[s.key] {
			continue
		}
		if newest[s.key] <= durable.compacted() {
			r.forgot[s.key] = newest[s.key]
		} else if durable.intact() {
			lacks[s.key] = true
		}
	}
	intact := durable.intact()
	for k := range lacks {
		durable.damaged(k, "lacks a sandbox that the log in the state directory has")
	}

	all := slices.Concat(log.records, durable.records)
	slices.SortStableFunc(all, func(a, b keyed) int { return cmp.Compare(a.seq, b.seq) })
	for _, s := range all {
		ofEarlierLife := intact && s.seq < begun[s.key]
		if s.seq > r.forgot[s.key] && !ofEarlierLife {
			r.live.add(s.key, s.stored)
		}
	}
	for k := range r.live {
		delete(r.forgot, k)
	}
}
