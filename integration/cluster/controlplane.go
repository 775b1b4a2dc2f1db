// Package cluster runs a Kubernetes cluster of one node: etcd and the control
// plane in the network namespace of a node of the harness, and the kubelet on it.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/util/keyutil"

	"github.com/podfsm/podfsm/integration/harness"
)

const (
	// startTimeout bounds the start of each part of the control plane.
	startTimeout = 2 * time.Minute
	stopTimeout  = 20 * time.Second
	pollInterval = 200 * time.Millisecond

	etcdAddress = "http://127.0.0.1:2379"
	// apiAddress is on the node's bridge, so that pods reach it.
	apiAddress = "https://" + harness.Gateway + ":6443"
)

// users are the users of the API server and their groups. A user's token is its name: only the
// tests reach the API server.
var users = map[string]string{
	"admin":                          "system:masters",
	"system:kube-controller-manager": "",
	"system:kube-scheduler":          "",
	"system:node:node":               "system:nodes",
}

// ControlPlane is a cluster without its nodes. Its methods are safe for concurrent use, except for
// Close.
type ControlPlane struct {
	node     *harness.Node
	programs string // the folder of its programs
	dir      string
	parts    []*part // in the order of their start
}

// part is a process of the control plane whose end is awaited from its start.
type part struct {
	name   string
	cmd    *exec.Cmd
	exited chan struct{}
}

// NewControlPlane starts the control plane from a folder of programs, beside a node that has run a
// pod and so has a bridge. It returns when the API server is ready. The caller must Close it.
func NewControlPlane(ctx context.Context, n *harness.Node, programs string) (_ *ControlPlane, err error) {
	c := &ControlPlane{node: n, programs: programs, dir: filepath.Join(n.Dir(), "control-plane")}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close(context.WithoutCancel(ctx)))
		}
	}()
	if err := c.prepare(); err != nil {
		return nil, fmt.Errorf("failed to prepare the control plane: %w", err)
	}
	if err := c.start("etcd",
		"--data-dir="+c.path("etcd"),
		"--unsafe-no-fsync",
		"--listen-client-urls="+etcdAddress,
		"--advertise-client-urls="+etcdAddress,
	); err != nil {
		return nil, err
	}
	if err := c.start("kube-apiserver",
		"--etcd-servers="+etcdAddress,
		"--advertise-address="+harness.Gateway,
		"--cert-dir="+c.path("pki"), // the API server signs its own certificate
		"--token-auth-file="+c.path("tokens.csv"),
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+c.path("service-accounts.key"),
		"--service-account-signing-key-file="+c.path("service-accounts.key"),
		"--service-cluster-ip-range=10.96.0.0/16",
		"--allow-privileged",
	); err != nil {
		return nil, err
	}
	if err := c.waitReady(ctx); err != nil {
		return nil, err
	}
	if err := c.start("kube-controller-manager",
		"--kubeconfig="+c.Kubeconfig("system:kube-controller-manager"),
		"--service-account-private-key-file="+c.path("service-accounts.key"),
		"--root-ca-file="+c.certificate(),
		"--use-service-account-credentials",
		"--leader-elect=false",
		"--secure-port=0",
		"--node-monitor-grace-period=5m", // a slow node isn't a lost node
	); err != nil {
		return nil, err
	}
	return c, c.start("kube-scheduler",
		"--kubeconfig="+c.Kubeconfig("system:kube-scheduler"),
		"--leader-elect=false",
		"--secure-port=0",
	)
}

// Close ends the control plane in the reverse order of its start. Closing it twice is no error.
func (c *ControlPlane) Close(ctx context.Context) error {
	for len(c.parts) > 0 {
		last := len(c.parts) - 1
		if err := c.parts[last].end(ctx); err != nil {
			return err
		}
		c.parts = c.parts[:last]
	}
	return nil
}

// Kubeconfig returns the path of the kubeconfig of a user.
func (c *ControlPlane) Kubeconfig(user string) string {
	return c.path(strings.ReplaceAll(user, ":", "-") + ".kubeconfig")
}

// Kubectl runs kubectl on the node as the cluster's administrator, and returns its stdout. It tries
// again while a busy machine takes longer for a TLS handshake than the 10 s that client-go waits:
// the request was not sent.
func (c *ControlPlane) Kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	for {
		out, err := c.kubectlOnce(ctx, stdin, args...)
		if err == nil || ctx.Err() != nil || !strings.Contains(err.Error(), "net/http: TLS handshake timeout") {
			return out, err
		}
	}
}

func (c *ControlPlane) kubectlOnce(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := c.KubectlCommand(ctx, args...)
	var stdout, stderr strings.Builder
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	if err := c.node.Inside(cmd.Start); err != nil {
		return "", err
	}
	if err := cmd.Wait(); err != nil {
		return stdout.String(), fmt.Errorf("failed to run \"kubectl %s\": %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// KubectlCommand returns a command that runs kubectl. It has to be started inside the node.
func (c *ControlPlane) KubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(c.programs, "kubectl"), args...)
	cmd.Env = append(c.environment(), "KUBECONFIG="+c.Kubeconfig("admin"))
	cmd.Dir = c.dir
	return cmd
}

// LogTails returns the last lines of each part's log.
func (c *ControlPlane) LogTails(lines int) string {
	var tails strings.Builder
	for _, p := range c.parts {
		log, err := os.ReadFile(c.path(p.name + ".log"))
		if err != nil {
			log = []byte(err.Error())
		}
		all := strings.Split(strings.TrimSpace(string(log)), "\n")
		fmt.Fprintf(&tails, "%s:\n%s\n", p.name, strings.Join(all[max(0, len(all)-lines):], "\n"))
	}
	return tails.String()
}

// prepare makes what must exist before the first part starts.
func (c *ControlPlane) prepare() error {
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return err
	}
	key, err := keyutil.MakeEllipticPrivateKeyPEM()
	if err != nil {
		return err
	}
	if err := keyutil.WriteKey(c.path("service-accounts.key"), key); err != nil {
		return err
	}
	var tokens strings.Builder
	for user, groups := range users {
		fmt.Fprintf(&tokens, "%s,%s,%s,%q\n", user, user, user, groups)
		if err := os.WriteFile(c.Kubeconfig(user), []byte(c.kubeconfig(user)), 0o600); err != nil {
			return err
		}
	}
	return os.WriteFile(c.path("tokens.csv"), []byte(tokens.String()), 0o600)
}

func (c *ControlPlane) kubeconfig(user string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: cluster, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: user, user: {token: %q}}]
contexts: [{name: context, context: {cluster: cluster, user: user}}]
current-context: context
`, apiAddress, c.certificate(), user)
}

func (c *ControlPlane) certificate() string { return c.path("pki/apiserver.crt") }

func (c *ControlPlane) path(below string) string { return filepath.Join(c.dir, below) }

func (c *ControlPlane) environment() []string {
	return []string{"HOME=" + c.dir, "TMPDIR=" + c.dir, "PATH=" + os.Getenv("PATH")}
}

func (c *ControlPlane) start(name string, args ...string) error {
	log, err := os.Create(c.path(name + ".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(c.programs, name), args...)
	cmd.Env, cmd.Stdout, cmd.Stderr, cmd.Dir = c.environment(), log, log, c.dir
	if err := c.node.Inside(cmd.Start); err != nil {
		return fmt.Errorf("failed to start %s: %w", name, err)
	}
	p := &part{name: name, cmd: cmd, exited: make(chan struct{})}
	c.parts = append(c.parts, p)
	go func() {
		defer close(p.exited)
		_ = cmd.Wait() // cmd.ProcessState has the outcome
	}()
	return nil
}

// waitReady waits for the API server, which is started last and ends if etcd doesn't serve.
func (c *ControlPlane) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, harness.Patience(startTimeout))
	defer cancel()
	server := c.parts[len(c.parts)-1]
	for {
		_, err := c.Kubectl(ctx, "", "get", "--raw", "/readyz")
		if err == nil {
			return nil
		}
		select {
		case <-server.exited:
			return fmt.Errorf("kube-apiserver ended: %v; the ends of the logs:\n%s", server.cmd.ProcessState, c.LogTails(20))
		case <-ctx.Done():
			return fmt.Errorf("kube-apiserver isn't ready within %v: %w; the ends of the logs:\n%s", harness.Patience(startTimeout), err, c.LogTails(20))
		case <-time.After(pollInterval):
		}
	}
}

// end ends a part by SIGTERM, and by SIGKILL after a while: kube-apiserver waits for open
// connections.
func (p *part) end(ctx context.Context) error {
	for _, signal := range []syscall.Signal{unix.SIGTERM, unix.SIGKILL} {
		if err := p.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return fmt.Errorf("failed to signal %s: %w", p.name, err)
		}
		select {
		case <-p.exited:
			return nil
		case <-time.After(harness.Patience(stopTimeout)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return fmt.Errorf("%s does not end", p.name)
}
