// Package roottest fails tests that run without root, which could otherwise pass without having tested anything.
package roottest

import (
	"fmt"
	"io"
	"os"
	"testing"
)

const remedy = "needs root: run go test as root"

// Require fails the test unless root runs it.
func Require(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test " + remedy)
	}
}

// Main is for the TestMain of a package in which each test needs root. It runs the tests and returns the exit code. Without root it
// runs none, says so on w, and returns 1.
func Main(run func() int, w io.Writer) int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(w, "each test of this package "+remedy)
		return 1
	}
	return run()
}
