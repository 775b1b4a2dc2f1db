package podfsmv1

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/reflect/protoreflect"
)

var update = flag.Bool("update", false, "add what is new to testdata/promised.txt")

// The API only grows: a method, or a field with its number, name and type, that is promised once stays. Removing a
// line from testdata/promised.txt breaks the promise of docs/compatibility.md.
func TestAPIOnlyGrows(t *testing.T) {
	const file = "testdata/promised.txt"
	var has []string
	for _, of := range []protoreflect.FileDescriptor{File_podfsm_v1_podfsm_proto, File_podfsm_v1_output_proto} {
		has = append(has, methods(of)...)
		has = append(has, fields(of.Messages())...)
	}
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	promised := strings.FieldsFunc(string(text), func(r rune) bool { return r == '\n' })
	for _, line := range promised {
		require.Contains(t, has, line, "a promise is broken")
	}
	if *update {
		slices.Sort(has)
		require.NoError(t, os.WriteFile(file, []byte(strings.Join(has, "\n")+"\n"), 0o644))
		return
	}
	for _, line := range has {
		require.Contains(t, promised, line, "new: go test ./api/podfsm/v1 -update")
	}
}

func methods(of protoreflect.FileDescriptor) (lines []string) {
	for i := range of.Services().Len() {
		service := of.Services().Get(i)
		for j := range service.Methods().Len() {
			m := service.Methods().Get(j)
			lines = append(lines, fmt.Sprintf("%s(%s) %s, streams %t", m.FullName(), m.Input().Name(), m.Output().Name(), m.IsStreamingServer()))
		}
	}
	return lines
}

func fields(messages protoreflect.MessageDescriptors) (lines []string) {
	for i := range messages.Len() {
		message := messages.Get(i)
		for j := range message.Fields().Len() {
			lines = append(lines, line(message.Fields().Get(j)))
		}
		lines = append(lines, fields(message.Messages())...)
	}
	return lines
}

// line is a field as it is promised.
func line(f protoreflect.FieldDescriptor) string {
	kind := f.Kind().String()
	if f.Message() != nil {
		kind = string(f.Message().FullName())
	}
	return fmt.Sprintf("%s = %d, %s %s, JSON %s", f.FullName(), f.Number(), f.Cardinality(), kind, f.JSONName())
}
