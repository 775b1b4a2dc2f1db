// Package history keeps the sandboxes that ended last in a file. Each line is an InspectResponse of
// the API as JSON. Nothing depends on the file, which is for display only. So it isn't synced, and
// a line that can't be read is skipped.
//
// Each line is appended by one write(2). A file with twice as many lines or bytes as are kept is
// rewritten.
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

// FileName is the name of the file in the ledger's root directory.
const FileName = "history"

const (
	// Keep and keepBytes bound the kept sandboxes, by their number and by their bytes.
	Keep      = 200
	keepBytes = 2 << 20
	// maxLine bounds one line. A usual line has 3 to 6 KiB.
	maxLine = 64 << 10
)

// File is the history file. It is safe for concurrent use.
type File struct {
	path string

	// mu is held across writes to the file: serialising them is its purpose.
	mu    sync.Mutex
	lines int
	size  int64
}

// Open opens the file at path, which may not exist. If the file can't be read or written, Open
// returns an error and a usable File: [File.Add] tries again.
func Open(path string) (*File, error) {
	f := &File{path: path}
	return f, f.rewrite(nil)
}

// Add appends a sandbox that has ended. It fails with InvalidArgument for a sandbox that is too
// large, and with the operating system's error if the file can't be written.
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

// encode returns a line. JSON without indentation has no line break.
func encode(ended *podfsmv1.InspectResponse) ([]byte, error) {
	line, err := marshal(ended)
	if err != nil {
		return nil, err
	}
	if len(line) > maxLine {
		if line, err = marshal(shortened(ended)); err != nil {
			return nil, err
		}
	}
	if len(line) > maxLine {
		return nil, fmt.Errorf("line of %d bytes exceeds the limit of %d: %w", len(line), maxLine, errdefs.ErrInvalidArgument)
	}
	return append(line, '\n'), nil
}

// The first format calls the tries acts. They keep that name in the file, so that the release
// before shows them after a downgrade.
const tries, storedTries = "tries", "acts"

func marshal(ended *podfsmv1.InspectResponse) ([]byte, error) {
	line, err := protojson.Marshal(ended)
	if err != nil {
		return nil, err
	}
	return renamed(line, tries, storedTries)
}

func unmarshal(line []byte) (*podfsmv1.InspectResponse, error) {
	line, err := renamed(line, storedTries, tries)
	if err != nil {
		return nil, err
	}
	ended := &podfsmv1.InspectResponse{}
	return ended, protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(line, ended)
}

// renamed renames a field of a JSON object.
func renamed(object []byte, from, to string) ([]byte, error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(object, &fields); err != nil {
		return nil, err
	}
	if value, ok := fields[from]; ok {
		fields[to] = value
		delete(fields, from)
	}
	return json.Marshal(fields)
}

// shortened returns a copy with short error texts: a plugin may write text of any length, and the
// same error is there several times.
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
	for _, try := range short.GetTries() {
		cut(&try.Error)
	}
	return short
}

// Read returns the sandboxes in the file, like [Read].
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
	// On a full disk, a partial line must not spoil the next one.
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

// rewrite keeps the newest lines, and adds line unless it is nil.
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
	defer os.Remove(fresh) // fails after the rename, which is fine
	if err := os.WriteFile(fresh, content, 0o600); err != nil {
		return err
	}
	if err := os.Rename(fresh, f.path); err != nil {
		return err
	}
	f.lines, f.size = len(lines), int64(len(content))
	return nil
}

// newest returns the last lines within Keep and keepBytes.
func newest(lines [][]byte) [][]byte {
	size, from := 0, len(lines)
	for from > 0 && len(lines)-from < Keep && size+len(lines[from-1]) <= keepBytes {
		from--
		size += len(lines[from])
	}
	return lines[from:]
}

// readLines returns the lines of the file that are JSON; none if there is no file.
func readLines(path string) ([][]byte, error) {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer file.Close()
	// podfsm never makes the file this large. Of a larger one, only the beginning is read.
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

// Read returns the sandboxes in the file at path, in the order in which they ended. A sandbox that
// was added twice, because the daemon was killed in between, is returned once. Lines that can't be
// read are skipped. A missing file is empty; a file that can't be read is an error.
func Read(path string) ([]*podfsmv1.InspectResponse, error) {
	lines, err := readLines(path)
	if err != nil {
		return nil, fmt.Errorf("failed to read the history of sandboxes that have ended: %w", err)
	}
	var all []*podfsmv1.InspectResponse
	for _, line := range newest(lines) {
		entry, err := unmarshal(line)
		if err == nil && entry.GetSandbox().GetId() != "" {
			all = append(all, entry)
		}
	}
	return Latest(all), nil
}

// Latest returns the last entry of each sandbox, in their order.
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
