package main

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// What fails or is skipped is shown with its output; of what passes, only the package.
func TestReport(t *testing.T) {
	var out strings.Builder
	now := time.Unix(0, 0)
	r := newReport(&out, func() time.Time { return now })
	read := func(lines ...string) string {
		out.Reset()
		for _, line := range lines {
			r.read(line + "\n")
		}
		return out.String()
	}

	require.Equal(t, "no event\n", read("no event"))
	require.Equal(t, "x.go:1: bad\n", read(`{"Action":"build-output","ImportPath":"p","Output":"x.go:1: bad\n"}`))
	require.Empty(t, read(`{"Action":"start","Package":"p"}`, `{"Action":"run","Package":"p","Test":"TestA"}`, `{"Action":"output","Package":"p","Test":"TestA","Output":"secret\n"}`,
		`{"Action":"pass","Package":"p","Test":"TestA"}`))
	require.Equal(t, "why\n--- FAIL: TestB/sub\n", read(`{"Action":"run","Package":"p","Test":"TestB"}`, `{"Action":"run","Package":"p","Test":"TestB/sub"}`,
		`{"Action":"output","Package":"p","Test":"TestB/sub","Output":"why\n"}`, `{"Action":"output","Package":"p","Test":"TestB/sub","Output":"--- FAIL: TestB/sub\n"}`,
		`{"Action":"fail","Package":"p","Test":"TestB/sub"}`))
	require.Equal(t, "--- SKIP: TestC\n", read(`{"Action":"run","Package":"p","Test":"TestC"}`, `{"Action":"output","Package":"p","Test":"TestC","Output":"--- SKIP: TestC\n"}`,
		`{"Action":"skip","Package":"p","Test":"TestC"}`))

	require.Empty(t, read(`{"Action":"output","Package":"r","Output":"?   \tr\t[no test files]\n"}`, `{"Action":"skip","Package":"r"}`))

	read(`{"Action":"run","Package":"p","Test":"TestE"}`, `{"Action":"pause","Package":"p","Test":"TestE"}`)
	read(`{"Action":"run","Package":"p","Test":"TestB/more"}`, `{"Action":"pause","Package":"p","Test":"TestB/more"}`, `{"Action":"cont","Package":"p","Test":"TestB/more"}`)
	now = now.Add(95 * time.Second)
	out.Reset()
	r.progress()
	require.Equal(t, "1:35  1 tests passed, 1 failed; running: TestB/more (1:35)\n", out.String())

	require.Equal(t, "ok  \tp\t1s\n", read(`{"Action":"output","Package":"p","Output":"PASS\n"}`, `{"Action":"output","Package":"p","Output":"ok  \tp\t1s\n"}`, `{"Action":"pass","Package":"p"}`))
	require.Equal(t, "panic: test timed out\nFAIL\tq\n", read(`{"Action":"run","Package":"q","Test":"TestD"}`, `{"Action":"output","Package":"q","Test":"TestD","Output":"panic: test timed out\n"}`,
		`{"Action":"output","Package":"q","Output":"FAIL\tq\n"}`, `{"Action":"fail","Package":"q"}`), "a test that never ends has no result")
}
