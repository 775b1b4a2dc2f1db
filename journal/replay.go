package journal

import (
	"bytes"
	"cmp"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"strings"
)

// image is one of the two files as it was found.
type image struct {
	path     string
	found    bool
	header   *header // nil if it could not be read
	newer    bool    // written in a later format than ours: nothing of it is used
	records  []keyed
	content  logContent     // if it is the log's: the records' frames are there
	forgot   map[Key]uint64 // highest tombstone of each key
	lastSeq  uint64         // highest sequence number seen
	damage   []Damage
	complete bool // found, and nothing of it is damaged
}

func newImage(path string) *image { return &image{path: path, forgot: map[Key]uint64{}} }

func (m *image) damaged(k Key, format string, args ...any) {
	m.damage = append(m.damage, Damage{File: m.path, Key: k, Reason: fmt.Sprintf(format, args...)})
}

// keptAs notes where the damaged file is kept.
func (m *image) keptAs(path string) {
	for i := range m.damage {
		m.damage[i].Kept = path
	}
}

// take files one decoded frame.
func (m *image) take(e entry, frame []byte) {
	switch {
	case e.Header != nil:
		m.header = e.Header
		m.lastSeq = max(m.lastSeq, e.Header.LastSeq)
	case e.Record != nil:
		m.records = append(m.records, keyed{e.Record.Key, newStored(e.Record, frame)})
		m.lastSeq = max(m.lastSeq, e.Record.Seq)
	case e.Forgot != nil:
		m.forgot[e.Forgot.Key] = max(m.forgot[e.Forgot.Key], e.Forgot.Seq)
		m.lastSeq = max(m.lastSeq, e.Forgot.Seq)
	}
}

// takeAt files one decoded frame, which is where the log's content has it.
func (m *image) takeAt(e entry, frame []byte, at int64) {
	m.take(e, frame)
	if e.Record != nil {
		last := &m.records[len(m.records)-1]
		last.stored = last.loggedAt(at)
	}
}

// finish makes the verdict on a file that was found, when all of it has been read.
func (m *image) finish() {
	if m.header != nil && m.header.Format > format {
		m.newer, m.records, m.forgot = true, nil, nil
		m.damaged(Key{}, "written in format %d by a newer podfsm; this one reads up to %d", m.header.Format, format)
	}
	if m.header == nil && len(m.damage) == 0 {
		m.damaged(Key{}, "header is missing")
	}
	m.complete = len(m.damage) == 0
}

// stored is one record as the ledger keeps it in memory: what it is sorted by, and where its frame is, to rewrite the files with.
type stored struct {
	seq     uint64
	says    uint64 // equal for records that say the same
	frame   []byte // nil if it stands in the log
	at      int64  // where it stands there
	sum     uint32 // its checksum
	durable bool
}

// loggedAt is the record once its frame stands in the log.
func (s stored) loggedAt(at int64) stored {
	s.frame, s.at = nil, at
	return s
}

// keyed is a record and whose it is.
type keyed struct {
	key Key
	stored
}

// saying is what makes two records of a sandbox say the same.
type saying struct {
	kind               Kind
	step, goal, claim  string
	from, event, state string
	holds              string
	atStop             bool
	typeURL, value     string
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
			durable: r.Durable,
		}),
		frame:   frame,
		sum:     frameSum(frame),
		durable: r.Durable,
	}
}

// live holds the records of the sandboxes that are not forgotten: of each at least one, in Seq order.
type live map[Key][]stored

// superseded returns the record between the first and the newest of those that say what s says, if there is one:
// once s is added nobody needs it.
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

// lacking are the durable records that aren't among those of ledger.db, in Seq order.
func (l live) lacking(inDB []keyed, inLog logContent) (ops []*operation, err error) {
	there := make(map[uint64]bool, len(inDB))
	for _, s := range inDB {
		there[s.seq] = true
	}
	for k, history := range l {
		for _, s := range history {
			if !s.durable || there[s.seq] {
				continue
			}
			frame, err := inLog.frame(s)
			if err != nil {
				return nil, err
			}
			ops = append(ops, &operation{key: k, put: &s, frame: bytes.Clone(frame)}) // clone: it must not hold the whole log in memory
		}
	}
	slices.SortFunc(ops, func(a, b *operation) int { return cmp.Compare(a.put.seq, b.put.seq) })
	return ops, nil
}

// add files a record of k, which replaces what it supersedes. Adding a record twice is adding it once.
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

// sandboxes decodes all records, oldest sandbox first. Those that aren't in memory are in the log.
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

// seqGap is added to the last known sequence number when the log, which alone knows the newest, is lost or damaged.
// Each sandbox begins with a durable record and has some tens of others, so the log cannot be this far ahead of ledger.db.
const seqGap = 1 << 20

// replayed is what both files say together.
type replayed struct {
	live        live
	lastSeq     uint64
	bootSeq     uint64 // first sequence number of the present boot
	bootChanged bool
}

// replay unites both files. See the package comment for the rules.
func replay(durable, log *image, bootID string) replayed {
	r := replayed{live: unite(durable, log), lastSeq: max(durable.lastSeq, log.lastSeq)}
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
		durable.damaged(Key{}, "missing, although there is a log")
	}
	return r
}

func unite(durable, log *image) live {
	begun := map[Key]uint64{} // of each sandbox that exists: its first durable record
	for _, s := range durable.records {
		if first, ok := begun[s.key]; !ok || s.seq < first {
			begun[s.key] = s.seq
		}
	}
	all := slices.Concat(durable.records, log.records)
	slices.SortStableFunc(all, func(a, b keyed) int { return cmp.Compare(a.seq, b.seq) })

	l := live{}
	for _, s := range all {
		if s.seq <= log.forgot[s.key] {
			continue
		}
		if first, exists := begun[s.key]; durable.complete && (!exists || s.seq < first) {
			continue // of a sandbox that was forgotten, or of an earlier one with the same id
		}
		l.add(s.key, s.stored)
	}
	return l
}
