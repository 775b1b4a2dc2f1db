// Package kubelet runs the real kubelet on a node of the harness: in a cluster,
// or standalone, without an API server, with static pods.
package kubelet

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/integration/harness"
)

const (
	// startTimeout bounds the start of the kubelet until its API serves.
	startTimeout = 60 * time.Second
	stopTimeout  = 20 * time.Second
	apiTimeout   = 10 * time.Second
	pollInterval = 100 * time.Millisecond

	// address is the address of the kubelet's API in the network namespace of the node.
	address = "127.0.0.1:10250"
	// NodeName is the name of the kubelet's node. The name of every static pod ends with it.
	NodeName = "node"
)

// Config configures a kubelet. The zero value is the standalone kubelet of the tools.
type Config struct {
	Executable string         // "" is that of BuildKubelet
	Kubeconfig string         // of the API server that has the pods
	Settings   map[string]any // added to the KubeletConfiguration
}

// Kubelet is a kubelet with its own files. Its methods are safe for concurrent use, except for
// those that start and end it.
type Kubelet struct {
	node    *harness.Node
	config  Config
	dir     string
	running *process // nil while it is down
	api     *http.Client
}

// process is the process of a kubelet, whose end is awaited from its start.
type process struct {
	cmd    *exec.Cmd
	exited chan struct{}
}

// New starts the kubelet on a node that has run a pod and so has a bridge, whose address becomes
// that of the node. If c has no executable, New builds the kubelet, which takes minutes the first
// time. It returns when the API of the kubelet serves. The caller must Close it.
func New(ctx context.Context, n *harness.Node, c Config) (*Kubelet, error) {
	if c.Executable == "" {
		executable, err := harness.BuildKubelet(ctx)
		if err != nil {
			return nil, err
		}
		c.Executable = executable
	}
	k := &Kubelet{
		node:   n,
		config: c,
		dir:    filepath.Join(n.Dir(), "kubelet"),
		api: &http.Client{Transport: &http.Transport{
			DialContext:       n.Dial,
			DisableKeepAlives: true,
			// The certificate of the kubelet is self-signed.
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		}},
	}
	if err := k.prepare(); err != nil {
		return nil, fmt.Errorf("failed to prepare the kubelet: %w", err)
	}
	if err := k.Start(ctx); err != nil {
		return nil, errors.Join(err, k.Close(context.WithoutCancel(ctx)))
	}
	return k, nil
}

// Start starts a kubelet that is down and waits until its API serves. The files and volumes of the
// earlier kubelet stay.
func (k *Kubelet) Start(ctx context.Context) error {
	running, err := k.launch()
	if err != nil {
		return fmt.Errorf("failed to start the kubelet: %w", err)
	}
	k.running = running
	return k.waitReady(ctx)
}

// Stop ends the kubelet by SIGTERM. Pods continue to run.
func (k *Kubelet) Stop(ctx context.Context) error { return k.end(ctx, unix.SIGTERM) }

// Kill ends the kubelet by SIGKILL. Pods continue to run.
func (k *Kubelet) Kill(ctx context.Context) error { return k.end(ctx, unix.SIGKILL) }

// Close ends the kubelet and removes what it leaves. Pods continue to run. The error names what
// could not be removed. Closing it twice is no error.
func (k *Kubelet) Close(ctx context.Context) error {
	if err := k.Stop(ctx); err != nil {
		return err
	}
	return errors.Join(k.unshareRoot(), k.removeQoSCgroups())
}

func (k *Kubelet) end(ctx context.Context, signal syscall.Signal) error {
	if k.running == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, harness.Patience(stopTimeout))
	defer cancel()
	if err := k.running.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("failed to signal the kubelet: %w", err)
	}
	select {
	case <-k.running.exited:
		k.running = nil
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the kubelet did not end after %v: %w", signal, ctx.Err())
	}
}

// prepare makes what must exist before the kubelet starts.
func (k *Kubelet) prepare() error {
	for _, below := range []string{"pods", "root", "logs", "plugins"} {
		if err := os.MkdirAll(k.path(below), 0o711); err != nil {
			return err
		}
	}
	settings := k.settings()
	maps.Copy(settings, k.config.Settings)
	config, err := json.MarshalIndent(settings, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(k.path("config.json"), config, 0o644); err != nil {
		return err
	}
	if err := k.makeStandIns(); err != nil {
		return err
	}
	if err := k.node.MakeCgroup(); err != nil {
		return fmt.Errorf("failed to make the cgroup of the pods: %w", err)
	}
	return k.shareRoot()
}

// settings keep the kubelet within the node, let it run without an API server, and make it quick.
func (k *Kubelet) settings() map[string]any {
	host, port, _ := strings.Cut(address, ":")
	return map[string]any{
		"apiVersion":               "kubelet.config.k8s.io/v1beta1",
		"kind":                     "KubeletConfiguration",
		"containerRuntimeEndpoint": "unix://" + k.node.Socket(),
		"staticPodPath":            k.path("pods"),
		"podLogsDir":               k.path("logs"),
		"volumePluginDir":          k.path("plugins"),

		"clusterDNS":     []string{"10.96.0.10"},
		"clusterDomain":  "cluster.local",
		"address":        host,
		"port":           json.Number(port),
		"healthzPort":    0,
		"authentication": map[string]any{"anonymous": map[string]any{"enabled": true}, "webhook": map[string]any{"enabled": false}},
		"authorization":  map[string]any{"mode": "AlwaysAllow"},

		"failCgroupV1":           false,
		"cgroupDriver":           harness.CgroupDriver(),
		"featureGates":           map[string]bool{"PodAndContainerStatsFromCRI": true}, // not from cgroups
		"cgroupRoot":             "/" + filepath.Base(k.node.Dir()),
		"enforceNodeAllocatable": []string{},
		"oomScoreAdj":            0, // a lower one needs CAP_SYS_RESOURCE
		"makeIPTablesUtilChains": false,

		// A test machine may be low on any resource.
		"failSwapOn":                  false,
		"imageGCHighThresholdPercent": 100,
		"evictionHard":                map[string]string{"memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%", "imagefs.inodesFree": "0%"},

		"syncFrequency":      "1s",
		"fileCheckFrequency": "1s",
		"crashLoopBackOff":   map[string]any{"maxContainerRestartPeriod": "1s"},
		"logging":            map[string]any{"verbosity": 4}, // shows each sync
	}
}

func (k *Kubelet) launch() (*process, error) {
	log, err := os.OpenFile(k.path("kubelet.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	args := []string{
		"--config=" + k.path("config.json"),
		"--root-dir=" + k.path("root"),
		"--cert-dir=" + k.path("pki"),
		"--hostname-override=" + NodeName,
		"--node-ip=" + harness.Gateway,
		// The kubelet takes a container that is created and not started yet for a dead one. With the
		// default of 1 it may remove the last state of a container that restarts on a slow machine.
		"--maximum-dead-containers-per-container=2",
	}
	if k.config.Kubeconfig != "" {
		args = append(args, "--kubeconfig="+k.config.Kubeconfig)
	}
	cmd := exec.Command(k.config.Executable, args...)
	cmd.Env = append(os.Environ(), "PATH="+k.path("bin")+":"+os.Getenv("PATH"))
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, k.dir
	err = k.node.Inside(func() error {
		if err := k.enterView(); err != nil {
			return err
		}
		return cmd.Start()
	})
	if err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, exited: make(chan struct{})}
	go func() {
		defer close(p.exited)
		_ = cmd.Wait() // cmd.ProcessState has the outcome
	}()
	return p, nil
}

func (k *Kubelet) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, harness.Patience(startTimeout))
	defer cancel()
	for {
		_, err := k.Pods(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-k.running.exited:
			return fmt.Errorf("the kubelet ended: %v; the end of its log:\n%s", k.running.cmd.ProcessState, k.LogTail(30))
		case <-ctx.Done():
			return fmt.Errorf("the kubelet does not serve within %v: %w; the end of its log:\n%s", harness.Patience(startTimeout), err, k.LogTail(30))
		case <-time.After(pollInterval):
		}
	}
}

// Log returns the log of all kubelets of this node so far.
func (k *Kubelet) Log() string {
	log, err := os.ReadFile(k.path("kubelet.log"))
	if err != nil {
		return err.Error()
	}
	return string(log)
}

// LogTail returns the last lines of the log.
func (k *Kubelet) LogTail(lines int) string {
	all := strings.Split(strings.TrimSpace(k.Log()), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// Run runs a static pod. The manifest is a v1.Pod in YAML, and name is the one in its metadata.
func (k *Kubelet) Run(name, manifest string) error {
	// The kubelet ignores files that begin with a dot.
	next := k.path("pods/." + name)
	if err := os.WriteFile(next, []byte(manifest), 0o644); err != nil {
		return err
	}
	return os.Rename(next, k.manifest(name))
}

// Remove ends a static pod.
func (k *Kubelet) Remove(name string) error { return os.Remove(k.manifest(name)) }

func (k *Kubelet) manifest(name string) string { return k.path("pods/" + name + ".yaml") }

// Pod is a pod in the API of the kubelet.
type Pod struct {
	Metadata struct{ Name, UID string }
	Status   struct {
		Phase                 string
		PodIP                 string
		Conditions            []struct{ Type, Status string }
		InitContainerStatuses []ContainerStatus
		ContainerStatuses     []ContainerStatus
	}
}

// ContainerStatus is the status of a container in the API of the kubelet.
type ContainerStatus struct {
	Name         string
	ContainerID  string // "containerd://" and the id
	Ready        bool
	RestartCount int
}

// Name returns the pod's name in its manifest.
func (p *Pod) Name() string { return strings.TrimSuffix(p.Metadata.Name, "-"+NodeName) }

// Ready reports whether the pod is ready for the kubelet: all containers run, and their readiness
// probes succeed.
func (p *Pod) Ready() bool {
	for _, c := range p.Status.Conditions {
		if c.Type == "Ready" {
			return c.Status == "True"
		}
	}
	return false
}

// Pods returns the pods of the kubelet by their names in the manifests.
func (k *Kubelet) Pods(ctx context.Context) (map[string]*Pod, error) {
	var list struct{ Items []*Pod }
	if err := k.GetJSON(ctx, "/pods", &list); err != nil {
		return nil, err
	}
	pods := map[string]*Pod{}
	for _, p := range list.Items {
		pods[p.Name()] = p
	}
	return pods, nil
}

// Get requests a path of the kubelet's API, with its query. Any status except for 200 is an error.
// The caller closes the body, and cancels ctx if the body is endless.
func (k *Kubelet) Get(ctx context.Context, path string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.URL(path), nil)
	if err != nil {
		return nil, err
	}
	resp, err := k.api.Do(req)
	if err != nil {
		return nil, fmt.Errorf("failed to get %q from the kubelet: %w", path, err)
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		text, _ := io.ReadAll(resp.Body)
		return nil, fmt.Errorf("failed to get %q from the kubelet: %s: %s", path, resp.Status, text)
	}
	return resp.Body, nil
}

// GetJSON decodes an answer of the kubelet's API into value, within apiTimeout.
func (k *Kubelet) GetJSON(ctx context.Context, path string, value any) error {
	ctx, cancel := context.WithTimeout(ctx, harness.Patience(apiTimeout))
	defer cancel()
	body, err := k.Get(ctx, path)
	if err != nil {
		return err
	}
	defer body.Close()
	if err := json.NewDecoder(body).Decode(value); err != nil {
		return fmt.Errorf("failed to read the kubelet's answer for %q: %w", path, err)
	}
	return nil
}

// URL returns the address of a path of the kubelet's API for requests from the node.
func (k *Kubelet) URL(path string) string { return "https://" + address + path }

// PodPath returns the path of the kubelet's API for an action on a pod, such as "exec", and on one
// of its containers if it is named.
func PodPath(verb, name string, container ...string) string {
	return path.Join(append([]string{"/", verb, "default", name + "-" + NodeName}, container...)...)
}

// VolumePath returns the path of a volume of a pod on the node, by the kind of the volume, such as
// "empty-dir".
func (k *Kubelet) VolumePath(p *Pod, kind, volume string) string {
	return filepath.Join(k.path("root/pods"), p.Metadata.UID, "volumes", "kubernetes.io~"+kind, volume)
}

// Syncs returns how often the kubelet has synced a pod, whether or not that succeeded.
func (k *Kubelet) Syncs(name string) int {
	return k.AllSyncs()["default/"+name+"-"+NodeName]
}

var syncExit = regexp.MustCompile(`"SyncPod exit" pod="([^"]*)"`)

// AllSyncs returns the Syncs of all pods, by namespace, slash and name.
func (k *Kubelet) AllSyncs() map[string]int {
	syncs := map[string]int{}
	for _, match := range syncExit.FindAllStringSubmatch(k.Log(), -1) {
		syncs[match[1]]++
	}
	return syncs
}

func (k *Kubelet) path(below string) string { return filepath.Join(k.dir, below) }
