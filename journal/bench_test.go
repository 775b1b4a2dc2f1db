package journal

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"
	"testing"
)

// stepData is as large as what a step usually records.
var stepData = &Data{TypeURL: "podfsm/step", Value: make([]byte, 200)}

// benchDirs puts the log on a tmpfs, as on a real node, and ledger.db on the disk of the temporary directory.
func benchDirs(b *testing.B) dirs {
	d := newDirs(b)
	state, err := os.MkdirTemp("/dev/shm", "journal-bench")
	if err != nil {
		b.Skipf("no tmpfs: %v", err)
	}
	b.Cleanup(func() { os.RemoveAll(state) })
	d.state = state
	return d
}

// BenchmarkAppend is a plain record, with the life of a sandbox being some twenty of them.
func BenchmarkAppend(b *testing.B) {
	ctx := context.Background()
	l := benchDirs(b).open(b)
	begin(b, l, key("a"))
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		r := &Record{Key: key("a"), Kind: Done, Step: "cni", Event: "network", State: fmt.Sprint(i % 20), Data: stepData}
		if err := l.Append(ctx, r); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAppendDurable(b *testing.B) {
	ctx := context.Background()
	l := benchDirs(b).open(b)
	begin(b, l, key("a"))
	for b.Loop() {
		if err := l.Append(ctx, &Record{Key: key("a"), Kind: Owed, Step: "cni", Data: stepData}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkAppendDurableParallel is fifty sandboxes at a time, which share their fsyncs.
func BenchmarkAppendDurableParallel(b *testing.B) {
	ctx := context.Background()
	l := benchDirs(b).open(b)
	var n atomic.Int64
	b.SetParallelism(25) // times GOMAXPROCS
	b.RunParallel(func(pb *testing.PB) {
		k := key(fmt.Sprint("s", n.Add(1)))
		begin(b, l, k)
		for pb.Next() {
			if err := l.Append(ctx, &Record{Key: k, Kind: Owed, Step: "cni", Data: stepData}); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

// BenchmarkRestart is a restart of a node with 300 sandboxes of 20 records.
func BenchmarkRestart(b *testing.B) {
	d := benchDirs(b)
	l := d.open(b)
	fill(b, l)
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		l, err := open(d.root, d.state, d.bootID)
		if err != nil {
			b.Fatal(err)
		}
		if n := len(l.Sandboxes()); n != 300 {
			b.Fatal("sandboxes: ", n)
		}
		if err := l.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkRewrite is one of the log, of 300 sandboxes of 20 records.
func BenchmarkRewrite(b *testing.B) {
	l := benchDirs(b).open(b)
	fill(b, l)
	for b.Loop() {
		l.log.limit = 0
		mustAppend(b, l, &Record{Key: key("s0"), Kind: Done, Step: "again", Data: stepData})
	}
}

func fill(b *testing.B, l *Ledger) {
	for i := range 300 {
		k := key(fmt.Sprint("s", i))
		begin(b, l, k)
		for j := range 20 {
			mustAppend(b, l, &Record{Key: k, Kind: Done, Step: fmt.Sprint(j), Data: stepData})
		}
	}
}
