package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/tools/page"
)

// The rows of a table by what they are compared with.
const (
	rowChown         = 0
	rowChownMetacopy = 1
	rowIDMap         = 2
	rowMetacopy      = 4
)

func text(machine string, rounds int, results [][]series) string {
	var b strings.Builder
	fmt.Fprintf(&b, `# What owners cost

A pod with a user namespace needs the files of its image under its own ids. This page shows what
that costs by three methods: `+"`chown -R`"+` on an overlay, as containerd does without idmapped mounts;
the same on an overlay with metacopy=on; and each strategy of podfsm's snapshotter, for the first
pod of an image and for the next one with the same ids. The images are synthetic and have three
layers each. Their sizes and inodes are those for which a gain by metacopy was published: ×42 for
tensorflow.

%s
- **time**: that of chown; with podfsm, from the request for a snapshot to its mount. On an overlay
  with all defaults, as in the first row, the kernel syncs each file that it copies. The overlays of
  the second row and of podfsm are volatile.
- **CPU**: of the processes that do the work, without the kernel's threads that write to disk.
- **disk, inodes**: what du(1) counts afterwards and not before. On ext4 with inodes of 256 bytes,
  the default, the mark of a file without content doesn't fit into its inode. The mark goes to a
  block that up to 1024 files share, and du counts that block for each of them: metacopy takes
  almost no space.
`, page.Wrap(fmt.Sprintf("`make bench-remap` writes this page. Machine: %s. Each cell is the median of %d rounds, in which "+
		"all methods take turns. The fastest round is in parentheses.", machine, rounds), ""))
	for i, img := range published {
		b.WriteString("\n" + table(img, results[i]))
	}
	b.WriteString("\n## Aims\n\n" + page.Head(append([]string{"aim"}, names()...)...))
	for _, a := range aims {
		cells := []string{a.name}
		for _, r := range results {
			cells = append(cells, a.result(r))
		}
		b.WriteString(page.Row(cells...))
	}
	return b.String()
}

func names() (names []string) {
	for _, img := range published {
		names = append(names, img.name)
	}
	return names
}

func table(img image, rows []series) string {
	var b strings.Builder
	fmt.Fprintf(&b, "## %s: %.0f MiB, %d inodes\n\nPublished: %.2f s copied, %.2f s with metacopy, ratio %.0f.\n\n", img.name, mib(img.bytes), img.inodes, img.copied, img.meta, img.copied/img.meta)
	b.WriteString(page.Head("method", "time", "CPU", "disk", "inodes", "ratio"))
	for _, row := range rows {
		last := row.costs[len(row.costs)-1]
		b.WriteString(page.Row(row.name, fmt.Sprintf("%s (%s)", seconds(row.wall()), seconds(row.best())), seconds(row.cpu()),
			fmt.Sprintf("%.1f MiB", mib(last.bytes)), fmt.Sprint(last.inodes), times(ratio(rows[rowChown], row))))
	}
	return b.String()
}

// aim is the target of the snapshotter.
type aim struct {
	name   string
	result func(rows []series) string
}

const soon = 20 * time.Millisecond

var aims = []aim{
	{"idmap under 20 ms", func(rows []series) string {
		return result(rows[rowIDMap].wall() < soon, seconds(rows[rowIDMap].wall()))
	}},
	{"metacopy at most 0.7 of `chown -R` on the same overlay", func(rows []series) string {
		part := 1 / ratio(rows[rowChownMetacopy], rows[rowMetacopy])
		return result(part <= 0.7, fmt.Sprintf("%.2f", part))
	}},
	{"second pod under 20 ms, the slowest strategy", func(rows []series) string {
		slowest := max(rows[rowIDMap+1].wall(), rows[rowMetacopy+1].wall(), rows[rowMetacopy+3].wall())
		return result(slowest < soon, seconds(slowest))
	}},
}

func result(met bool, figure string) string {
	if met {
		return figure
	}
	return "**missed**: " + figure
}

// ratio returns the median of the ratios of the rounds: the machine may be busier in one round than
// in the next.
func ratio(slow, quick series) float64 {
	ratios := make([]float64, len(slow.costs))
	for round := range ratios {
		ratios[round] = float64(slow.costs[round].wall) / float64(quick.costs[round].wall)
	}
	slices.Sort(ratios)
	return ratios[len(ratios)/2]
}

func times(ratio float64) string {
	if ratio < 10 {
		return fmt.Sprintf("%.1f", ratio)
	}
	return fmt.Sprintf("%.0f", ratio)
}

func seconds(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	}
	return fmt.Sprintf("%.2f s", d.Seconds())
}

func mib(bytes int64) float64 { return float64(bytes) / (1 << 20) }

// machine describes this machine as far as it matters to a filesystem.
func machine(dir string) (string, error) {
	var stat unix.Stat_t
	if err := unix.Stat(dir, &stat); err != nil {
		return "", err
	}
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return unix.Mkdev(uint32(m.Major), uint32(m.Minor)) != stat.Dev, false
	})
	if err != nil {
		return "", err
	}
	if len(mounts) == 0 {
		return "", fmt.Errorf("failed to find the mount of %q", dir)
	}
	return fmt.Sprintf("%s, %s, with a load of %s by others when it began", page.Machine(), mounts[0].FSType, page.Load()), nil
}
