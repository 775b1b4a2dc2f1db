package integration

import (
	"bufio"
	"bytes"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/integration/harness"
)

// systemctl has the test restart containerd, and fails if that does.
const systemctl = `#!/bin/sh
set -e
case "$*" in
daemon-reload | "reset-failed containerd") ;;
"restart containerd")
	echo restart >/run/requests
	read -r result </run/results
	[ "$result" = ok ]
	;;
*)
	echo "unexpected: systemctl $*" >&2
	exit 1
	;;
esac
`

// systemdRun has the test run a switch, outside of the pod's PID namespace.
const systemdRun = `#!/bin/sh
echo "$*" >/run/requests
read -r result </run/switched
[ "$result" = ok ]
`

// podScript is what a kubelet makes of podfsm-deploy's pod: a mount namespace in which only the image, the volumes and the token are of
// use. The first process of the PID namespace, as that of a host, is on the machine. systemd-run is to be found there alone.
const podScript = `exec unshare --pid --fork --kill-child sh -c '
unshare --mount --propagation private sh -c "
set -e
mount -t proc proc /proc
mount -t tmpfs tmpfs /usr/local/sbin
mkdir -p /podfsm /run/podfsm-deploy
mount --bind /image/podfsm /podfsm
mount -t tmpfs tmpfs /run/podfsm-deploy
exec /image/podfsm-deploy install"
exit $?'
`

// deployDir is where podfsm-deploy has everything on a host.
const deployDir = "/var/lib/podfsm-deploy"

// serviceAccount is where a pod's token is.
const serviceAccount = "/run/secrets/kubernetes.io/serviceaccount"

// systemdRuns is the directory by which programs know that systemd runs.
const systemdRuns = "/run/systemd/system"

// deployment is a node with a pod of stock containerd, on which podfsm-deploy works. The test is its systemd.
type deployment struct {
	*installation
	program  string      // podfsm-deploy
	requests chan string // of systemctl
	restarts int
}

// podfsm-deploy replaces containerd and gives it back. Whatever fails on the way, the node has the containerd that it had before.
func TestDeploy(t *testing.T) {
	t.Parallel()
	d := startDeployment(t)
	d.refuse()
	d.rollBack()
	d.rollBackForSystemd()
	d.install()
	d.upgradeAndRollBack()
	d.giveUpUninstallation()
	d.uninstall()
	require.NoError(t, d.old.StopAndRemove(t.Context()))
}

func startDeployment(t *testing.T) *deployment {
	t.Helper()
	d := &deployment{installation: startMachine(t), requests: make(chan string)}
	for _, dir := range []string{deployDir, systemdRuns, "/image", serviceAccount} {
		require.NoError(t, os.MkdirAll(d.m.path(dir), 0o755))
	}
	d.program = filepath.Join(t.TempDir(), "podfsm-deploy")
	build := osexec.CommandContext(t.Context(), "go", "build", "-o", d.program, "../cmd/podfsm-deploy")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.NoError(t, copyFile(d.program, d.m.path("/image/podfsm-deploy"), 0o755))
	out, err = osexec.CommandContext(t.Context(), "../deploy/package/tree", "1.2.3", "1795529540", stripped(t), d.m.path("/image/podfsm")).CombinedOutput()
	require.NoError(t, err, "%s", out)
	d.m.do(t, "cp", "-a", "/image/podfsm", deployDir+"/payload")
	// A config.toml with secrets, behind a symlink.
	d.m.do(t, "sh", "-c", "cd /etc/containerd && mv config.toml real.toml && chmod 600 real.toml && ln -s real.toml config.toml")
	d.m.do(t, "cp", "/image/podfsm-deploy", deployDir)
	require.NoError(t, os.WriteFile(d.m.path("/usr/local/sbin/systemd-run"), []byte(systemdRun), 0o755))
	require.NoError(t, os.WriteFile(d.m.path("/usr/local/sbin/systemctl"), []byte(systemctl), 0o755))
	for _, fifo := range []string{"/run/requests", "/run/results", "/run/switched"} {
		require.NoError(t, unix.Mkfifo(d.m.path(fifo), 0o600))
	}
	// Open for both, so that the file doesn't end when systemctl does.
	requests, err := os.OpenFile(d.m.path("/run/requests"), os.O_RDWR, 0)
	require.NoError(t, err)
	t.Cleanup(func() { requests.Close() })
	go func() {
		for lines := bufio.NewScanner(requests); lines.Scan(); {
			d.requests <- lines.Text()
		}
	}()
	return d
}

func copyFile(from, to string, mode os.FileMode) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, content, mode)
}

// ask has podfsm-deploy do something and restarts containerd for it, and returns what it says.
func (d *deployment) ask(command string, env ...string) (string, error) {
	return d.start(command, env, func(*osexec.Cmd) bool { return d.Restart(d.Context()) == nil })
}

// start has podfsm-deploy do something. restart is called when it wants containerd to be restarted, and says whether that has worked.
func (d *deployment) start(command string, env []string, restart func(*osexec.Cmd) bool) (string, error) {
	var said bytes.Buffer
	cmd := d.command(&said, command, env...)
	require.NoError(d, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	err := attend(d, ended, func() bool { return restart(cmd) })
	if err != nil {
		err = fmt.Errorf("podfsm-deploy switch %s: %w: %s", command, err, &said)
	}
	return said.String(), err
}

// command is podfsm-deploy on the machine.
func (d *deployment) command(said io.Writer, command string, env ...string) *osexec.Cmd {
	args := []string{"--target", fmt.Sprint(d.m.holder), "--mount", "--", "env", "CONTAINERD_ADDRESS=" + d.Socket(), "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd := osexec.CommandContext(d.Context(), "nsenter", append(append(args, env...), deployDir+"/podfsm-deploy", "switch", command)...)
	cmd.Stdout, cmd.Stderr = said, said
	return cmd
}

// attend restarts containerd when systemctl is asked to, until something is done.
func attend[T any](d *deployment, done <-chan T, restart func() bool) T {
	for {
		select {
		case result := <-done:
			return result
		case request := <-d.requests:
			if request != "restart" {
				d.asSystemdRun(request)
				continue
			}
			d.restarts++
			result := "failed\n"
			if restart() {
				result = "ok\n"
			}
			require.NoError(d, os.WriteFile(d.m.path("/run/results"), []byte(result), 0o600))
		}
	}
}

// asSystemdRun does what systemd-run would be told to.
func (d *deployment) asSystemdRun(args string) {
	require.Equal(d, "--unit=podfsm-switch --collect --wait --quiet --description=Switch containerd for podfsm "+
		"--property=ExecStopPost=-"+deployDir+"/podfsm-deploy switch rollback --property=TimeoutStopSec=10min --setenv=CONTAINERD_ADDRESS="+
		d.Socket()+" "+deployDir+"/podfsm-deploy switch install", args)
	said, err := d.ask("install")
	require.NoError(d, err)
	require.Contains(d, said, "a pod has run")
	require.NoError(d, os.WriteFile(d.m.path("/run/switched"), []byte("ok\n"), 0o600))
}

// runPod runs podfsm-deploy's pod until it labels the node, and returns the patch.
func (d *deployment) runPod() string {
	done := make(chan string, 1)
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1"}`)
		done <- fmt.Sprintln(r.Method, r.URL.Path, r.Header.Get("Authorization"), string(body), err)
	}))
	defer server.Close()
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	for name, content := range map[string][]byte{"ca.crt": certificate, "token": []byte("token")} {
		require.NoError(d, os.WriteFile(d.m.path(serviceAccount+"/"+name), content, 0o600))
	}
	host, port, err := net.SplitHostPort(server.Listener.Addr().String())
	require.NoError(d, err)
	var said bytes.Buffer
	cmd := osexec.CommandContext(d.Context(), "nsenter", "--target", fmt.Sprint(d.m.holder), "--mount", "--", "env", "CONTAINERD_ADDRESS="+d.Socket(),
		"NODE_NAME=node", "KUBERNETES_SERVICE_HOST="+host, "KUBERNETES_SERVICE_PORT="+port,
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-c", podScript)
	cmd.Stdout, cmd.Stderr = &said, &said
	require.NoError(d, cmd.Start())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		err := cmd.Wait()
		done <- fmt.Sprintf("the pod has ended: %v: %s", err, &said)
	}()
	patch := attend(d, done, func() bool { return d.Restart(d.Context()) == nil })
	_ = cmd.Process.Kill() // unless it has ended, which patch tells
	<-ended
	return patch
}

// requireStock sees that nothing of podfsm is on the node.
func (d *deployment) requireStock() {
	d.Helper()
	d.requireRuns("/usr/local/bin/containerd")
	d.requireReady(d.old)
	require.DirExists(d, d.m.path(systemdRuns))
	require.Empty(d, strings.TrimSpace(d.m.do(d.T, "sh", "-c",
		"find /usr /etc /run/systemd -xdev -path '*podfsm*' -not -path '*/.build/*' -newer /systemd; ls -d "+deployDir+"/backup "+deployDir+"/installation.json 2>/dev/null || true")))
}

// payload changes a file of the payload, and changes it back when the returned function is called.
func (d *deployment) payload(file, content string) (restore func()) {
	path := d.m.path(deployDir + "/payload" + file)
	before, err := os.ReadFile(path)
	require.NoError(d, err)
	require.NoError(d, os.WriteFile(path, []byte(content), 0o644))
	return func() { require.NoError(d, os.WriteFile(path, before, 0o644)) }
}

// refuse has a node that some other installation has podfsm on, and one with a config.toml that can't be edited safely.
func (d *deployment) refuse() {
	require.NoError(d, os.WriteFile(d.m.path("/usr/bin/containerd-podfsm"), nil, 0o755))
	_, err := d.ask("install")
	require.ErrorContains(d, err, "podfsm is installed already")
	require.NoError(d, os.Remove(d.m.path("/usr/bin/containerd-podfsm")))

	require.NoError(d, d.m.configure(d.Node, func(config map[string]any) { config["imports"] = []string{"/etc/containerd/other/*.toml"} }))
	_, err = d.ask("install")
	require.ErrorContains(d, err, `has other imports; add "/etc/containerd/conf.d/*.toml" to them`)
	require.NoError(d, d.m.configure(d.Node, func(map[string]any) {}))
	require.Zero(d, d.restarts)
	d.requireStock()
}

// rollBack has a containerd that doesn't start.
func (d *deployment) rollBack() {
	before, err := os.ReadFile(d.m.path("/etc/containerd/config.toml"))
	require.NoError(d, err)
	restore := d.payload(dropIn, "[Service]\nExecStart=\nExecStart=/bin/false\n")
	said, err := d.ask("install")
	require.ErrorContains(d, err, `failed to run "systemctl restart containerd"`)
	require.Contains(d, said, "rolled back: containerd is as it was")
	restore()
	require.Equal(d, 2, d.restarts)
	d.requireStock()
	after, err := os.ReadFile(d.m.path("/etc/containerd/config.toml"))
	require.NoError(d, err)
	require.Equal(d, string(before), string(after))
}

// rollBackForSystemd has a switch that is killed when podfsm's containerd doesn't start, so that no pod can start. systemd rolls back.
func (d *deployment) rollBackForSystemd() {
	restore := d.payload(dropIn, "[Service]\nExecStart=\nExecStart=/bin/false\n")
	_, err := d.start("install", nil, func(cmd *osexec.Cmd) bool {
		require.Error(d, d.Restart(d.Context()))
		return cmd.Process.Kill() != nil
	})
	require.ErrorContains(d, err, "killed")
	restore()
	require.FileExists(d, d.m.path("/run/systemd/system/containerd.service.d/podfsm.conf"))
	require.NoFileExists(d, d.m.path(dropIn), "a power cut would make containerd the node's own")
	said, err := d.ask("rollback")
	require.NoError(d, err)
	require.Contains(d, said, "an earlier switch was interrupted")
	d.requireStock()
	said, err = d.ask("rollback")
	require.NoError(d, err)
	require.Empty(d, said, "there is nothing to roll back")

	restore = d.payload("/usr/bin/podfsm", "#!/bin/sh\nexit 1\n") // a preflight that fails
	restarts := d.restarts
	_, err = d.ask("install")
	require.ErrorContains(d, err, `failed to run "/usr/bin/podfsm handler`)
	require.Equal(d, restarts, d.restarts)
	restore()
	d.requireStock()
}

// install has podfsm run a pod, and does nothing the second time.
func (d *deployment) install() {
	require.Equal(d, `PATCH /api/v1/nodes/node Bearer token {"metadata":{"labels":{"podfsm.io/installed":"true"}}} <nil>`+"\n", d.runPod())
	d.requireRuns("/usr/bin/containerd-podfsm")
	d.requireReady(d.old)
	require.FileExists(d, d.m.path(dropIn))
	require.NoFileExists(d, d.m.path("/run/systemd/system/containerd.service.d/podfsm.conf"))
	d.pod = startPod(d.T, d.Node, harness.PodfsmHandler, d.PodConfig("pod"))
	startContainer(d.T, d.pod, "main")

	before := d.restarts
	said, err := d.ask("install")
	require.NoError(d, err)
	require.Contains(d, said, "a pod has run")
	require.Contains(d, said, "this release runs already")
	require.Equal(d, before, d.restarts)
}

// upgradeAndRollBack has a release that doesn't start. The one before comes back, with its pod.
func (d *deployment) upgradeAndRollBack() {
	restore := d.payload("/usr/bin/containerd-podfsm", "#!/bin/sh\nexit 1\n")
	_, err := d.ask("install")
	require.ErrorContains(d, err, `failed to run "systemctl restart containerd"`)
	restore()
	d.requireRuns("/usr/bin/containerd-podfsm")
	d.requireReady(d.old)
	d.requireReady(d.pod)

	// A second switch waits for the first one.
	restore = d.payload("/usr/share/podfsm/runtimeclass.yaml", "# of another release\n")
	var said bytes.Buffer
	second := d.command(&said, "install")
	_, err = d.start("install", nil, func(*osexec.Cmd) bool { return second.Start() == nil && d.Restart(d.Context()) == nil })
	require.NoError(d, err)
	require.NoError(d, second.Wait())
	require.Contains(d, said.String(), "this release runs already")
	restore()
	d.requireReady(d.pod)
	text, err := os.ReadFile(d.m.path("/usr/share/podfsm/runtimeclass.yaml"))
	require.NoError(d, err)
	require.Equal(d, "# of another release\n", string(text))
}

// giveUpUninstallation ends an uninstallation that waits for a pod. An installation takes pods again.
func (d *deployment) giveUpUninstallation() {
	d.payload("/usr/share/podfsm/runtimeclass.yaml", "# of another release\n")
	cmd := d.command(io.Discard, "uninstall")
	require.NoError(d, cmd.Start())
	require.EventuallyWithT(d, func(c *assert.CollectT) {
		log, err := os.ReadFile(d.m.path(deployDir + "/log"))
		require.NoError(c, err)
		require.Regexp(c, `waiting for 1 sandbox:\n(.*\n)*.*default/pod`, string(log), "podfsm-deploy's pod shows this")
	}, 20*time.Second, 50*time.Millisecond)
	require.NoError(d, cmd.Process.Signal(unix.SIGTERM))
	require.Error(d, cmd.Wait())
	d.requireReady(d.pod)
	said, err := d.ask("install")
	require.NoError(d, err)
	require.Contains(d, said, "podfsm takes new pods again")
	require.Contains(d, said, "a pod has run")
}

// uninstall ends podfsm's pod, as it is told to, and leaves nothing.
func (d *deployment) uninstall() {
	said, err := d.ask("uninstall", "PODFSM_DRAIN_FORCE=1")
	require.NoError(d, err)
	require.Regexp(d, `gone: \S+ default/pod`, said)
	d.requireStock()
	d.requireNoLedger()
	require.FileExists(d, d.m.path("/etc/containerd/config.toml"))
	require.Equal(d, "real.toml\n600\n", d.m.do(d.T, "sh", "-c", "cd /etc/containerd && readlink config.toml && stat --format %a real.toml"))
	require.Equal(d, "lock log", strings.Join(strings.Fields(d.m.do(d.T, "ls", deployDir)), " "))
	require.NoError(d, copyFile(d.program, d.m.path(deployDir+"/podfsm-deploy"), 0o755))
	said, err = d.ask("uninstall")
	require.NoError(d, err)
	require.Contains(d, said, "has not installed podfsm")
	require.NoFileExists(d, d.m.path(deployDir+"/podfsm-deploy"))
	d.RequireClean(d.T, d.before)
}
