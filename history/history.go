// Package history keeps what was known of the sandboxes that ended last, in a file: a line of JSON for each, an InspectResponse of the
// API. It is for people to read and no record that anything depends on, so it isn't fsynced, and what can't be read of it is left out.
//
// Lines are appended, with one write(2) each. When the file has twice as many lines, or bytes, as are to be kept, it is written anew.
package history

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

// FileName is the name of the file, in the directory of the ledger that outlives a reboot.
const FileName = "history"

const (
	// Keep is how many sandboxes are kept, and keepBytes how many bytes at most they take together.
	Keep      = 200
	keepBytes = 2 << 20
	// maxLine bounds one of them. A usual one has 3 to 6 KiB.
	maxLine = 64 << 10
)

// File is where the sandboxes that end are added. It is safe for concurrent use.
type File struct {
	path string

	// mu is held across writes to the file: serialising them is its purpose.
	mu    sync.Mutex
	lines int
	size  int64
}

// Open goes on with the file at path, which needs not exist. A file that can't be read or written is an error, but not the end:
// [File.Add] tries again.
func Open(path string) (*File, error) {
	f := &File{path: path}
	return f, f.rewrite(nil)
}

// Add appends a sandbox that has ended. It fails with InvalidArgument for one that is too large to be kept, and for a file that can't be
// written with the operating system's error.
func (f *File) Add(ended *podfsmv1.InspectResponse) error {
	line, err := encode(ended)
	if err != nil {
		return fmt.Errorf("failed to keep the history of sandbox %q: %w", ended.GetSandbox().GetId(), err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	write := f.append
	if f.lines >= 2*Keep || f.size+int64(len(line)) > 2*keepBytes {
		write = f.rewrite
	}
	if err := write(line); err != nil {
		return fmt.Errorf("failed to keep the history of sandbox %q: %w", ended.GetSandbox().GetId(), err)
	}
	return nil
}

// encode is a line. protojson varies its white space on purpose, but it puts no line break into what isn't indented.
func encode(ended *podfsmv1.InspectResponse) ([]byte, error) {
	line, err := protojson.Marshal(ended)
	if err != nil {
		return nil, err
	}
	if len(line) > maxLine {
		if line, err = protojson.Marshal(shortened(ended)); err != nil {
			return nil, err
		}
	}
	if len(line) > maxLine {
		return nil, fmt.Errorf("it has %d bytes, of %d at most: %w", len(line), maxLine, errdefs.ErrInvalidArgument)
	}
	return append(line, '\n'), nil
}

// shortened is a copy whose error texts are cut: plugins write what they like, and it stands there many times.
func shortened(ended *podfsmv1.InspectResponse) *podfsmv1.InspectResponse {
	const most = 256
	cut := func(text *string) {
		if len(*text) > most {
			*text = strings.ToValidUTF8((*text)[:most], "") + "…"
		}
	}
	short := proto.CloneOf(ended)
	if s := short.GetSandbox(); s != nil {
		cut(&s.Error)
	}
	for _, step := range short.GetSteps() {
		cut(&step.Error)
	}
	for _, t := range short.GetTransitions() {
		cut(&t.Error)
	}
	for _, act := range short.GetActs() {
		cut(&act.Error)
	}
	return short
}

// Read is [Read] of the file.
func (f *File) Read() ([]*podfsmv1.InspectResponse, error) { return Read(f.path) }

func (f *File) append(line []byte) error {
	file, err := os.OpenFile(f.path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	before, err := file.Stat()
	if err != nil {
		return errors.Join(err, file.Close())
	}
	// What this leaves half-way, for want of space, must not spoil the next line.
	n, err := file.Write(line)
	if err != nil && n > 0 {
		err = errors.Join(err, file.Truncate(before.Size()))
	}
	if err := errors.Join(err, file.Close()); err != nil {
		return err
	}
	f.lines++
	f.size += int64(len(line))
	return nil
}

// rewrite leaves the newest lines and adds one, unless it is nil.
func (f *File) rewrite(line []byte) error {
	lines, err := readLines(f.path)
	if err != nil {
		return err
	}
	if line != nil {
		lines = append(lines, line)
	}
	lines = newest(lines)
	content := bytes.Join(lines, nil)
	fresh := f.path + ".new"
	defer os.Remove(fresh) // where it has not become the file
	if err := os.WriteFile(fresh, content, 0o600); err != nil {
		return err
	}
	if err := os.Rename(fresh, f.path); err != nil {
		return err
	}
	f.lines, f.size = len(lines), int64(len(content))
	return nil
}

// newest are the last lines, as many as are kept.
func newest(lines [][]byte) [][]byte {
	size, from := 0, len(lines)
	for from > 0 && len(lines)-from < Keep && size+len(lines[from-1]) <= keepBytes {
		from--
		size += len(lines[from])
	}
	return lines[from:]
}

// readLines are the lines of the file that are JSON; there are none without a file.
func readLines(path string) ([][]byte, error) {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer file.Close()
	// Where something else has made it larger, the beginning counts.
	text, err := io.ReadAll(io.LimitReader(file, 4*keepBytes))
	if err != nil {
		return nil, err
	}
	var lines [][]byte
	for line := range bytes.Lines(text) {
		if len(line) <= maxLine+1 && bytes.HasSuffix(line, []byte("\n")) && json.Valid(line) {
			lines = append(lines, line)
		}
	}
	return lines, nil
}

// Read returns the sandboxes in the file at path, the one that ended first first. One that ended twice, because the daemon was killed
// in between, is there once. What can't be read is left out; only a file that can't be read at all is an error, and none is empty.
func Read(path string) ([]*podfsmv1.InspectResponse, error) {
	lines, err := readLines(path)
	if err != nil {
		return nil, fmt.Errorf("failed to read the history of sandboxes that have ended: %w", err)
	}
	var all []*podfsmv1.InspectResponse
	for _, line := range newest(lines) {
		entry := &podfsmv1.InspectResponse{}
		err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(line, entry)
		if err == nil && entry.GetSandbox().GetId() != "" {
			all = append(all, entry)
		}
	}
	return Latest(all), nil
}

// Latest leaves the last of the entries of each sandbox, in their order.
func Latest(all []*podfsmv1.InspectResponse) []*podfsmv1.InspectResponse {
	type key struct{ namespace, id string }
	last := map[key]int{}
	of := func(entry *podfsmv1.InspectResponse) key {
		return key{entry.GetSandbox().GetContainerdNamespace(), entry.GetSandbox().GetId()}
	}
	for i, entry := range all {
		last[of(entry)] = i
	}
	var latest []*podfsmv1.InspectResponse
	for i, entry := range all {
		if last[of(entry)] == i {
			latest = append(latest, entry)
		}
	}
	return latest
}
