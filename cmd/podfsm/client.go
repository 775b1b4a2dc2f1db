package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
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

// method is a method of the client, as a method expression.
type method[Request, Response any] func(podfsmv1.SandboxesClient, context.Context, Request, ...grpc.CallOption) (Response, error)

// call sends one request to the daemon that cmd's flags name. Its errors are for the operator.
func call[Request, Response any](ctx context.Context, cmd *cli.Command, m method[Request, Response], request Request) (Response, error) {
	var none Response
	d, err := connect(ctx, cmd)
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

// daemon is a connection to the daemon that cmd's flags name. The first request connects.
type daemon struct {
	dialer
	timeout time.Duration
	unread  error // why the configuration, which may name another socket, could not be read
	conn    *grpc.ClientConn
}

func connect(ctx context.Context, cmd *cli.Command) (_ *daemon, err error) {
	p := locate(ctx, cmd)
	d := &daemon{dialer: dialer{address: p.address}, timeout: cmd.Duration("timeout"), unread: p.unread}
	d.conn, err = grpc.NewClient("passthrough:///containerd",
		grpc.WithContextDialer(d.dial),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize)))
	return d, err
}

// explain turns the error of a request into one for the operator.
func (d *daemon) explain(err error) error {
	if failure := d.failure.Load(); failure != nil {
		return explainDial(d.address, *failure, d.unread)
	}
	return explainCall(d.address, d.timeout, err)
}

// stockError says that the daemon is a containerd without podfsm.
type stockError struct{ error }

// timeoutError says that the daemon did not answer in time.
type timeoutError struct{ error }

// unavailableError says that the daemon has podfsm but can't answer: it can't serve running pods, or
// is about to stop.
type unavailableError struct{ error }

// dialer connects to one socket and keeps the error, which gRPC only passes on as text.
type dialer struct {
	address string
	failure atomic.Pointer[error]
}

// dial ignores the target of gRPC, which can not hold every path.
func (d *dialer) dial(ctx context.Context, _ string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", d.address)
	if err != nil {
		d.failure.Store(&err)
	}
	return conn, err
}

// explainDial explains why nothing could be reached at an address. unread, if set, is the error of
// the configuration that may name another address.
func explainDial(address string, err, unread error) error {
	elsewhere := ""
	if unread != nil {
		elsewhere = fmt.Sprintf("\nand %v", unread)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return downError{fmt.Errorf("no socket at %s: is the daemon running? (--address names another)%s", address, elsewhere)}
	case errors.Is(err, syscall.ECONNREFUSED):
		return downError{fmt.Errorf("nothing listens on %s: is the daemon running?%s", address, elsewhere)}
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("permission denied on %s: run podfsm as root", address)
	}
	return fmt.Errorf("failed to connect to %s: %w", address, err)
}

func explainCall(address string, timeout time.Duration, err error) error {
	message := printable(status.Convert(err).Message())
	switch status.Code(err) {
	case codes.Unimplemented:
		return stockError{fmt.Errorf("the daemon at %s is a containerd without podfsm, or its podfsm plugin did not load: %s; if podfsm was just installed, restart containerd", address, message)}
	case codes.DeadlineExceeded:
		return timeoutError{fmt.Errorf("no answer from the daemon at %s within %s", address, timeout)}
	case codes.Unavailable:
		return unavailableError{fmt.Errorf("the daemon at %s is unavailable: %s", address, message)}
	case codes.NotFound:
		return notFoundError{errors.New(message)}
	case codes.Internal, codes.Unknown:
		return fmt.Errorf("the daemon at %s failed: %s", address, message)
	}
	return errors.New(message)
}
