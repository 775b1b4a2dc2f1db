package main

import (
	"bytes"
	"context"
	"path/filepath"
	"testing"

	containerdversion "github.com/containerd/containerd/api/services/version/v1"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

// stockVersion is the version service of a containerd without podfsm.
type stockVersion struct {
	containerdversion.UnimplementedVersionServer
}

func (stockVersion) Version(context.Context, *emptypb.Empty) (*containerdversion.VersionResponse, error) {
	return &containerdversion.VersionResponse{Version: "v2.4.0"}, nil
}

func TestVersionJSON(t *testing.T) {
	var b bytes.Buffer
	versions := &podfsmv1.Versions{Podfsm: "v0.1.0", Containerd: "v2.4.2"}
	require.NoError(t, writeJSON(&b, &podfsmv1.VersionOutput{Client: versions, Daemon: versions}))
	requireGolden(t, "version.json", b.Bytes())
}

func TestVersions(t *testing.T) {
	address := serve(t, fakeSandboxes{status: &podfsmv1.StatusResponse{Version: "v0.1.0", ContainerdVersion: "v2.4.2"}})
	out, err := podfsm(t, "--address", address, "version")
	require.NoError(t, err)
	require.Regexp(t, `^Client:  podfsm \S+, containerd \S+\nDaemon:  podfsm v0\.1\.0, containerd v2\.4\.2\n$`, out)
	out, err = podfsm(t, "--address", address, "version", "-o", "json")
	require.NoError(t, err)
	require.Contains(t, out, `"daemon": {
    "podfsm": "v0.1.0",
    "containerd": "v2.4.2"
  }`)

	stock := serveAll(t, func(server *grpc.Server) { containerdversion.RegisterVersionServer(server, stockVersion{}) })
	out, err = podfsm(t, "--address", stock, "version")
	require.ErrorContains(t, err, "a containerd without podfsm")
	require.Equal(t, exitNoDaemon, exitStatus(err))
	require.Regexp(t, `\nDaemon:  podfsm none, containerd v2\.4\.0\n$`, out)

	out, err = podfsm(t, "--address", filepath.Join(t.TempDir(), "none"), "version")
	require.Equal(t, exitNoDaemon, exitStatus(err))
	require.Regexp(t, `^Client: .*\n$`, out)
}
