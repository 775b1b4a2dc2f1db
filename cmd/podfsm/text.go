package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/apimachinery/pkg/util/duration"
)

// absent stands for a value that there isn't, so that every table cell has a
// word in it.
const absent = "-"

// table aligns rows of cells; it makes the cells' texts safe for a terminal.
type table struct {
	rows *tabwriter.Writer
}

func newTable(b *bytes.Buffer, header ...string) *table {
	t := &table{rows: tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)}
	if len(header) > 0 {
		t.row(header...)
	}
	return t
}

func (t *table) row(cells ...string) {
	texts := make([]string, 0, len(cells))
	for _, cell := range cells {
		texts = append(texts, cmp.Or(printable(cell), absent))
	}
	fmt.Fprintln(t.rows, strings.Join(texts, "\t"))
}

func (t *table) flush() {
	t.rows.Flush()
}

// printable escapes what could move the cursor, reorder text or break a line.
// Names and error texts come from pods, images and CNI plugins.
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

// writeJSON writes m indented, with every field, under the names of the proto3
// JSON mapping.
func writeJSON(w io.Writer, m proto.Message) error {
	compact, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		return err
	}
	// protojson varies its white space on purpose.
	var b bytes.Buffer
	if err := json.Indent(&b, compact, "", "  "); err != nil {
		return err
	}
	b.WriteByte('\n')
	_, err = w.Write(b.Bytes())
	return err
}

// age is the time from ts to now in kubectl's format, as "5m12s".
func age(ts *timestamppb.Timestamp, now time.Time) string {
	if ts == nil {
		return absent
	}
	return duration.HumanDuration(now.Sub(ts.AsTime()))
}

// instant is ts in the time zone of now, to the millisecond.
func instant(ts *timestamppb.Timestamp, now time.Time) string {
	if ts == nil {
		return absent
	}
	return ts.AsTime().In(now.Location()).Format("2006-01-02T15:04:05.000Z07:00")
}

// between is the time from one to the other.
func between(from, to *timestamppb.Timestamp) string {
	if from == nil || to == nil {
		return absent
	}
	return span(to.AsTime().Sub(from.AsTime()))
}

// span is d to three or four significant digits.
func span(d time.Duration) string {
	if d < time.Second {
		return d.Round(100 * time.Microsecond).String()
	}
	return d.Round(10 * time.Millisecond).String()
}
