// Package integration tests podfsm from outside, on real containerd, runc, CNI plugins, kubelet and kernel namespaces.
package integration

import (
	"os"
	"testing"

	"github.com/podfsm/podfsm/integration/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }
