package history

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/internal/roottest"
)

func ended(id, text string) *podfsmv1.InspectResponse {
	return &podfsmv1.InspectResponse{Sandbox: &podfsmv1.Sandbox{Id: id, ContainerdNamespace: "k8s.io", PodName: "web", Error: text}}
}

func open(t *testing.T) *File {
	t.Helper()
	f, err := Open(filepath.Join(t.TempDir(), FileName))
	require.NoError(t, err)
	return f
}

// ids are those of the sandboxes that are kept.
func ids(t *testing.T, f *File) (ids []string) {
	t.Helper()
	all, err := Read(f.path)
	require.NoError(t, err)
	for _, entry := range all {
		ids = append(ids, entry.GetSandbox().GetId())
	}
	return ids
}

func TestWhatIsAddedIsThereAlsoAfterARestart(t *testing.T) {
	f := open(t)
	require.Empty(t, ids(t, f))
	hostile := ended("b", "two\nlines \x00 \u2028 \"quoted\" </script>")
	require.NoError(t, f.Add(ended("a", "")))
	require.NoError(t, f.Add(hostile))
	next, err := Open(f.path)
	require.NoError(t, err)
	require.NoError(t, next.Add(ended("c", "")))
	require.Equal(t, []string{"a", "b", "c"}, ids(t, next))
	all, err := Read(f.path)
	require.NoError(t, err)
	require.True(t, proto.Equal(hostile, all[1]), "%v", all[1])
}

func TestTheNewestOfOneSandboxCounts(t *testing.T) {
	f := open(t)
	for _, entry := range []*podfsmv1.InspectResponse{ended("a", "first"), ended("b", ""), ended("a", "second")} {
		require.NoError(t, f.Add(entry))
	}
	require.Equal(t, []string{"b", "a"}, ids(t, f))
	all, err := Read(f.path)
	require.NoError(t, err)
	require.Equal(t, "second", all[1].GetSandbox().GetError())
}

func TestBounds(t *testing.T) {
	for name, text := range map[string]string{"many": "", "large": strings.Repeat("x", 60<<10)} {
		t.Run(name, func(t *testing.T) {
			f := open(t)
			const added = 5*Keep + 7
			for i := range added {
				require.NoError(t, f.Add(ended(fmt.Sprint(i), text)))
				info, err := os.Stat(f.path)
				require.NoError(t, err)
				require.LessOrEqual(t, info.Size(), int64(2*keepBytes))
				require.Equal(t, f.size, info.Size())
				require.LessOrEqual(t, f.lines, 2*Keep)
			}
			kept := ids(t, f)
			require.LessOrEqual(t, len(kept), Keep)
			require.GreaterOrEqual(t, len(kept), min(Keep, keepBytes/(61<<10)))
			for i, id := range kept {
				require.Equal(t, fmt.Sprint(added-len(kept)+i), id, "the newest are kept")
			}
		})
	}
}

func TestOneThatIsTooLargeIsRefused(t *testing.T) {
	f := open(t)
	err := f.Add(ended(strings.Repeat("x", maxLine), ""))
	require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
	require.NoError(t, f.Add(ended("a", "")))
	require.Equal(t, []string{"a"}, ids(t, f))
}

func TestErrorsThatAreTooLongAreCut(t *testing.T) {
	f := open(t)
	long := "no " + strings.Repeat("ü", maxLine/2)
	entry := ended("a", long)
	entry.Steps = []*podfsmv1.Step{{Name: "attach_network", Error: long}}
	entry.Tries = []*podfsmv1.Try{{Error: long}}
	entry.Transitions = []*podfsmv1.Transition{{Error: long}, {Error: "short"}}
	require.NoError(t, f.Add(entry))
	all, err := Read(f.path)
	require.NoError(t, err)
	require.Regexp(t, `^no ü{100,127}…$`, all[0].GetSandbox().GetError())
	require.Equal(t, "short", all[0].GetTransitions()[1].GetError())
	require.Equal(t, long, entry.GetSandbox().GetError(), "what was given stays as it is")
}

func TestDamage(t *testing.T) {
	for name, spoil := range map[string]func(text []byte) []byte{
		"the end is torn off":  func(text []byte) []byte { return text[:len(text)-9] },
		"a line is no JSON":    func(text []byte) []byte { return bytes.Replace(text, []byte(`{`), []byte(`[`), 1) },
		"a line is another":    func(text []byte) []byte { return append([]byte("{\"sandbox\":7}\n"), text...) },
		"a line without an id": func(text []byte) []byte { return append([]byte("{}\n[]\n"), text...) },
		"zeroes before":        func(text []byte) []byte { return append(append(make([]byte, 99), '\n'), text...) },
		"a newer version": func(text []byte) []byte {
			return bytes.ReplaceAll(text, []byte(`{"sandbox"`), []byte(`{"new":1,"sandbox"`))
		},
		"a line without end": func(text []byte) []byte { return append(text, bytes.Repeat([]byte("x"), 5*keepBytes)...) },
		"emptied":            func([]byte) []byte { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			f := open(t)
			for _, id := range []string{"a", "b", "c"} {
				require.NoError(t, f.Add(ended(id, "")))
			}
			text, err := os.ReadFile(f.path)
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(f.path, spoil(text), 0o600))
			before := ids(t, f)
			if name != "emptied" {
				require.GreaterOrEqual(t, len(before), 2)
			}
			next, err := Open(f.path)
			require.NoError(t, err)
			require.NoError(t, next.Add(ended("d", "")))
			require.Equal(t, append(before, "d"), ids(t, next))
		})
	}
}

func TestAFileThatCantBeWritten(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "missing")
	f, err := Open(filepath.Join(dir, FileName))
	require.Error(t, err)
	require.Error(t, f.Add(ended("a", "")))
	require.NoError(t, os.Mkdir(dir, 0o700))
	require.NoError(t, f.Add(ended("b", "")), "it is tried again")
	require.Equal(t, []string{"b"}, ids(t, f))

	require.NoError(t, os.Remove(f.path))
	require.NoError(t, os.Mkdir(f.path, 0o700))
	require.Error(t, f.Add(ended("c", "")))
	_, err = Read(f.path)
	require.Error(t, err)
}

// A file that could not replace the history is removed.
func TestAFileThatCantBeReplaced(t *testing.T) {
	roottest.Require(t)
	path := filepath.Join(t.TempDir(), FileName)
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	require.NoError(t, unix.Mount(path, path, "", unix.MS_BIND, ""))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(path, unix.MNT_DETACH)) })
	_, err := Open(path)
	require.ErrorIs(t, err, unix.EBUSY)
	require.NoFileExists(t, path+".new")
}

// A disk that is full in the middle of a line doesn't spoil the next one.
func TestAFullDisk(t *testing.T) {
	roottest.Require(t)
	dir := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8k"))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	f, err := Open(filepath.Join(dir, FileName))
	require.NoError(t, err)
	require.NoError(t, f.Add(ended("a", strings.Repeat("x", 3000))))
	require.ErrorIs(t, f.Add(ended("b", strings.Repeat("x", 7000))), unix.ENOSPC)
	require.NoError(t, f.Add(ended("c", "")))
	require.Equal(t, []string{"a", "c"}, ids(t, f))
}

func TestManyAtOnce(t *testing.T) {
	f := open(t)
	var adding sync.WaitGroup
	for i := range 8 {
		adding.Go(func() {
			for j := range 40 {
				require.NoError(t, f.Add(ended(fmt.Sprintf("%d-%d", i, j), "text")))
				_, err := Read(f.path)
				require.NoError(t, err)
			}
		})
	}
	adding.Wait()
	require.Len(t, ids(t, f), Keep)
}

func FuzzRead(f *testing.F) {
	f.Add([]byte("{\"sandbox\":{\"id\":\"a\"}}\n{}\n"))
	f.Add([]byte("{\"sandbox\":{\"id\":\"a\"},\"acts\":[{\"duration\":\"1s\"}]}\n{\"sandbox\""))
	f.Fuzz(func(t *testing.T, text []byte) {
		path := filepath.Join(t.TempDir(), FileName)
		require.NoError(t, os.WriteFile(path, text, 0o600))
		before, err := Read(path)
		require.NoError(t, err)
		file, err := Open(path)
		require.NoError(t, err)
		after, err := Read(path)
		require.NoError(t, err)
		require.Len(t, after, len(before))
		require.NoError(t, file.Add(ended("new", "")))
		after, err = Read(path)
		require.NoError(t, err)
		require.Equal(t, "new", after[len(after)-1].GetSandbox().GetId())
	})
}

// A release that calls the tries acts, as the first format does, reads the file, and its file is
// read.
func TestTriesKeepTheirStoredName(t *testing.T) {
	f := open(t)
	entry := ended("a", "")
	entry.Tries = []*podfsmv1.Try{{Step: "attach_network", Kind: "undo", Error: "<no luck>"}}
	require.NoError(t, f.Add(entry))
	text, err := os.ReadFile(f.path)
	require.NoError(t, err)
	var stored struct {
		Acts  []struct{ Step, Kind, Error string }
		Tries any
	}
	require.NoError(t, json.Unmarshal(text, &stored))
	require.Len(t, stored.Acts, 1)
	require.Equal(t, "<no luck>", stored.Acts[0].Error)
	require.Nil(t, stored.Tries)

	all, err := Read(f.path)
	require.NoError(t, err)
	require.True(t, proto.Equal(entry, all[0]), "%v", all)
}

// Lines of other releases may have fields that this release doesn't have, or names differently.
func TestReadKeepsLinesWithUnknownFields(t *testing.T) {
	path := filepath.Join(t.TempDir(), FileName)
	line := `{"sandbox":{"id":"a","podName":"web","earlier":[{"step":"attach_network"}],"later":1},"steps":[{"name":"attach_network","status":"earlier"}]}` + "\n"
	require.NoError(t, os.WriteFile(path, []byte(line), 0o600))
	all, err := Read(path)
	require.NoError(t, err)
	require.Len(t, all, 1)
	require.Equal(t, "web", all[0].GetSandbox().GetPodName())
	require.Equal(t, "attach_network", all[0].GetSteps()[0].GetName())
}
