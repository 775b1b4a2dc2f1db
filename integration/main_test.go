// Package integration tests podfsm from outside, on real containerd, runc, CNI plugins, kubelet and kernel namespaces.
package integration

import (
	"os"
	"testing"

	"github.com/podfsm/podfsm/integration/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

// full says whether the long variants of tests are wanted: all cells of a matrix, and many kills or rounds.
func full() bool { return os.Getenv("PODFSM_FULL") != "" }
