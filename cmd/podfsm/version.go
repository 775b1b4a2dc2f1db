package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"

	containerdversion "github.com/containerd/containerd/api/services/version/v1"
	"github.com/urfave/cli/v3"
	"google.golang.org/protobuf/types/known/emptypb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

func versionCommand() *cli.Command {
	return &cli.Command{
		Name:            "version",
		Usage:           "print the versions of this program, of the daemon and of containerd",
		Description:     "If no daemon with podfsm answers, the exit status is 3.",
		HideHelpCommand: true,
		Flags:           []cli.Flag{outputFlag("json")},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := noArguments(cmd); err != nil {
				return err
			}
			client := &podfsmv1.Versions{Podfsm: versionOf(version, buildInfo()), Containerd: containerdIn(buildInfo())}
			daemon, failed := daemonVersions(ctx, cmd)
			out := &podfsmv1.VersionOutput{Client: client, Daemon: daemon}
			write := writeVersions
			if cmd.String("output") == "json" {
				write = func(w io.Writer, v *podfsmv1.VersionOutput) error { return writeJSON(w, v) }
			}
			return errors.Join(write(cmd.Root().Writer, out), failed)
		},
	}
}

// daemonVersions asks the daemon. A containerd without podfsm has a version, too.
func daemonVersions(ctx context.Context, cmd *cli.Command) (*podfsmv1.Versions, error) {
	answer, err := call(ctx, cmd, podfsmv1.SandboxesClient.Status, &podfsmv1.StatusRequest{})
	if err == nil {
		return &podfsmv1.Versions{Podfsm: answer.GetVersion(), Containerd: answer.GetContainerdVersion()}, nil
	}
	if !errors.As(err, new(stockError)) {
		return nil, err
	}
	d, failed := connect(ctx, cmd)
	if failed != nil {
		return nil, failed
	}
	defer d.conn.Close()
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	stock, failed := containerdversion.NewVersionClient(d.conn).Version(ctx, &emptypb.Empty{})
	if failed != nil {
		return nil, err
	}
	return &podfsmv1.Versions{Containerd: stock.GetVersion()}, err
}

func writeVersions(w io.Writer, v *podfsmv1.VersionOutput) error {
	_, err := fmt.Fprintf(w, "Client:  podfsm %s, containerd %s\n", printable(v.GetClient().GetPodfsm()), printable(v.GetClient().GetContainerd()))
	if err == nil && v.GetDaemon() != nil {
		_, err = fmt.Fprintf(w, "Daemon:  podfsm %s, containerd %s\n",
			cmp.Or(printable(v.GetDaemon().GetPodfsm()), "none"), printable(v.GetDaemon().GetContainerd()))
	}
	return err
}

const containerdModule = "github.com/containerd/containerd/v2"

// version is set by the linker (-X main.version=...). Without it, the version of the main module is
// used.
var version string

// versions returns the versions of podfsm and of the containerd it was built with. The build info
// has the latter because client.go imports a package of containerd.
func versions() string {
	return describe(version, buildInfo())
}

func buildInfo() *debug.BuildInfo {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return &debug.BuildInfo{}
	}
	return info
}

func describe(linked string, info *debug.BuildInfo) string {
	return fmt.Sprintf("%s (containerd %s)", versionOf(linked, info), containerdIn(info))
}

func versionOf(linked string, info *debug.BuildInfo) string {
	return cmp.Or(linked, info.Main.Version, "unknown")
}

// containerdIn returns the version of containerd that a program was built with.
func containerdIn(info *debug.BuildInfo) string {
	for _, dep := range info.Deps {
		if dep.Path == containerdModule && dep.Replace != nil {
			return cmp.Or(dep.Replace.Version, dep.Replace.Path)
		}
		if dep.Path == containerdModule {
			return dep.Version
		}
	}
	return "unknown"
}
