// Package kubelet runs the real kubelet on a node of the harness: standalone,
// without an API server, with static pods.
package kubelet

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/integration/harness"
)

const (
	// startTimeout is how long the kubelet may take until its API serves.
	startTimeout = 60 * time.Second
	stopTimeout  = 20 * time.Second
	apiTimeout   = 10 * time.Second
	pollInterval = 100 * time.Millisecond

	// address is where the kubelet's API listens in the node's network namespace.
	address = "127.0.0.1:10250"
	// nodeName is the kubelet's name for its node. It ends every static pod's name.
	nodeName = "node"
)

// Kubelet is a running kubelet with everything that is its own. Its methods may
// be used from several goroutines, except Close.
type Kubelet struct {
	node   *harness.Node
	dir    string
	cmd    *exec.Cmd
	exited chan struct{}
	api    *http.Client
}

// Start builds the kubelet, which takes minutes the first time, and starts it on
// a node that has run a pod, and so has a bridge, whose address is the node's,
// and the cgroup for those of the kubelet. It returns when the kubelet's API
// serves. Settings are added to its KubeletConfiguration. The caller ends it with
// Close.
func Start(ctx context.Context, n *harness.Node, settings map[string]any) (_ *Kubelet, err error) {
	executable, err := harness.BuildKubelet(ctx)
	if err != nil {
		return nil, err
	}
	k := &Kubelet{
		node:   n,
		dir:    filepath.Join(n.Dir(), "kubelet"),
		exited: make(chan struct{}),
		api: &http.Client{Timeout: apiTimeout, Transport: &http.Transport{
			DialContext:       n.Dial,
			DisableKeepAlives: true,
			// The kubelet has signed its certificate itself.
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		}},
	}
	if err := k.prepare(settings); err != nil {
		return nil, fmt.Errorf("failed to prepare the kubelet: %w", err)
	}
	if err := k.launch(executable); err != nil {
		return nil, errors.Join(fmt.Errorf("failed to start the kubelet: %w", err), k.unshareRoot())
	}
	if err := k.waitReady(ctx); err != nil {
		return nil, errors.Join(err, k.Close(context.WithoutCancel(ctx)))
	}
	return k, nil
}

// prepare makes everything that is there before the kubelet starts.
func (k *Kubelet) prepare(settings map[string]any) error {
	for _, below := range []string{"pods", "root", "logs", "plugins"} {
		if err := os.MkdirAll(k.path(below), 0o711); err != nil {
			return err
		}
	}
	all := k.config()
	maps.Copy(all, settings)
	config, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(k.path("config.json"), config, 0o644); err != nil {
		return err
	}
	if err := k.makeStandIns(); err != nil {
		return err
	}
	return k.shareRoot()
}

// config is what keeps the kubelet within the node, able to run without an API
// server, and quick.
func (k *Kubelet) config() map[string]any {
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
		"cgroupDriver":           "cgroupfs",
		"featureGates":           map[string]bool{"PodAndContainerStatsFromCRI": true}, // not from cgroups
		"cgroupRoot":             "/" + filepath.Base(k.node.Dir()),
		"enforceNodeAllocatable": []string{},
		"oomScoreAdj":            0, // a lower one needs CAP_SYS_RESOURCE
		"makeIPTablesUtilChains": false,

		// A machine for tests may be low on anything.
		"failSwapOn":                  false,
		"imageGCHighThresholdPercent": 100,
		"evictionHard":                map[string]string{"memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%", "imagefs.inodesFree": "0%"},

		"syncFrequency":      "1s",
		"fileCheckFrequency": "1s",
		"crashLoopBackOff":   map[string]any{"maxContainerRestartPeriod": "1s"},
		"logging":            map[string]any{"verbosity": 4}, // shows each sync
	}
}

func (k *Kubelet) launch(executable string) error {
	log, err := os.Create(k.path("kubelet.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	k.cmd = exec.Command(executable,
		"--config="+k.path("config.json"),
		"--root-dir="+k.path("root"),
		"--cert-dir="+k.path("pki"),
		"--hostname-override="+nodeName,
		"--node-ip="+harness.Gateway)
	k.cmd.Stdout, k.cmd.Stderr, k.cmd.Dir = log, log, k.dir
	err = k.node.Inside(func() error {
		if err := k.enterView(); err != nil {
			return err
		}
		return k.cmd.Start()
	})
	if err != nil {
		return err
	}
	go func() {
		defer close(k.exited)
		_ = k.cmd.Wait() // its outcome is in cmd.ProcessState
	}()
	return nil
}

func (k *Kubelet) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		_, err := k.Pods(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-k.exited:
			return fmt.Errorf("the kubelet ended: %v; the end of its log:\n%s", k.cmd.ProcessState, k.LogTail(30))
		case <-ctx.Done():
			return fmt.Errorf("the kubelet does not serve within %v: %w; the end of its log:\n%s", startTimeout, err, k.LogTail(30))
		case <-time.After(pollInterval):
		}
	}
}

// Close ends the kubelet and removes what it does not remove itself. Pods run
// on. The error names what could not be removed. To close it twice is no error.
func (k *Kubelet) Close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	if err := k.cmd.Process.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("failed to signal the kubelet: %w", err)
	}
	select {
	case <-k.exited:
	case <-ctx.Done():
		return fmt.Errorf("the kubelet does not end on SIGTERM: %w", ctx.Err())
	}
	return errors.Join(k.unshareRoot(), k.removeQoSCgroups())
}

// Log returns what the kubelet has logged so far.
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

// Run makes the kubelet run a static pod. The manifest is a v1.Pod in YAML, and
// name the one in its metadata.
func (k *Kubelet) Run(name, manifest string) error {
	// The kubelet ignores files that begin with a dot.
	next := k.path("pods/." + name)
	if err := os.WriteFile(next, []byte(manifest), 0o644); err != nil {
		return err
	}
	return os.Rename(next, k.manifest(name))
}

// Remove makes the kubelet end a static pod.
func (k *Kubelet) Remove(name string) error { return os.Remove(k.manifest(name)) }

func (k *Kubelet) manifest(name string) string { return k.path("pods/" + name + ".yaml") }

// Pod is what the kubelet says of a pod.
type Pod struct {
	Metadata struct{ Name, UID string }
	Status   struct {
		Phase             string
		PodIP             string
		Conditions        []struct{ Type, Status string }
		ContainerStatuses []ContainerStatus
	}
}

// ContainerStatus is what the kubelet says of a container.
type ContainerStatus struct {
	Name         string
	ContainerID  string // "containerd://" and the id
	Ready        bool
	RestartCount int
}

// Name returns the pod's name in its manifest.
func (p *Pod) Name() string { return strings.TrimSuffix(p.Metadata.Name, "-"+nodeName) }

// Ready tells whether the kubelet holds the pod for ready: all containers run
// and their readiness probes succeed.
func (p *Pod) Ready() bool {
	for _, c := range p.Status.Conditions {
		if c.Type == "Ready" {
			return c.Status == "True"
		}
	}
	return false
}

// Pods returns the pods that the kubelet knows, by their name in the manifest.
func (k *Kubelet) Pods(ctx context.Context) (map[string]*Pod, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.URL("/pods"), nil)
	if err != nil {
		return nil, err
	}
	resp, err := k.api.Do(req)
	if err != nil {
		return nil, fmt.Errorf("failed to ask the kubelet for its pods: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the kubelet answers %q to the question for its pods", resp.Status)
	}
	var list struct{ Items []*Pod }
	if err := json.NewDecoder(resp.Body).Decode(&list); err != nil {
		return nil, fmt.Errorf("failed to read the kubelet's pods: %w", err)
	}
	pods := map[string]*Pod{}
	for _, p := range list.Items {
		pods[p.Name()] = p
	}
	return pods, nil
}

// URL returns the address of a path of the kubelet's API, as it is reached from
// the node.
func (k *Kubelet) URL(path string) string { return "https://" + address + path }

// Syncs returns how often the kubelet has brought a pod to its desired state and
// found it there, or not.
func (k *Kubelet) Syncs(name string) int {
	line := regexp.MustCompile(`"SyncPod exit" pod="default/` + regexp.QuoteMeta(name+"-"+nodeName) + `"`)
	return len(line.FindAllString(k.Log(), -1))
}

func (k *Kubelet) path(below string) string { return filepath.Join(k.dir, below) }
