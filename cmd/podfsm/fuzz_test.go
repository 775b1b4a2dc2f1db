package main

import (
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// FuzzPrintable fuzzes a text of a pod, an image or a CNI plugin. A terminal must show the text and
// not interpret it.
func FuzzPrintable(f *testing.F) {
	for _, text := range []string{"web", "\x1b[2J", "a\nb", "\u202etxt", "\xff", "'", "\u2028", "é"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		shown := printable(text)
		require.NotContains(t, shown, "\n")
		for _, r := range shown {
			require.True(t, strconv.IsPrint(r), "%q of %q", r, text)
		}
		if !strings.ContainsFunc(text, func(r rune) bool { return !strconv.IsPrint(r) }) {
			require.Equal(t, string([]rune(text)), shown)
		}
	})
}
