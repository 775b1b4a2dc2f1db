package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/defaults"
	"github.com/urfave/cli/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

// method is one of the client's methods, as a method expression.
type method[Request, Response any] func(podfsmv1.SandboxesClient, context.Context, Request, ...grpc.CallOption) (Response, error)

// call sends one request to the daemon that cmd's flags name. Its errors are
// for the operator to read.
func call[Request, Response any](ctx context.Context, cmd *cli.Command, m method[Request, Response], request Request) (Response, error) {
	var none Response
	d, err := connect(cmd)
	if err != nil {
		return none, err
	}
	defer d.conn.Close()
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	response, err := m(podfsmv1.NewSandboxesClient(d.conn), ctx, request)
	if err != nil {
		return none, d.explain(err)
	}
	return response, nil
}

// daemon is a connection to the daemon that cmd's flags name. It is made with
// the first request.
type daemon struct {
	dialer
	timeout time.Duration
	conn    *grpc.ClientConn
}

func connect(cmd *cli.Command) (_ *daemon, err error) {
	// crictl and kubelet flags have addresses with a scheme.
	d := &daemon{dialer: dialer{address: strings.TrimPrefix(cmd.String("address"), "unix://")}, timeout: cmd.Duration("timeout")}
	d.conn, err = grpc.NewClient("passthrough:///containerd",
		grpc.WithContextDialer(d.dial),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize)))
	return d, err
}

// explain makes an error of a request one for the operator to read.
func (d *daemon) explain(err error) error {
	if failure := d.failure.Load(); failure != nil {
		return explainDial(d.address, *failure)
	}
	return explainCall(d.address, d.timeout, err)
}

// stockError says that a containerd without podfsm has answered.
type stockError struct{ error }

// timeoutError says that the daemon has not answered in time.
type timeoutError struct{ error }

// unavailableError says that a daemon with podfsm can't answer: it is degraded,
// or about to end.
type unavailableError struct{ error }

// dialer connects to one socket and keeps the error when that fails, because
// gRPC hands it on only as a text.
type dialer struct {
	address string
	failure atomic.Pointer[error]
}

// dial ignores gRPC's target: a path can hold what a target can't.
func (d *dialer) dial(ctx context.Context, _ string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", d.address)
	if err != nil {
		d.failure.Store(&err)
	}
	return conn, err
}

func explainDial(address string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return downError{fmt.Errorf("no socket at %s: is the daemon running? (--address names another)", address)}
	case errors.Is(err, syscall.ECONNREFUSED):
		return downError{fmt.Errorf("nothing listens on %s: is the daemon running?", address)}
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("permission denied on %s: run podfsm as root", address)
	}
	return fmt.Errorf("failed to connect to %s: %w", address, err)
}

func explainCall(address string, timeout time.Duration, err error) error {
	message := printable(status.Convert(err).Message())
	switch status.Code(err) {
	case codes.Unimplemented:
		return stockError{fmt.Errorf("the daemon at %s is a containerd without podfsm, or its podfsm plugin did not load: %s", address, message)}
	case codes.DeadlineExceeded:
		return timeoutError{fmt.Errorf("no answer from the daemon at %s within %s", address, timeout)}
	case codes.Unavailable:
		return unavailableError{fmt.Errorf("the daemon at %s is unavailable: %s", address, message)}
	case codes.Internal, codes.Unknown:
		return fmt.Errorf("the daemon at %s failed: %s", address, message)
	}
	return errors.New(message)
}
