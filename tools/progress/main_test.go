package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Failed and skipped tests are shown with their output. Of what passes, only the package is shown.
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

// At the end, the slowest tests are shown, with the time of their subtests.
func TestSlowest(t *testing.T) {
	var out strings.Builder
	r := newReport(&out, time.Now)
	pass := func(name string, seconds float64) {
		r.read(fmt.Sprintf(`{"Action":"pass","Package":"p","Test":%q,"Elapsed":%g}`, name, seconds) + "\n")
	}
	pass("TestQuick", 0.9)
	r.finish()
	require.Empty(t, out.String())

	pass("TestA", 1)
	pass("TestB/sub", 100)
	pass("TestB", 123.45)
	for i := range slowest {
		pass(fmt.Sprintf("Test%d", i), 2)
	}
	r.finish()
	lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
	require.Len(t, lines, 1+slowest)
	require.Equal(t, []string{"the slowest tests:", " 123.5 s  p TestB", "   2.0 s  p Test0"}, lines[:3])
}

// At the end, the errors of failed tests are shown again, without the long logs after them.
func TestFailuresAgain(t *testing.T) {
	var out strings.Builder
	r := newReport(&out, time.Now)
	output := func(text string) {
		r.read(fmt.Sprintf(`{"Action":"output","Package":"p","Test":"TestA","Output":%q}`, text+"\n") + "\n")
	}
	output("the error")
	for range failureLines {
		output("a line of a log")
	}
	r.read(`{"Action":"fail","Package":"p","Test":"TestA"}`)
	out.Reset()
	r.finish()
	require.Equal(t, "TestA failed:\nthe error\n"+strings.Repeat("a line of a log\n", failureLines-1), out.String())
}

// A run that shows everything also shows what passes and every skipped test.
func TestAll(t *testing.T) {
	var out strings.Builder
	r := newReport(&out, time.Now)
	r.all = true
	r.readAll(strings.NewReader(`{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"--- PASS: TestA\n"}
{"Action":"pass","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestB","Output":"--- SKIP: TestB\n"}
{"Action":"skip","Package":"p","Test":"TestB"}
{"Action":"output","Package":"p","Test":"TestC","Output":"    c_test.go:1: needs the freezer of cgroup v1\n"}
{"Action":"output","Package":"p","Test":"TestC","Output":"--- SKIP: TestC\n"}
{"Action":"skip","Package":"p","Test":"TestC"}
{"Action":"skip","Package":"without/tests"}
`))
	require.Equal(t, "--- PASS: TestA\n--- SKIP: TestB\n    c_test.go:1: needs the freezer of cgroup v1\n--- SKIP: TestC\n", out.String())
	require.Equal(t, []string{"TestB"}, r.skipped)
}
