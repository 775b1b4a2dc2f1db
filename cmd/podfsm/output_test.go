package main

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func requireGolden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		require.NoError(t, os.WriteFile(path, got, 0o644))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, string(want), string(got))
}

func TestList(t *testing.T) {
	all := []*podfsmv1.Sandbox{ready, pending, starting}
	for _, tc := range []struct {
		golden    string
		sandboxes []*podfsmv1.Sandbox
		all, wide bool
	}{
		{golden: "ps.txt", sandboxes: all},
		{golden: "ps-wide.txt", sandboxes: all, wide: true},
		{golden: "ps-all.txt", sandboxes: append([]*podfsmv1.Sandbox{crashed.GetSandbox()}, all...), all: true},
		{golden: "ps-none.txt"},
		{golden: "ps-blank.txt", sandboxes: []*podfsmv1.Sandbox{{}}, wide: true},
	} {
		t.Run(tc.golden, func(t *testing.T) {
			var b bytes.Buffer
			require.NoError(t, listing{all: tc.all, wide: tc.wide}.writeTable(&b, tc.sandboxes, now))
			requireGolden(t, tc.golden, b.Bytes())
		})
	}
}

func TestCleanupsTable(t *testing.T) {
	var b bytes.Buffer
	require.NoError(t, writeCleanups(&b, []*podfsmv1.Sandbox{ready, pending}, now))
	requireGolden(t, "cleanups.txt", b.Bytes())
}

func TestDescription(t *testing.T) {
	for _, tc := range []struct {
		golden   string
		response *podfsmv1.InspectResponse
	}{
		{"describe-ready.txt", readyInspection},
		{"describe-starting.txt", startingInspection},
		{"describe-pending.txt", pendingInspection},
		{"describe-blank.txt", &podfsmv1.InspectResponse{}},
	} {
		t.Run(tc.golden, func(t *testing.T) {
			var b bytes.Buffer
			require.NoError(t, writeDescription(&b, tc.response, now))
			requireGolden(t, tc.golden, b.Bytes())
		})
	}
}

func TestTimesAreInTheZoneOfNow(t *testing.T) {
	zone := time.FixedZone("", 2*60*60)
	require.Equal(t, "2026-03-01T14:00:00.000+02:00", instant(at(0), now.In(zone)))
}

func TestBar(t *testing.T) {
	whole := interval{begin, begin.Add(30 * time.Second)}
	for _, tc := range []struct {
		name       string
		whole      interval
		start, end time.Duration
		want       string
	}{
		{"all of it", whole, 0, 30 * time.Second, "[==============================]"},
		{"the middle", whole, 10 * time.Second, 20 * time.Second, "[          ==========          ]"},
		{"too short to see", whole, 5 * time.Second, 5 * time.Second, "[     =                        ]"},
		{"nothing at the end", whole, 30 * time.Second, 30 * time.Second, "[                             =]"},
		{"backwards", whole, 20 * time.Second, 10 * time.Second, "[                    =         ]"},
		{"outside", whole, -time.Hour, time.Hour, "[==============================]"},
		{"of no time at all", interval{begin, begin}, 0, 0, "[=                             ]"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			require.Equal(t, tc.want, tc.whole.bar(interval{begin.Add(tc.start), begin.Add(tc.end)}))
		})
	}
}

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"pod-1 äß 漢字":           "pod-1 äß 漢字",
		"it's \"quoted\" \\n":   "it's \"quoted\" \\n",
		"\x1b[31mred\a":         `\x1b[31mred\a`,
		"two\nlines\tand\rmore": `two\nlines\tand\rmore`,
		"\u202egnp.exe":         `\u202egnp.exe`,
		"c1 \u009b2J":           `c1 \u009b2J`,
		"broken \xff":           "broken \uFFFD",
	} {
		require.Equal(t, want, printable(in))
	}
}
