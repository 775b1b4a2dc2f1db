package pause

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
)

// What the tests of processes start, built once: podfsm-init, pause as the integration tests have it, and prober, see testdata.
var programs struct{ init, pause, prober string }

func TestMain(m *testing.M) {
	if os.Getenv(helperEnv) != "" {
		helper()
		return
	}
	if os.Getenv(traceEnv) != "" {
		tracer()
		return
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Geteuid() == 0 {
		dir, err := build()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
	}
	code := m.Run()
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

func build() (dir string, err error) {
	if dir, err = os.MkdirTemp("", "podfsm-pause"); err != nil {
		return "", err
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	programs.init, programs.pause, programs.prober = at(InitName), at("pause"), at("prober")
	gcc := func(out, source string) *exec.Cmd {
		return exec.Command("gcc", "-static", "-Os", "-s", "-Wall", "-Werror", "-o", out, source)
	}
	for _, cmd := range []*exec.Cmd{
		exec.Command("go", "build", "-buildvcs=false", "-o", programs.init, "../cmd/podfsm-init"),
		gcc(programs.pause, "../integration/programs/pause/pause.c"),
		gcc(programs.prober, "testdata/prober.c"),
	} {
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
		if out, err := cmd.CombinedOutput(); err != nil {
			return dir, fmt.Errorf("failed to build %q: %w\n%s", cmd.Args, err, out)
		}
	}
	return dir, nil
}
