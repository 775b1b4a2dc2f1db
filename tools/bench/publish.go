package main

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/tools/page"
)

// write writes the tables into the page, and the plot beside it.
func (r *results) write(file, machine string) error {
	if err := page.Replace(file, "make bench", r.table(machine)); err != nil {
		return err
	}
	return os.WriteFile(strings.TrimSuffix(file, ".md")+".svg", []byte(r.plot()), 0o644)
}

// describeMachine describes the machine of the measurement.
func describeMachine(load string, took time.Duration, o options) string {
	var memory unix.Sysinfo_t
	_ = unix.Sysinfo(&memory) // it can't fail
	return page.Wrap(fmt.Sprintf("%s, %d GiB of memory, %s; %d rounds in %.0f s; load average %s before, %s after (one for each process that wants to run).",
		page.Machine(), memory.Totalram*uint64(memory.Unit)>>30, runtime.Version(), o.rounds, took.Seconds(), load, page.Load()), "")
}
