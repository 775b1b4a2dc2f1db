// Command node starts its own containerd-podfsm with runc, CNI plugins and images, and opens a
// shell on it. At the end of the shell, it removes everything. If its standard input is not a
// terminal, it runs the commands from there.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/integration/cluster"
	"github.com/podfsm/podfsm/integration/harness"
)

// config makes podfsm the default runtime handler.
const config = `
[plugins.'io.containerd.cri.v1.runtime'.containerd]
  default_runtime_name = "podfsm"
`

const intro = `containerd-podfsm runs as process %d. Its log is %s.
A pod:         crictl run container.json pod.json
What it did:   podfsm ps; podfsm timeline default/web
The end:       exit, which removes the node and all of its pods
`

const clusterIntro = `The node is one of a Kubernetes cluster: kubectl get nodes
`

func main() {
	sweep := flag.Bool("sweep", false, "remove the nodes that tests have kept, and don't start one")
	withCluster := flag.Bool("cluster", false, "make it the node of a Kubernetes cluster, whose first build takes half an hour")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	var err error
	if *sweep {
		err = harness.SweepKept(ctx)
	} else {
		err = run(ctx, *withCluster, os.Stdin, os.Stdout, os.Stderr)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "node:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, withCluster bool, stdin io.Reader, stdout, stderr io.Writer) (err error) {
	if err := harness.Sweep(ctx); err != nil {
		return err
	}
	n, err := harness.NewNode(ctx, harness.Config{TOML: config})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Close(context.WithoutCancel(ctx))) }()
	shell, err := n.WriteShell(ctx)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, shell)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stdout, stderr
	fmt.Fprintf(stderr, intro, n.Pid(), filepath.Join(n.Dir(), "containerd.log"))
	if withCluster {
		c, err := startCluster(ctx, n) // the cluster ends with the node, as its pods do
		if err != nil {
			return err
		}
		cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig("admin"))
		fmt.Fprint(stderr, clusterIntro)
	}
	if err := cmd.Run(); err != nil && !isTerminal(stdin) { // on a terminal, the error is that of the last command
		return fmt.Errorf("failed to run the commands: %w", err)
	}
	return nil
}

func isTerminal(in io.Reader) bool {
	f, ok := in.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func startCluster(ctx context.Context, n *harness.Node) (*cluster.OneNode, error) {
	programs, err := harness.BuildCluster(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := n.WarmUp(ctx, harness.PodfsmHandler); err != nil { // makes the bridge
		return nil, err
	}
	return cluster.New(ctx, n, programs, filepath.Join(programs, "kubelet"))
}
