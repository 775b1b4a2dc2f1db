package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf16"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/apimachinery/pkg/util/duration"
)

// absent stands for a missing value, so that every cell of a table has a word.
const absent = "-"

// style is the look of a row on a terminal.
type style string

const (
	plain  style = ""
	red    style = "31"
	yellow style = "33"
)

func (s style) paint(text string) string {
	if s == plain {
		return text
	}
	return "\x1b[" + string(s) + "m" + text + "\x1b[0m"
}

// coloured reports whether w is a terminal that shows colours. NO_COLOR disables them
// (https://no-color.org).
func coloured(w io.Writer) bool {
	file, ok := w.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	return err == nil
}

// table aligns rows of cells, and makes their texts safe for a terminal.
type table struct {
	into     *bytes.Buffer
	text     bytes.Buffer
	rows     *tabwriter.Writer
	styles   []style // of the rows
	coloured bool
}

func newTable(b *bytes.Buffer, header ...string) *table {
	t := &table{into: b}
	t.rows = tabwriter.NewWriter(&t.text, 0, 0, 2, ' ', 0)
	if len(header) > 0 {
		t.row(header...)
	}
	return t
}

func (t *table) row(cells ...string) { t.styled(plain, cells...) }

// styled adds a row in a style, which a coloured table shows.
func (t *table) styled(s style, cells ...string) {
	texts := make([]string, 0, len(cells))
	for _, cell := range cells {
		texts = append(texts, cmp.Or(printable(cell), absent))
	}
	fmt.Fprintln(t.rows, strings.Join(texts, "\t"))
	t.styles = append(t.styles, s)
}

func (t *table) flush() {
	t.rows.Flush()
	if !t.coloured {
		t.into.Write(t.text.Bytes())
		return
	}
	row := 0
	for line := range strings.Lines(t.text.String()) {
		t.into.WriteString(t.styles[row].paint(strings.TrimSuffix(line, "\n")) + "\n")
		row++
	}
}

// printable escapes characters that could move the cursor, reorder text or break a line. Names and
// error texts come from pods, images and CNI plugins.
func printable(s string) string {
	var b strings.Builder
	for _, r := range s {
		if strconv.IsPrint(r) {
			b.WriteRune(r)
		} else {
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		}
	}
	return b.String()
}

// cut escapes a text as printable does, and shortens it to a number of characters.
func cut(text string, most int) string {
	runes := []rune(printable(text))
	if len(runes) > most {
		runes = append(runes[:most-1], '…')
	}
	return string(runes)
}

// pad returns a text of exactly this width. It cuts out the middle of a longer text, whose end says
// the most.
func pad(text string, width int) string {
	runes := []rune(text)
	if over := len(runes) - width; over > 0 {
		runes = slices.Concat(runes[:width/2-1], []rune("…"), runes[width/2+over:])
	}
	return string(runes) + strings.Repeat(" ", width-len(runes))
}

// addHanging adds a text in lines of at most this width. Lines after the first one are indented.
func addHanging(b *bytes.Buffer, text, indent string, width int) {
	for i, line := range wrap(text, width, width-len(indent)) {
		if i > 0 {
			b.WriteString(indent)
		}
		b.WriteString(line + "\n")
	}
}

// wrap breaks a text at spaces, and a word that is longer than a line anywhere. The first line may
// have another width.
func wrap(text string, first, rest int) []string {
	var lines []string
	runes, width := []rune(text), first
	for len(runes) > width {
		at := width
		for at > width/2 && runes[at] != ' ' {
			at--
		}
		if runes[at] != ' ' {
			at = width
		}
		lines = append(lines, strings.TrimRight(string(runes[:at]), " "))
		for runes = runes[at:]; len(runes) > 0 && runes[0] == ' '; {
			runes = runes[1:]
		}
		width = rest
	}
	return append(lines, string(runes))
}

// text may contain text of pods, images and plugins. Characters that could control a terminal, or
// reorder or hide text, are escaped; line breaks stay.
type text string

// String returns the text for a terminal, or for html/template, which escapes it for HTML.
func (t text) String() string {
	lines := strings.Split(string(t), "\n")
	for i, line := range lines {
		lines[i] = printable(strings.ReplaceAll(line, "\t", "    "))
	}
	return strings.Join(lines, "\n")
}

// complain writes a message beside a command's output.
func complain(w io.Writer, format string, args ...any) {
	fmt.Fprintf(w, "podfsm: %v\n", text(fmt.Sprintf(format, args...)))
}

// writeJSON writes m indented, with every field, by the names of the proto3 JSON mapping.
func writeJSON(w io.Writer, m proto.Message) error {
	compact, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		return err
	}
	// protojson varies its white space on purpose.
	var b bytes.Buffer
	if err := json.Indent(&b, printableJSON(compact), "", "  "); err != nil {
		return err
	}
	b.WriteByte('\n')
	_, err = w.Write(b.Bytes())
	return err
}

// writeJSONLine writes m as JSON on one line.
func writeJSONLine(w io.Writer, m proto.Message) error {
	varied, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		return err
	}
	line, err := json.Marshal(json.RawMessage(varied)) // protojson varies its white space on purpose
	if err != nil {
		return err
	}
	_, err = w.Write(append(printableJSON(line), '\n'))
	return err
}

// printableJSON escapes characters in JSON without line breaks as [printable] does. The marshallers
// escape only those of ASCII.
func printableJSON(compact []byte) []byte {
	var b bytes.Buffer
	for _, r := range string(compact) {
		if strconv.IsPrint(r) {
			b.WriteRune(r)
			continue
		}
		for _, unit := range utf16.Encode([]rune{r}) {
			fmt.Fprintf(&b, "\\u%04x", unit)
		}
	}
	return b.Bytes()
}

// age returns the time from ts to now in the format of kubectl, as "5m12s".
func age(ts *timestamppb.Timestamp, now time.Time) string {
	if ts == nil {
		return absent
	}
	return duration.HumanDuration(now.Sub(ts.AsTime()))
}

// instant returns ts in the time zone of now, in milliseconds.
func instant(ts *timestamppb.Timestamp, now time.Time) string {
	if ts == nil {
		return absent
	}
	return ts.AsTime().In(now.Location()).Format("2006-01-02T15:04:05.000Z07:00")
}

// between returns the time from one to the other.
func between(from, to *timestamppb.Timestamp) string {
	if from == nil || to == nil {
		return absent
	}
	return span(to.AsTime().Sub(from.AsTime()))
}

// span returns d with three or four significant digits.
func span(d time.Duration) string {
	if d < time.Second {
		return d.Round(100 * time.Microsecond).String()
	}
	return d.Round(10 * time.Millisecond).String()
}
