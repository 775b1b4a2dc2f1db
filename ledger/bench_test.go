package ledger

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// stepData is as large as what a step usually records.
var stepData = &Data{TypeURL: "podfsm/step", Value: make([]byte, 200)}

// benchDirs puts the log on a tmpfs, as on a real node, and the durable log on the disk of the temporary directory.
func benchDirs(b *testing.B) dirs {
	d := newDirs(b)
	state, err := os.MkdirTemp("/dev/shm", "ledger-bench")
	if err != nil {
		b.Skipf("no tmpfs: %v", err)
	}
	b.Cleanup(func() { os.RemoveAll(state) })
	d.state = state
	return d
}

// BenchmarkAppend appends a record that isn't durable. A sandbox has some twenty in its life.
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

// BenchmarkAppendDurable appends durable records of one sandbox, and of 32 sandboxes in parallel,
// which share syncs. The durable log is on the disk of the temporary directory, or on a tmpfs,
// where a sync is free.
func BenchmarkAppendDurable(b *testing.B) {
	for _, writers := range []int{1, 32} {
		for name, where := range map[string]func(*testing.B) dirs{
			"disk": benchDirs,
			"tmpfs": func(b *testing.B) dirs {
				d := benchDirs(b)
				d.root = d.state + "/root"
				return d
			},
		} {
			b.Run(fmt.Sprintf("%d writers on %s", writers, name), func(b *testing.B) { appendDurable(b, where(b).open(b), writers) })
		}
	}
}

func appendDurable(b *testing.B, l *Ledger, writers int) {
	for i := range writers {
		begin(b, l, key(fmt.Sprint("s", i)))
	}
	var next atomic.Int64
	latencies := make([][]float64, writers)
	var all sync.WaitGroup
	b.ResetTimer()
	for i := range writers {
		all.Go(func() {
			for next.Add(1) <= int64(b.N) {
				begun := time.Now()
				if err := l.Append(b.Context(), &Record{Key: key(fmt.Sprint("s", i)), Kind: CleanupPending, Step: "cni", Data: stepData}); err != nil {
					b.Error(err)
					return
				}
				latencies[i] = append(latencies[i], time.Since(begun).Seconds()*1e6)
			}
		})
	}
	all.Wait()
	b.StopTimer()
	took := slices.Sorted(slices.Values(slices.Concat(latencies...)))
	b.ReportMetric(took[len(took)/2], "p50-µs")
	b.ReportMetric(took[len(took)*99/100], "p99-µs")
}

// BenchmarkRestart opens the ledger of a node with 300 sandboxes of 20 records each.
func BenchmarkRestart(b *testing.B) {
	d := benchDirs(b)
	l := d.open(b)
	fill(b, l)
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		l, err := open(osDisk{}, d.root, d.state, d.bootID)
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

// BenchmarkRewrite rewrites the log of 300 sandboxes with 20 records each.
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
