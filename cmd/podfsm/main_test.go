package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

// asProgram makes the test binary run main instead of the tests.
const asProgram = "PODFSM_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	goleak.VerifyTestMain(m)
}

// fakeSandboxes answers from the fixture, or as the test says.
type fakeSandboxes struct {
	podfsmv1.UnimplementedSandboxesServer
	inspect func(ctx context.Context, ref string) (*podfsmv1.InspectResponse, error)
	leaks   func(*podfsmv1.LeaksRequest) *podfsmv1.LeaksResponse
	list    func() []*podfsmv1.Sandbox
	status  *podfsmv1.StatusResponse
	ended   []*podfsmv1.Sandbox
	watch   func(grpc.ServerStreamingServer[podfsmv1.SandboxTransition]) error
	cleanup func(request proto.Message) (*podfsmv1.CleanupResponse, error)
}

func (f fakeSandboxes) RetryCleanup(_ context.Context, r *podfsmv1.RetryCleanupRequest) (*podfsmv1.CleanupResponse, error) {
	return f.cleanup(r)
}

func (f fakeSandboxes) WriteOffCleanup(_ context.Context, r *podfsmv1.WriteOffCleanupRequest) (*podfsmv1.CleanupResponse, error) {
	return f.cleanup(r)
}

func (f fakeSandboxes) List(_ context.Context, r *podfsmv1.ListRequest) (*podfsmv1.ListResponse, error) {
	all := []*podfsmv1.Sandbox{ready, pending, starting}
	if f.list != nil {
		all = f.list()
	}
	if r.GetEnded() {
		all = append(f.ended, all...)
	}
	return &podfsmv1.ListResponse{Sandboxes: all}, nil
}

func (f fakeSandboxes) Inspect(ctx context.Context, r *podfsmv1.InspectRequest) (*podfsmv1.InspectResponse, error) {
	return f.inspect(ctx, r.GetRef())
}

func (f fakeSandboxes) Leaks(_ context.Context, r *podfsmv1.LeaksRequest) (*podfsmv1.LeaksResponse, error) {
	return f.leaks(r), nil
}

func (f fakeSandboxes) Status(context.Context, *podfsmv1.StatusRequest) (*podfsmv1.StatusResponse, error) {
	return f.status, nil
}

// serve starts a daemon on its own socket and returns the path. Without a service, it is a
// containerd without podfsm.
func serve(t *testing.T, service podfsmv1.SandboxesServer) string {
	t.Helper()
	return serveAll(t, func(server *grpc.Server) {
		if service != nil {
			podfsmv1.RegisterSandboxesServer(server, service)
		}
		if node, ok := service.(interface {
			cri() runtime.RuntimeServiceServer
		}); ok {
			runtime.RegisterRuntimeServiceServer(server, node.cri())
		}
	})
}

// serveAll serves what register adds on a socket, and returns the socket's path.
func serveAll(t *testing.T, register func(*grpc.Server)) string {
	t.Helper()
	address := filepath.Join(t.TempDir(), "c.sock")
	listener, err := net.Listen("unix", address)
	require.NoError(t, err)
	server := grpc.NewServer()
	register(server)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		require.NoError(t, <-served)
	})
	return address
}

func podfsm(t *testing.T, args ...string) (stdout string, err error) {
	t.Helper()
	var out, errOut bytes.Buffer
	err = run(t.Context(), append([]string{"podfsm"}, args...), &out, &errOut)
	require.Empty(t, errOut.String())
	return out.String(), err
}

func TestPs(t *testing.T) {
	address := serve(t, fakeSandboxes{})
	out, err := podfsm(t, "--address", address, "ps")
	require.NoError(t, err)
	require.Regexp(t, `(?m)^3b1f0c9a7e5d4 +default/web +Ready +\S+ +- +10\.88\.0\.5 +\S+$`, out)

	out, err = podfsm(t, "ps", "--address", "unix://"+address, "-o", "wide")
	require.NoError(t, err)
	require.Contains(t, out, ready.GetTraceId())

	out, err = podfsm(t, "ps", "--address", address, "--output=json")
	require.NoError(t, err)
	requireGolden(t, "ps.json", []byte(out))
}

func TestCleanupsListsOnlySandboxesWithOne(t *testing.T) {
	address := serve(t, fakeSandboxes{})
	out, err := podfsm(t, "--address", address, "cleanups")
	require.EqualError(t, err, "sandboxes with a pending cleanup: 1")
	require.Equal(t, exitLeft, exitStatus(err))
	require.Contains(t, out, "attach_network")
	require.NotContains(t, out, "default/web")

	out, err = podfsm(t, "--address", address, "cleanups", "-o", "json")
	require.Equal(t, exitLeft, exitStatus(err))
	require.NotContains(t, out, ready.GetId())
	requireGolden(t, "cleanups.json", []byte(out))
}

func TestCleanups(t *testing.T) {
	var asked proto.Message
	var response *podfsmv1.CleanupResponse
	var failure error
	address := serve(t, fakeSandboxes{cleanup: func(request proto.Message) (*podfsmv1.CleanupResponse, error) {
		asked = request
		return response, failure
	}})
	out, err := podfsm(t, "--address", address, "cleanups", "list")
	require.Equal(t, exitLeft, exitStatus(err))
	require.Contains(t, out, "attach_network")

	response = &podfsmv1.CleanupResponse{Sandbox: ready}
	out, err = podfsm(t, "--address", address, "cleanups", "retry", "default/web")
	require.NoError(t, err)
	require.Equal(t, "3b1f0c9a7e5d4 default/web: the cleanup is completed\n", out)
	require.True(t, proto.Equal(&podfsmv1.RetryCleanupRequest{Ref: "default/web"}, asked))

	response = &podfsmv1.CleanupResponse{Sandbox: pending, Error: "no luck"}
	for _, args := range [][]string{
		{"write-off", "db", "--plugin", "sbr", "--reason", "gone for good"},
		{"write-off", "--reason=gone for good", "--plugin=sbr", "db"},
		{"write-off", "db", "--all", "--reason=gone for good"},
	} {
		out, err = podfsm(t, append([]string{"--address", address, "cleanups"}, args...)...)
		require.ErrorContains(t, err, "is still pending")
		require.Equal(t, 2, exitStatus(err))
		require.Contains(t, out, "attach_network")
		want := &podfsmv1.WriteOffCleanupRequest{Ref: "db", Plugin: "sbr", Reason: "gone for good"}
		if slices.Contains(args, "--all") {
			want.Plugin, want.All = "", true
		}
		require.True(t, proto.Equal(want, asked))
	}

	response, failure = nil, status.Error(codes.FailedPrecondition, "sandbox has no pending cleanup")
	_, err = podfsm(t, "--address", address, "cleanups", "retry", "default/web")
	require.EqualError(t, err, "sandbox has no pending cleanup")
	require.Equal(t, 1, exitStatus(err))
	failure = status.Error(codes.DeadlineExceeded, "late")
	_, err = podfsm(t, "--address", address, "cleanups", "retry", "default/web")
	require.ErrorContains(t, err, "it may still be trying: podfsm cleanups shows what is pending")
	require.Equal(t, 2, exitStatus(err))
	asked = nil
	_, err = podfsm(t, "--address", address, "cleanups", "write-off", "default/web", "--all")
	require.ErrorContains(t, err, "reason")
	_, err = podfsm(t, "--address", address, "cleanups", "write-off", "default/web", "--all", "--reason", " ")
	require.ErrorContains(t, err, "write-off takes a reason")
	for _, what := range [][]string{{}, {"--plugin="}, {"--plugin=", "--all"}, {"--plugin=sbr", "--all"}} {
		_, err = podfsm(t, append([]string{"--address", address, "cleanups", "write-off", "default/web", "--reason=gone"}, what...)...)
		require.ErrorContains(t, err, "write-off takes either --plugin, with the plugin's type, or --all")
	}
	_, err = podfsm(t, "--address", address, "cleanups", "retry")
	require.ErrorContains(t, err, "retry takes one argument")
	_, err = podfsm(t, "--address", address, "cleanups", "forget")
	require.ErrorContains(t, err, "cleanups takes no arguments")
	require.Nil(t, asked)
	_, err = podfsm(t, "--address", filepath.Join(t.TempDir(), "none"), "cleanups", "retry", "default/web")
	require.ErrorContains(t, err, "only the daemon can do that")
}

func TestDescribeAndInspect(t *testing.T) {
	address := serve(t, fakeSandboxes{inspect: func(_ context.Context, ref string) (*podfsmv1.InspectResponse, error) {
		if ref != "default/web" && ref != "help" {
			return nil, status.Errorf(codes.NotFound, "no sandbox matches %q", ref)
		}
		return readyInspection, nil
	}})
	out, err := podfsm(t, "--address", address, "describe", "default/web")
	require.NoError(t, err)
	require.Contains(t, out, ready.GetId())
	require.Contains(t, out, "NetworkReady")

	out, err = podfsm(t, "--address", address, "inspect", "default/web")
	require.NoError(t, err)
	requireGolden(t, "inspect.json", []byte(out))

	// A pod may be named like a command.
	out, err = podfsm(t, "--address", address, "inspect", "help")
	require.NoError(t, err)
	require.Contains(t, out, ready.GetId())
}

func TestAddressFromEnvironment(t *testing.T) {
	t.Setenv("CONTAINERD_ADDRESS", serve(t, fakeSandboxes{}))
	out, err := podfsm(t, "ps")
	require.NoError(t, err)
	require.Contains(t, out, "default/web")
}

func TestCallErrors(t *testing.T) {
	refuse := func(code codes.Code, message string) podfsmv1.SandboxesServer {
		return fakeSandboxes{inspect: func(context.Context, string) (*podfsmv1.InspectResponse, error) {
			return nil, status.Error(code, message)
		}}
	}
	for _, tc := range []struct {
		name    string
		service podfsmv1.SandboxesServer
		want    string // ADDRESS is the socket
	}{
		{"no podfsm", nil, "the daemon at ADDRESS is a containerd without podfsm, or its podfsm plugin did not load: unknown service podfsm.v1.Sandboxes; if podfsm was just installed, restart containerd"},
		{"not found", refuse(codes.NotFound, `no sandbox matches "x"`), `no sandbox matches "x"`},
		{"ambiguous", refuse(codes.InvalidArgument, `"x" matches 2 sandboxes: x1, x2`), `"x" matches 2 sandboxes: x1, x2`},
		{"shutting down", refuse(codes.Unavailable, "closing"), "the daemon at ADDRESS is unavailable: closing"},
		{"failure", refuse(codes.Unknown, "bad\x1b[2J"), `the daemon at ADDRESS failed: bad\x1b[2J`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			address := serve(t, tc.service)
			out, err := podfsm(t, "--address", address, "inspect", "x")
			require.EqualError(t, err, strings.ReplaceAll(tc.want, "ADDRESS", address))
			require.Empty(t, out)
		})
	}
}

func TestTimeout(t *testing.T) {
	address := serve(t, fakeSandboxes{inspect: func(ctx context.Context, _ string) (*podfsmv1.InspectResponse, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}})
	_, err := podfsm(t, "--address", address, "--timeout", "50ms", "inspect", "x")
	require.EqualError(t, err, "no answer from the daemon at "+address+" within 50ms")
}

// The path of a socket may hold characters that are special in a gRPC target.
func TestOddSocketPath(t *testing.T) {
	address := serve(t, fakeSandboxes{})
	odd := filepath.Join(t.TempDir(), "a b%zz?c#d,e")
	require.NoError(t, os.Symlink(address, odd))
	_, err := podfsm(t, "--address", odd, "ps")
	require.NoError(t, err)
}

func TestDialErrors(t *testing.T) {
	none := t.TempDir()
	missing := filepath.Join(none, "none.sock")
	_, err := podfsm(t, "--root-dir", none, "--state-dir", none, "--address", missing, "ps")
	require.ErrorContains(t, err, "no socket at "+missing+": is the daemon running? (--address names another)")

	dead := filepath.Join(t.TempDir(), "dead.sock")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	require.NoError(t, err)
	listener.SetUnlinkOnClose(false)
	require.NoError(t, listener.Close())
	_, err = podfsm(t, "--root-dir", none, "--state-dir", none, "--address", dead, "ps")
	require.ErrorContains(t, err, "nothing listens on "+dead+": is the daemon running?")

	// The kernel never refuses root, so these two errors are made here.
	refused := &net.OpError{Op: "dial", Net: "unix", Err: os.NewSyscallError("connect", syscall.EACCES)}
	require.EqualError(t, explainDial("/s", refused, nil), "permission denied on /s: run podfsm as root")
	other := errors.New("odd")
	require.ErrorIs(t, explainDial("/s", other, nil), other)
}

func TestUsageErrors(t *testing.T) {
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"sp"}, `unknown command "sp"`},
		{[]string{"ps", "x"}, "ps takes no arguments"},
		{[]string{"cleanups", "x"}, "cleanups takes no arguments"},
		{[]string{"timeline"}, "timeline takes one argument"},
		{[]string{"timeline", "a", "b"}, "timeline takes one argument"},
		{[]string{"watch", "-o", "wide"}, "must be json"},
		{[]string{"graph", "-o", "svg"}, "must be dot or mermaid"},
		{[]string{"ps", "-o", "yaml"}, "must be wide or json"},
		{[]string{"ps", "--colour"}, "not defined: -colour"},
		{[]string{"inspect"}, "inspect takes one argument"},
		{[]string{"inspect", "a", "b"}, "inspect takes one argument"},
		{[]string{"inspect", "-o", "json", "a"}, "not defined: -o"},
		{[]string{"ps", "--state", "Redy"}, "invalid state"},
		{[]string{"ps", "--sort-by", "size"}, "must be age"},
		{[]string{"logs", "--file", "-", "-f", "a"}, "either --file or --follow"},
		{[]string{"drain", "--dry-run", "--check"}, "--dry-run alone"},
		{[]string{"cleanups", "write-off", "--all", "a"}, "reason"},
		{[]string{"--timeout", "0s", "ps"}, "must be positive"},
		{[]string{"--timeout", "soon", "ps"}, `invalid value "soon"`},
	} {
		t.Run(fmt.Sprint(tc.args), func(t *testing.T) {
			_, err := podfsm(t, tc.args...)
			require.ErrorContains(t, err, tc.want)
			require.Equal(t, exitUsage, exitStatus(err))
		})
	}
}

func TestHelp(t *testing.T) {
	for _, args := range [][]string{nil, {"--help"}, {"help"}} {
		out, err := podfsm(t, args...)
		require.NoError(t, err)
		require.Contains(t, out, "inspect")
	}
}

func TestVersion(t *testing.T) {
	out, err := podfsm(t, "--version")
	require.NoError(t, err)
	require.Regexp(t, `^podfsm \S+ \(containerd \S+\)\n$`, out)
}

func TestDescribe(t *testing.T) {
	containerd := &debug.Module{Path: containerdModule, Version: "v2.4.2"}
	for _, tc := range []struct {
		name   string
		linked string
		info   debug.BuildInfo
		want   string
	}{
		{"linked", "v1.2.3", debug.BuildInfo{Main: debug.Module{Version: "(devel)"}, Deps: []*debug.Module{containerd}}, "v1.2.3 (containerd v2.4.2)"},
		{"go install", "", debug.BuildInfo{Main: debug.Module{Version: "v1.2.4"}, Deps: []*debug.Module{{Path: "x"}, containerd}}, "v1.2.4 (containerd v2.4.2)"},
		{"fork", "v1", debug.BuildInfo{Deps: []*debug.Module{{Path: containerdModule, Version: "v2.4.2", Replace: &debug.Module{Path: "fork", Version: "v2.4.3"}}}}, "v1 (containerd v2.4.3)"},
		{"local fork", "v1", debug.BuildInfo{Deps: []*debug.Module{{Path: containerdModule, Version: "v2.4.2", Replace: &debug.Module{Path: "../containerd"}}}}, "v1 (containerd ../containerd)"},
		{"no build info", "", debug.BuildInfo{}, "unknown (containerd unknown)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			require.Equal(t, tc.want, describe(tc.linked, &tc.info))
		})
	}
}

// runProgram runs the command line tool as a process.
func runProgram(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil {
		require.ErrorAs(t, err, &exit)
	}
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

func TestExitCode(t *testing.T) {
	stdout, stderr, code := runProgram(t, "ps", "--address", serve(t, fakeSandboxes{}))
	require.Equal(t, 0, code)
	require.Contains(t, stdout, "default/web")
	require.Empty(t, stderr)

	stdout, stderr, code = runProgram(t, "ps", "x")
	require.Equal(t, 64, code)
	require.Empty(t, stdout)
	require.Equal(t, "podfsm: ps takes no arguments\n", stderr)
}
