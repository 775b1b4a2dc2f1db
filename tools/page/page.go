// Package page writes measured results into pages of the docs.
package page

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// Head returns the head of a Markdown table with these columns.
func Head(columns ...string) string {
	return Row(columns...) + "|" + strings.Repeat("---|", len(columns)) + "\n"
}

// Row returns a row of a Markdown table.
func Row(cells ...string) string { return "| " + strings.Join(cells, " | ") + " |\n" }

// width is the number of columns at which pages wrap.
const width = 100

// Wrap wraps a paragraph or a list item. The lines after the first begin with indent.
func Wrap(text, indent string) string {
	var b strings.Builder
	column := 0
	for i, word := range strings.Fields(text) {
		length := utf8.RuneCountInString(word)
		switch {
		case i == 0:
		case column+1+length > width:
			b.WriteString("\n" + indent)
			column = utf8.RuneCountInString(indent)
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += length
	}
	return b.String() + "\n"
}

// Replace replaces the text between the two marks of a command in a page, such as "make bench".
func Replace(file, command, text string) error {
	begin, end := marks(command)
	old, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, rest, begins := bytes.Cut(old, []byte(begin))
	_, after, ends := bytes.Cut(rest, []byte(end))
	if !begins || !ends {
		return fmt.Errorf("failed to find the marks in %q: add the lines %q and %q", file, strings.TrimSpace(begin), strings.TrimSpace(end))
	}
	return os.WriteFile(file, fmt.Appendf(nil, "%s%s\n%s\n%s%s", before, begin, text, end, after), 0o644)
}

func marks(command string) (begin, end string) {
	return "<!-- what follows is written by " + command + " -->\n", "<!-- what precedes is written by " + command + " -->\n"
}

// Machine returns the kernel and the number of processors, on which the numbers depend.
func Machine() string {
	var name unix.Utsname
	_ = unix.Uname(&name) // it can't fail
	release, _, _ := strings.Cut(unix.ByteSliceToString(name.Release[:]), "-")
	return fmt.Sprintf("Linux %s, %d cores", release, runtime.NumCPU())
}

// Load returns the load average of the last minute: the number of processes that want to run.
func Load() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "?"
	}
	load, _, _ := strings.Cut(string(text), " ")
	return load
}
