package ledger

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/internal/roottest"
)

// smallLog returns a log with a header, records and a tombstone, and the offsets at which its frames end.
func smallLog(t testing.TB) (content []byte, ends []int) {
	entries := []entry{
		{Header: &header{Format: format, BootID: "boot-1", BootSeq: 1}},
		{Record: &Record{Seq: 1, Key: key("a"), Kind: Begun, Durable: true}},
		{Record: &Record{Seq: 2, Key: key("b"), Kind: Begun, Durable: true}},
		{Record: &Record{Seq: 3, Key: key("a"), Kind: Intent, Step: "cni", Data: &Data{TypeURL: "x", Value: []byte(magic)}}},
		{Forgot: &tombstone{Seq: 4, Key: key("b")}},
		{Record: &Record{Seq: 5, Key: key("a"), Kind: Done, Step: "cni"}},
	}
	for _, e := range entries {
		frame, err := e.frame()
		require.NoError(t, err)
		content = append(content, frame...)
		ends = append(ends, len(content))
	}
	return content, ends
}

func scan(b []byte) *image {
	m := newImage("log")
	m.found = true
	scanLog(m, b)
	m.finish()
	return m
}

func seqs(records []keyed) []uint64 {
	out := []uint64{}
	for _, r := range records {
		out = append(out, r.seq)
	}
	return out
}

func TestTruncatedLog(t *testing.T) {
	content, ends := smallLog(t)
	all := scan(content)
	require.True(t, all.complete)
	require.Equal(t, []uint64{1, 2, 3, 5}, seqs(all.records))

	for size := range len(content) {
		m := scan(content[:size])
		whole := 0
		for _, r := range all.records {
			if ends[r.seq] <= size {
				whole++
			}
		}
		require.Equal(t, seqs(all.records[:whole]), seqs(m.records), "cut at %d", size)
		atBoundary := slices.Contains(ends, size)
		require.Equal(t, atBoundary, m.complete, "cut at %d: %+v", size, m.damage)
		if !atBoundary && size > 0 {
			require.True(t, m.damage[0].Torn, "cut at %d", size)
		}
	}
}

func TestBitFlipsInLog(t *testing.T) {
	content, ends := smallLog(t)
	all := scan(content)
	for at := range content {
		for bit := range 8 {
			flipped := bytes.Clone(content)
			flipped[at] ^= 1 << bit
			m := scan(flipped)
			require.NotEmpty(t, m.damage, "byte %d bit %d", at, bit)

			// All but the damaged frame is there.
			hit := uint64(slices.IndexFunc(ends, func(end int) bool { return at < end }))
			want := slices.DeleteFunc(slices.Clone(all.records), func(r keyed) bool { return r.seq == hit })
			require.Equal(t, seqs(want), seqs(m.records), "byte %d bit %d: %+v", at, bit, m.damage)
		}
	}
}

func TestDamagedLogs(t *testing.T) {
	content, ends := smallLog(t)
	garbage := slices.Repeat([]byte("garbage"+magic), 20)
	newer, err := entry{Header: &header{Format: format + 1, BootID: "boot-1", LastSeq: 99}}.frame()
	require.NoError(t, err)
	unnumbered, err := entry{Record: &Record{Key: key("a"), Kind: Done}}.frame()
	require.NoError(t, err)
	empty, err := entry{}.frame()
	require.NoError(t, err)

	for name, tc := range map[string]struct {
		log    []byte
		want   []uint64
		reason string
	}{
		"empty":                {log: nil, want: []uint64{}, reason: "empty"},
		"zeros":                {log: make([]byte, 4096), want: []uint64{}, reason: "4096 bytes at offset 0"},
		"no header":            {log: content[ends[0]:], want: []uint64{1, 2, 3, 5}, reason: "header is missing"},
		"newer format":         {log: slices.Concat(newer, content[ends[0]:]), want: []uint64{}, reason: "newer podfsm"},
		"garbage in front":     {log: slices.Concat(garbage, content), want: []uint64{1, 2, 3, 5}, reason: "at offset 0"},
		"garbage in between":   {log: slices.Concat(content[:ends[1]], garbage, content[ends[1]:]), want: []uint64{1, 2, 3, 5}, reason: fmt.Sprint("at offset ", ends[1])},
		"garbage at the end":   {log: slices.Concat(content, garbage), want: []uint64{1, 2, 3, 5}, reason: fmt.Sprint("at offset ", ends[5])},
		"torn in between":      {log: slices.Concat(content[:ends[1]-3], content[ends[1]:]), want: []uint64{2, 3, 5}, reason: "checksum"},
		"huge length at end":   {log: append(bytes.Clone(content), magic+"\xff\xff\xff\xff\x00\x00\x00\x01"...), want: []uint64{1, 2, 3, 5}, reason: "claims 4294967295 bytes"},
		"record without a seq": {log: append(bytes.Clone(content), unnumbered...), want: []uint64{1, 2, 3, 5}, reason: "without sequence number"},
		"frame of nothing":     {log: append(bytes.Clone(content), empty...), want: []uint64{1, 2, 3, 5}, reason: "neither"},
		"same frame twice":     {log: append(bytes.Clone(content), content[ends[0]:ends[1]]...), want: []uint64{1, 2, 3, 5, 1}},
	} {
		t.Run(name, func(t *testing.T) {
			m := scan(tc.log)
			require.Equal(t, tc.want, seqs(m.records))
			require.Equal(t, tc.reason == "", m.complete)
			if tc.reason != "" {
				require.Contains(t, m.damage[0].Reason, tc.reason)
				require.False(t, m.damage[0].Torn)
			}

			// Open reports the damage once, keeps the file aside and writes a new one.
			d := newDirs(t)
			require.NoError(t, os.MkdirAll(d.state, 0o700))
			require.NoError(t, os.WriteFile(d.log(), tc.log, 0o600))
			l := d.open(t)
			if tc.reason != "" {
				require.Equal(t, d.log()+".damaged-1", kept(t, l, d.log()))
				aside, err := os.ReadFile(d.log() + ".damaged-1")
				require.NoError(t, err)
				require.Equal(t, string(tc.log), string(aside))
			}
			want := lines(l.Sandboxes())
			begin(t, l, key("next"))
			require.NoError(t, l.Close())
			l = d.open(t)
			require.Empty(t, l.Damage())
			require.Equal(t, append(want, "next begun"), lines(l.Sandboxes()))
		})
	}
}

// kept returns where the damaged bytes of a file are.
func kept(t *testing.T, l *Ledger, file string) string {
	for _, damage := range l.Damage() {
		if damage.File == file {
			return damage.Kept
		}
	}
	t.Fatalf("no damage of %s: %+v", file, l.Damage())
	return ""
}

func TestFewDamagedFilesAreKept(t *testing.T) {
	d := newDirs(t)
	for range 3 * keptAside {
		l := d.open(t)
		begin(t, l, key("a"))
		require.NoError(t, l.Close())
		f, err := os.OpenFile(d.log(), os.O_WRONLY|os.O_APPEND, 0)
		require.NoError(t, err)
		_, err = f.WriteString("garbage")
		require.NoError(t, err)
		require.NoError(t, f.Close())
	}
	d.open(t)
	aside, err := filepath.Glob(d.log() + ".damaged-*")
	require.NoError(t, err)
	require.Len(t, aside, keptAside)
	require.Contains(t, aside, fmt.Sprintf("%s.damaged-%d", d.log(), 3*keptAside))
}

func TestLogIsRewritten(t *testing.T) {
	ctx := context.Background()
	d := newDirs(t)
	l := d.open(t)
	big := &Data{TypeURL: "big", Value: make([]byte, 256<<10)}
	begin(t, l, key("stays"))
	var largest, smallest int64 = 0, 1 << 60
	for i := range 40 {
		k := key(fmt.Sprint("s", i))
		begin(t, l, k)
		mustAppend(t, l, &Record{Key: k, Kind: Intent, Data: big})
		require.NoError(t, l.Forget(ctx, k))
		info, err := os.Stat(d.log())
		require.NoError(t, err)
		largest, smallest = max(largest, info.Size()), min(smallest, info.Size())
	}
	require.Less(t, largest, int64(logSlack+1<<20))
	require.Less(t, smallest, int64(1<<20))
	require.Equal(t, []string{"stays begun"}, lines(l.Sandboxes()))
	require.Equal(t, []string{"stays begun"}, lines(d.image(t).open(t).Sandboxes()))

	require.NoError(t, l.Close())
	d.open(t)
	info, err := os.Stat(d.log())
	require.NoError(t, err)
	require.Less(t, info.Size(), int64(1<<10), "Open rewrites it too")
}

// A log of mostly live records is not rewritten with each append.
func TestLogRewritesAreRare(t *testing.T) {
	d := newDirs(t)
	l := d.open(t)
	k := key("a")
	begin(t, l, k)
	rewrites := 0
	inode := func() uint64 {
		var st unix.Stat_t
		require.NoError(t, unix.Stat(d.log(), &st))
		return st.Ino
	}
	for i, last := 0, inode(); i < 100; i++ { // 10 MiB that live
		mustAppend(t, l, &Record{Key: k, Kind: Noted, Step: fmt.Sprint(i), Data: &Data{Value: make([]byte, 75<<10)}})
		if now := inode(); now != last {
			last = now
			rewrites++
		}
	}
	require.Contains(t, []int{1, 2}, rewrites)
	require.Len(t, lines(l.Sandboxes()), 101)
	require.Equal(t, l.Sandboxes(), d.image(t).open(t).Sandboxes(), "no record was lost in a rewrite")
}

// tinyTmpfs mounts a tmpfs of a few pages on the directory.
func tinyTmpfs(t *testing.T, dir, size string) {
	t.Helper()
	roottest.Require(t)
	require.NoError(t, os.MkdirAll(dir, 0o700))
	require.NoError(t, unix.Mount("ledger-test", dir, "tmpfs", 0, "size="+size))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
}

func TestFullStateDir(t *testing.T) {
	ctx := context.Background()
	d := newDirs(t)
	tinyTmpfs(t, d.state, "64k")
	l := d.open(t)
	begin(t, l, key("a"))

	var err error
	appended := 0
	for ; err == nil && appended < 100; appended++ {
		err = l.Append(ctx, &Record{Key: key("a"), Kind: Noted, Step: fmt.Sprint(appended), Data: &Data{Value: make([]byte, 3000)}})
	}
	require.True(t, errdefs.IsResourceExhausted(err), "%v", err)
	require.ErrorIs(t, err, unix.ENOSPC)
	require.Contains(t, err.Error(), d.log())
	require.Len(t, lines(l.Sandboxes()), appended)
	require.NoError(t, l.Close())

	// A restart has no room to rewrite the log. It goes on with the old one.
	l = d.open(t)
	require.Empty(t, l.Damage())
	require.Len(t, lines(l.Sandboxes()), appended)
	require.NoFileExists(t, d.log()+".new")
	require.True(t, errdefs.IsResourceExhausted(
		l.Append(ctx, &Record{Key: key("a"), Kind: Noted, Step: "big", Data: &Data{Value: make([]byte, 30000)}})))

	// The operator makes room.
	require.NoError(t, unix.Mount("ledger-test", d.state, "tmpfs", unix.MS_REMOUNT, "size=256k"))
	mustAppend(t, l, &Record{Key: key("a"), Kind: Done, Step: "after"})
	require.NoError(t, l.Close())
	l = d.open(t)
	require.Empty(t, l.Damage())
	require.Contains(t, lines(l.Sandboxes()), "a done after")
}

// The durable log decides which sandboxes exist. So its tombstone suffices if the other log has no
// room for one.
func TestForgetWithoutRoomInTheLog(t *testing.T) {
	ctx := context.Background()
	d := newDirs(t)
	l := d.open(t)
	begin(t, l, key("a"))
	mustAppend(t, l, &Record{Key: key("a"), Kind: Intent, Step: "cni"})
	l.spy().fail = unix.ENOSPC
	require.Error(t, l.Append(ctx, &Record{Key: key("b"), Kind: Begun}), "it may be there in spite of the error")
	for _, id := range []string{"a", "b"} {
		require.NoError(t, l.Forget(ctx, key(id)))
	}
	require.Empty(t, l.Sandboxes())
	require.NoError(t, l.Close())
	l = d.open(t)
	require.Empty(t, l.Sandboxes())
	require.Empty(t, l.Damage())
	require.NoError(t, l.Close())
}

func TestFullRootDir(t *testing.T) {
	ctx := context.Background()
	d := newDirs(t)
	tinyTmpfs(t, d.root, "128k")
	l := d.open(t)
	big := &Data{TypeURL: "spec", Value: make([]byte, 4000)}
	var err error
	begun := 0
	for ; err == nil && begun < 100; begun++ {
		err = l.Append(ctx, &Record{Key: key(fmt.Sprint("s", begun)), Kind: Begun, Data: big})
	}
	require.True(t, errdefs.IsResourceExhausted(err), "%v", err)
	mustAppend(t, l, &Record{Key: key("s0"), Kind: Done, Step: "cni"}) // the log has room
	waits := &Record{Key: key("s1"), Kind: Noted, Durable: true, CanWait: true}
	mustAppend(t, l, waits)
	require.True(t, errdefs.IsResourceExhausted(l.Append(ctx, &Record{Key: key("s1"), Kind: CleanupPending, Data: &Data{Value: make([]byte, 200<<10)}})))
	require.Len(t, l.waiting, 1, "it waits on")

	require.NoError(t, unix.Mount("ledger-test", d.root, "tmpfs", unix.MS_REMOUNT, "size=512k"))
	for i := range begun {
		require.NoError(t, l.Forget(ctx, key(fmt.Sprint("s", i))), "it works again when there is room")
	}
	begin(t, l, key("next"))
	require.NoError(t, l.Close())
	l = d.open(t)
	require.Empty(t, l.Damage())
	require.Equal(t, []string{"next begun"}, lines(l.Sandboxes()))
}

// A pod can't forge a frame: the search in a damaged log never takes a pod's data for one.
func TestHostileDataIsNoFrame(t *testing.T) {
	forged, err := entry{Forgot: &tombstone{Seq: 1 << 40, Key: key("victim")}}.frame()
	require.NoError(t, err)
	d := newDirs(t)
	l := d.open(t)
	begin(t, l, key("victim"))
	mustAppend(t, l, &Record{Key: key("victim"), Kind: Done, Error: string(forged), Step: string(forged), TraceParent: string(forged),
		Data: &Data{TypeURL: string(forged), Value: forged}})
	require.NoError(t, l.Close())

	content, err := os.ReadFile(d.log())
	require.NoError(t, err)
	last := bytes.LastIndex(content, []byte(magic))
	content[last] ^= 1
	require.NoError(t, os.WriteFile(d.log(), content, 0o600))
	require.Equal(t, []string{"victim begun"}, lines(d.open(t).Sandboxes()))
}

func FuzzReplay(f *testing.F) {
	content, ends := smallLog(f)
	f.Add(content, content)
	f.Add([]byte{}, content[:len(content)-5])
	f.Add(content[:ends[2]], slices.Concat(content[:ends[1]], []byte("garbage"+magic), content[ends[1]:]))
	f.Add([]byte(strings.Repeat(magic, 100)), content)
	f.Fuzz(func(t *testing.T, inDurable, inLog []byte) {
		durable, log := scan(inDurable).inMemory(), scan(inLog)
		r := replay(durable, log, "boot-1")

		// What was decoded can be encoded and decoded again.
		file, err := os.CreateTemp(t.TempDir(), "")
		require.NoError(t, err)
		defer file.Close()
		_, size, err := logged{header: header{Format: format, LastSeq: r.lastSeq}, live: r.live, frame: log.content.frame}.write(file)
		require.NoError(t, err)
		again, err := os.ReadFile(file.Name())
		require.NoError(t, err)
		require.Len(t, again, int(size))
		m := scan(again)
		require.True(t, m.complete, "%+v", m.damage)
		require.Equal(t, r.live.sandboxes(log.content), replay(newImage("durable"), m, "boot-1").live.sandboxes(m.content))
	})
}
