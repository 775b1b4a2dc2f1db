package page

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTable(t *testing.T) {
	require.Equal(t, "| a | b |\n|---|---|\n| 1 | 2 |\n", Head("a", "b")+Row("1", "2"))
}

// Lines break at the last space before column 100, whatever the bytes of a character.
func TestWrap(t *testing.T) {
	half := strings.Repeat("…", 49)
	require.Equal(t, "- "+half+" "+half[:3*48]+"\n", Wrap("- "+half+"\n"+half[:3*48], "  "))
	require.Equal(t, "- "+half+"\n  "+half+" b\n", Wrap("- "+half+" "+half+" b", "  "))
	require.Equal(t, half+half+half+"\na\n", Wrap(half+half+half+" a", ""), "a word stays whole")
}

// The output of a command replaces its earlier output, and the handwritten text stays.
func TestReplace(t *testing.T) {
	file := filepath.Join(t.TempDir(), "page.md")
	begin, end := marks("make x")
	require.NoError(t, os.WriteFile(file, []byte("# Title\n"+begin+end+"the rest\n"), 0o644))
	for _, text := range []string{"first", "second\n"} {
		require.NoError(t, Replace(file, "make x", text))
		now, err := os.ReadFile(file)
		require.NoError(t, err)
		require.Equal(t, "# Title\n"+begin+"\n"+text+"\n"+end+"the rest\n", string(now))
	}
	require.ErrorContains(t, Replace(file, "make y", ""), "add the lines")
}
