package main

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The measured part of the page stands between these lines; what is around it is written by hand and stays.
const (
	beginMark = "<!-- what follows is written by make bench -->\n"
	endMark   = "<!-- what precedes is written by make bench -->\n"
)

// write puts the table into the page, and the plot beside it.
func (r *results) write(page, machine string) error {
	text, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	before, rest, begins := bytes.Cut(text, []byte(beginMark))
	_, after, ends := bytes.Cut(rest, []byte(endMark))
	if !begins || !ends {
		return fmt.Errorf("%s has no place for the table: put the lines %q and %q there", page, strings.TrimSpace(beginMark), strings.TrimSpace(endMark))
	}
	measured := fmt.Sprintf("%s%s\n%s\n%s%s", before, beginMark, r.table(machine), endMark, after)
	if err := os.WriteFile(page, []byte(measured), 0o644); err != nil {
		return err
	}
	return os.WriteFile(strings.TrimSuffix(page, ".md")+".svg", []byte(r.plot()), 0o644)
}

// describeMachine says what the figures depend on.
func describeMachine(load string, took time.Duration, o options) string {
	var name unix.Utsname
	var memory unix.Sysinfo_t
	_, _ = unix.Uname(&name), unix.Sysinfo(&memory) // neither fails
	return fmt.Sprintf("Linux %s, %d cores, %d GiB of memory, %s; %d rounds in %.0f s; load average %s before, %s after (one for each process that wants to run).\n",
		strings.SplitN(unix.ByteSliceToString(name.Release[:]), "-", 2)[0], runtime.NumCPU(), memory.Totalram*uint64(memory.Unit)>>30, runtime.Version(),
		o.rounds, took.Seconds(), load, loadAverage())
}

// loadAverage is that of the last minute.
func loadAverage() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "?"
	}
	return strings.Fields(string(text))[0]
}
