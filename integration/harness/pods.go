package harness

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// rangeLength is the number of ids that the kubelet gives a pod.
const rangeLength = 65536

// PodOption changes the request for a pod.
type PodOption func(*runtime.PodSandboxConfig)

// UserNS maps the pod's ids from 0 to length host ids from hostID on.
func UserNS(hostID, length uint32) PodOption {
	return func(c *runtime.PodSandboxConfig) {
		mapping := []*runtime.IDMapping{{ContainerId: 0, HostId: hostID, Length: length}}
		c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &runtime.UserNamespace{
			Mode: runtime.NamespaceMode_POD, Uids: mapping, Gids: mapping,
		}
	}
}

// HostUsers runs a pod in the node's user namespace, in the form that the kubelet sends for
// hostUsers: true and for an unset hostUsers.
func HostUsers() PodOption {
	return func(c *runtime.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &runtime.UserNamespace{Mode: runtime.NamespaceMode_NODE}
	}
}

// HostNetwork runs a pod in the node's network and user namespaces.
func HostNetwork() PodOption {
	return func(c *runtime.PodSandboxConfig) {
		HostUsers()(c)
		c.Linux.SecurityContext.NamespaceOptions.Network = runtime.NamespaceMode_NODE
		c.Hostname = ""
	}
}

// PodConfig returns what the kubelet would send for a pod with hostUsers: false, with ids of no
// other pod of this node.
func (n *Node) PodConfig(name string, options ...PodOption) *runtime.PodSandboxConfig {
	uid := fmt.Sprintf("uid-of-%s", name)
	c := &runtime.PodSandboxConfig{
		Metadata:     &runtime.PodSandboxMetadata{Name: name, Namespace: "default", Uid: uid},
		Hostname:     name,
		LogDirectory: n.path(filepath.Join("logs", "default_"+name+"_"+uid)),
		DnsConfig:    &runtime.DNSConfig{Servers: []string{"10.96.0.10"}, Searches: []string{"default.svc.cluster.local"}, Options: []string{"ndots:5"}},
		Labels: map[string]string{
			"io.kubernetes.pod.name":      name,
			"io.kubernetes.pod.namespace": "default",
			"io.kubernetes.pod.uid":       uid,
		},
		Annotations: map[string]string{"kubernetes.io/config.source": "api"},
		Linux: &runtime.LinuxPodSandboxConfig{
			CgroupParent: n.podCgroup(uid),
			SecurityContext: &runtime.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtime.NamespaceOption{Network: runtime.NamespaceMode_POD, Pid: runtime.NamespaceMode_CONTAINER, Ipc: runtime.NamespaceMode_POD},
				Seccomp:          &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault},
			},
		},
	}
	UserNS(n.ranges.Add(1)*rangeLength, rangeLength)(c)
	for _, option := range options {
		option(c)
	}
	return c
}

// Pod is a pod sandbox.
type Pod struct {
	ID      string
	Config  *runtime.PodSandboxConfig
	Handler string

	node *Node
}

// RunPod runs a pod by a runtime handler. The error is the daemon's own.
func (n *Node) RunPod(ctx context.Context, handler string, config *runtime.PodSandboxConfig) (*Pod, error) {
	if err := os.MkdirAll(config.GetLogDirectory(), 0o755); err != nil {
		return nil, err
	}
	resp, err := n.Runtime.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: config, RuntimeHandler: handler})
	if err != nil {
		return nil, err
	}
	return &Pod{ID: resp.GetPodSandboxId(), Config: config, Handler: handler, node: n}, nil
}

// Status returns the pod's status as CRI shows it.
func (p *Pod) Status(ctx context.Context) (*runtime.PodSandboxStatus, error) {
	resp, err := p.node.Runtime.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: p.ID})
	return resp.GetStatus(), err
}

// Info returns the verbose part of the pod's status.
func (p *Pod) Info(ctx context.Context) (map[string]string, error) {
	resp, err := p.node.Runtime.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: p.ID, Verbose: true})
	return resp.GetInfo(), err
}

// IP returns the pod's main address, or "" when it has none.
func (p *Pod) IP(ctx context.Context) (string, error) {
	status, err := p.Status(ctx)
	return status.GetNetwork().GetIp(), err
}

// FindPod returns the pod with this id, which was requested with config before.
func (n *Node) FindPod(id string, config *runtime.PodSandboxConfig) *Pod {
	return &Pod{ID: id, Config: config, node: n}
}

// Pid returns the host pid of the pod's pause process.
func (p *Pod) Pid(ctx context.Context) (int, error) { return p.node.taskPid(ctx, p.ID) }

// Stop stops the pod.
func (p *Pod) Stop(ctx context.Context) error {
	_, err := p.node.Runtime.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: p.ID})
	return err
}

// Remove removes the pod.
func (p *Pod) Remove(ctx context.Context) error {
	_, err := p.node.Runtime.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.ID})
	return err
}

// StopAndRemove stops and removes the pod, as the kubelet does.
func (p *Pod) StopAndRemove(ctx context.Context) error {
	if err := p.Stop(ctx); err != nil {
		return fmt.Errorf("failed to stop pod %q: %w", p.Config.GetMetadata().GetName(), err)
	}
	if err := p.Remove(ctx); err != nil {
		return fmt.Errorf("failed to remove pod %q: %w", p.Config.GetMetadata().GetName(), err)
	}
	return nil
}

// ContainerOption changes a container before it is created.
type ContainerOption func(*runtime.ContainerConfig)

// Run sets the program of a container, which waits to be killed by default.
func Run(command ...string) ContainerOption {
	return func(c *runtime.ContainerConfig) { c.Command = command }
}

// Image sets the image of a container, which is busybox by default.
func Image(name string) ContainerOption {
	return func(c *runtime.ContainerConfig) { c.Image = &runtime.ImageSpec{Image: name} }
}

// Volume mounts a file or directory of the machine into a container. If the pod has a user
// namespace, the mount has its mapping, as with the kubelet.
func Volume(hostPath, containerPath string) ContainerOption {
	return func(c *runtime.ContainerConfig) {
		users := c.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
		c.Mounts = append(c.Mounts, &runtime.Mount{
			HostPath: hostPath, ContainerPath: containerPath, UidMappings: users.GetUids(), GidMappings: users.GetGids(),
		})
	}
}

// Container is a container that was created.
type Container struct {
	ID  string
	Pod *Pod

	config *runtime.ContainerConfig
}

// StartContainer creates and starts a busybox container in the pod. The error is that of the
// daemon. If the start fails, the created container is returned, too.
func (p *Pod) StartContainer(ctx context.Context, name string, options ...ContainerOption) (*Container, error) {
	c, err := p.CreateContainer(ctx, name, options...)
	if err != nil {
		return nil, err
	}
	_, err = p.node.Runtime.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: c.ID})
	return c, err
}

// CreateContainer creates a busybox container in the namespaces of the pod, as the kubelet does.
// The error is that of the daemon.
func (p *Pod) CreateContainer(ctx context.Context, name string, options ...ContainerOption) (*Container, error) {
	c := containerConfig(p.Config, name, options...)
	created, err := p.node.Runtime.CreateContainer(ctx, &runtime.CreateContainerRequest{
		PodSandboxId: p.ID, Config: c, SandboxConfig: p.Config,
	})
	if err != nil {
		return nil, err
	}
	return &Container{ID: created.GetContainerId(), Pod: p, config: c}, nil
}

// containerConfig returns what the kubelet would send for a busybox container in the namespaces of
// its pod.
func containerConfig(pod *runtime.PodSandboxConfig, name string, options ...ContainerOption) *runtime.ContainerConfig {
	c := &runtime.ContainerConfig{
		Metadata: &runtime.ContainerMetadata{Name: name},
		Image:    &runtime.ImageSpec{Image: BusyboxImage},
		Command:  []string{"tail", "-f", "/dev/null"},
		LogPath:  name + ".log",
		Labels:   pod.GetLabels(),
		Linux: &runtime.LinuxContainerConfig{
			Resources: &runtime.LinuxContainerResources{CpuShares: 2},
			SecurityContext: &runtime.LinuxContainerSecurityContext{
				NamespaceOptions: pod.GetLinux().GetSecurityContext().GetNamespaceOptions(),
				Seccomp:          &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault},
			},
		},
	}
	for _, option := range options {
		option(c)
	}
	c.Image.UserSpecifiedImage = c.Image.Image // CRI-O requires it
	return c
}

// Exec runs a program in the container and returns its stdout. The error has its stderr.
func (c *Container) Exec(ctx context.Context, command ...string) (string, error) {
	resp, err := c.Pod.node.Runtime.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: c.ID, Cmd: command})
	if err != nil {
		return "", err
	}
	if code := resp.GetExitCode(); code != 0 {
		return string(resp.GetStdout()), fmt.Errorf("%q ended with exit code %d: %s", command, code, resp.GetStderr())
	}
	return string(resp.GetStdout()), nil
}

// Log returns the container's log in the format of CRI.
func (c *Container) Log() (string, error) {
	log, err := os.ReadFile(filepath.Join(c.Pod.Config.GetLogDirectory(), c.config.GetLogPath()))
	return string(log), err
}

// Status returns the container's status as CRI shows it.
func (c *Container) Status(ctx context.Context) (*runtime.ContainerStatus, error) {
	resp, err := c.Pod.node.Runtime.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: c.ID})
	return resp.GetStatus(), err
}

// Pid returns the host pid of the container's first process.
func (c *Container) Pid(ctx context.Context) (int, error) { return c.Pod.node.taskPid(ctx, c.ID) }

// Stop stops the container with a grace period in whole seconds.
func (c *Container) Stop(ctx context.Context, grace time.Duration) error {
	_, err := c.Pod.node.Runtime.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: c.ID, Timeout: int64(grace / time.Second)})
	return err
}

// Remove removes the container.
func (c *Container) Remove(ctx context.Context) error {
	_, err := c.Pod.node.Runtime.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: c.ID})
	return err
}

func (n *Node) taskPid(ctx context.Context, id string) (int, error) {
	ctx = namespaces.WithNamespace(ctx, criNamespace)
	resp, err := n.Containerd.TaskService().Get(ctx, &tasks.GetRequest{ContainerID: id})
	return int(resp.GetProcess().GetPid()), err
}
