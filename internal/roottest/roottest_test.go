package roottest

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

const mainEnv = "PODFSM_TEST_ROOT_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(mainEnv) != "" {
		os.Exit(Main(m.Run, os.Stderr))
	}
	os.Exit(m.Run())
}

func TestRequire(t *testing.T) {
	Require(t)
	code, out := asNobody(t)
	require.Equal(t, 1, code, out)
	require.Contains(t, out, "--- FAIL: TestRequire")
	require.Contains(t, out, "this test needs root: run go test as root")
}

func TestMainWithoutRoot(t *testing.T) {
	Require(t)
	code, out := asNobody(t, mainEnv+"=1")
	require.Equal(t, 1, code, out)
	require.Equal(t, "each test of this package needs root: run go test as root\n", out)
}

// asNobody runs TestRequire of this test binary as a user without privileges.
func asNobody(t *testing.T, env ...string) (code int, out string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestRequire$") // nobody can't pass through the directories above the binary
	cmd.Env = append(env, "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	var printed bytes.Buffer
	cmd.Stdout, cmd.Stderr = &printed, &printed
	_ = cmd.Run() // its outcome is the exit code
	return cmd.ProcessState.ExitCode(), strings.TrimPrefix(printed.String(), "\n")
}
