package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestChoose(t *testing.T) {
	for _, tc := range []struct {
		name string
		options
		want []string
	}{
		{"the smoke", options{smoke: true, pattern: "."}, []string{"smoke"}},
		{"one", options{pattern: "^reboot$"}, []string{"reboot"}},
		{"both drivers", options{pattern: "^tests-"}, []string{"tests-systemd", "tests-cgroupfs"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			chosen, err := choose(tc.options)
			require.NoError(t, err)
			var names []string
			for _, s := range chosen {
				names = append(names, s.name)
			}
			require.Equal(t, tc.want, names)
		})
	}
	_, err := choose(options{pattern: "none"})
	require.ErrorContains(t, err, "no scenario")
	_, err = choose(options{pattern: "("})
	require.Error(t, err)
}

// The patterns of scenarios must match existing tests. A renamed test would silently be missing on
// the machines.
func TestListedTestsExist(t *testing.T) {
	files, err := filepath.Glob("../*_test.go")
	require.NoError(t, err)
	var source strings.Builder
	for _, file := range append(files, "node/node_test.go") {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		source.Write(text)
	}
	list, err := os.ReadFile("list.go")
	require.NoError(t, err)
	names := regexp.MustCompile(`\bTest[\w/]+`).FindAllString(string(list), -1)
	require.Greater(t, len(names), len(everywhere))
	for _, name := range names {
		require.Contains(t, source.String(), "\nfunc "+name+"(t *testing.T)")
	}
}

// The log gets the whole output, however it is split into writes.
func TestResultsKeepAll(t *testing.T) {
	var log bytes.Buffer
	r := &results{log: &log}
	const text = "=== RUN   TestX\n--- PASS: TestX (1.00s)\nPASS\nno end of the line"
	for _, piece := range []string{text[:20], text[20:21], text[21:]} {
		n, err := r.Write([]byte(piece))
		require.NoError(t, err)
		require.Equal(t, len(piece), n)
	}
	require.Equal(t, text, log.String())
	require.Equal(t, "no end of the line", string(r.rest))
}
