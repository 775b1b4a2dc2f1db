package integration

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// outcome is what a caller was told: a class and a text, or an answer.
type outcome struct{ class, text string }

// oddRun asks for a pod that the kubelet never asks for.
type oddRun func(*runtime.RunPodSandboxRequest)

// podOdd changes the configuration alone.
func podOdd(change harness.PodOption) oddRun {
	return func(r *runtime.RunPodSandboxRequest) { change(r.Config) }
}

// oddRuns are requests for pods that can't be, or hardly.
func oddRuns() map[string]oddRun {
	mode := func(set func(*runtime.NamespaceOption)) oddRun {
		return podOdd(func(c *runtime.PodSandboxConfig) { set(nsOptions(c)) })
	}
	users := func(set func(*runtime.UserNamespace)) oddRun {
		return mode(func(o *runtime.NamespaceOption) { set(o.UsernsOptions) })
	}
	annotation := func(key, value string) oddRun {
		return podOdd(func(c *runtime.PodSandboxConfig) { c.Annotations = map[string]string{key: value} })
	}
	seccomp := func(p *runtime.SecurityProfile) oddRun {
		return podOdd(func(c *runtime.PodSandboxConfig) { security(c).Seccomp = p })
	}
	sysctl := func(key, value string) oddRun {
		return podOdd(func(c *runtime.PodSandboxConfig) { c.Linux.Sysctls = map[string]string{key: value} })
	}
	return map[string]oddRun{
		"nothing at all":     func(r *runtime.RunPodSandboxRequest) { proto.Reset(r) },
		"no configuration":   func(r *runtime.RunPodSandboxRequest) { r.Config = nil },
		"no metadata":        podOdd(func(c *runtime.PodSandboxConfig) { c.Metadata = nil }),
		"no Linux section":   podOdd(func(c *runtime.PodSandboxConfig) { c.Linux = nil }),
		"empty Linux":        podOdd(func(c *runtime.PodSandboxConfig) { c.Linux = &runtime.LinuxPodSandboxConfig{} }),
		"empty metadata":     podOdd(func(c *runtime.PodSandboxConfig) { c.Metadata = &runtime.PodSandboxMetadata{} }),
		"no name":            podOdd(func(c *runtime.PodSandboxConfig) { c.Metadata.Name = "" }),
		"no uid":             podOdd(func(c *runtime.PodSandboxConfig) { c.Metadata.Uid = "" }),
		"odd name":           podOdd(func(c *runtime.PodSandboxConfig) { c.Metadata.Name = "../a b\n;=" }),
		"unknown handler":    func(r *runtime.RunPodSandboxRequest) { r.RuntimeHandler = "nobody" },
		"network CONTAINER":  mode(func(o *runtime.NamespaceOption) { o.Network = runtime.NamespaceMode_CONTAINER }),
		"network TARGET":     mode(func(o *runtime.NamespaceOption) { o.Network = runtime.NamespaceMode_TARGET }),
		"ipc CONTAINER":      mode(func(o *runtime.NamespaceOption) { o.Ipc = runtime.NamespaceMode_CONTAINER }),
		"pid TARGET":         mode(func(o *runtime.NamespaceOption) { o.Pid = runtime.NamespaceMode_TARGET }),
		"a mode of tomorrow": mode(func(o *runtime.NamespaceOption) { o.Network = 77 }),
		"userns CONTAINER":   users(func(u *runtime.UserNamespace) { u.Mode = runtime.NamespaceMode_CONTAINER }),
		"userns TARGET":      users(func(u *runtime.UserNamespace) { u.Mode = runtime.NamespaceMode_TARGET }),
		"no mappings":        users(func(u *runtime.UserNamespace) { u.Uids, u.Gids = nil, nil }),
		"only uids":          users(func(u *runtime.UserNamespace) { u.Gids = nil }),
		"length 0":           users(func(u *runtime.UserNamespace) { u.Uids[0].Length, u.Gids[0].Length = 0, 0 }),
		"two mappings": users(func(u *runtime.UserNamespace) {
			u.Uids = append(u.Uids, &runtime.IDMapping{ContainerId: 65536, HostId: 1 << 30, Length: 65536})
			u.Gids = u.Uids
		}),
		"node's users with a mapping": users(func(u *runtime.UserNamespace) { u.Mode = runtime.NamespaceMode_NODE }),
		"unknown sysctl":              sysctl("net.ipv4.nonsense", "1"),
		"sysctl of the node":          sysctl("vm.swappiness", "1"),
		"sysctl that is no value":     sysctl("net.ipv4.ip_forward", "maybe"),
		"sysctl on the node's network": podOdd(func(c *runtime.PodSandboxConfig) {
			harness.HostNetwork()(c)
			c.Linux.Sysctls = map[string]string{"net.ipv4.ip_forward": "1"}
		}),
		"seccomp profile missing": seccomp(&runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: "/nowhere.json"}),
		"seccomp without a path":  seccomp(&runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost}),
		"seccomp that is no JSON": seccomp(&runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: "/etc/hostname"}),
		"seccomp of tomorrow":     seccomp(&runtime.SecurityProfile{ProfileType: 77}),
		"old seccomp field": podOdd(func(c *runtime.PodSandboxConfig) {
			//lint:ignore SA1019 older clients send it
			security(c).Seccomp, security(c).SeccompProfilePath = nil, "garbage"
		}),
		"SELinux label in pieces": podOdd(func(c *runtime.PodSandboxConfig) { security(c).SelinuxOptions = &runtime.SELinuxOption{User: "u"} }),
		"group without user":      podOdd(func(c *runtime.PodSandboxConfig) { security(c).RunAsGroup = &runtime.Int64Value{Value: 7} }),
		"negative user":           podOdd(func(c *runtime.PodSandboxConfig) { security(c).RunAsUser = &runtime.Int64Value{Value: -7} }),
		"user outside the mapping": podOdd(func(c *runtime.PodSandboxConfig) {
			security(c).RunAsUser = &runtime.Int64Value{Value: 70000}
		}),
		"cgroup parent with NUL": podOdd(func(c *runtime.PodSandboxConfig) { c.Linux.CgroupParent += "\x00" }),
		"long hostname":          podOdd(func(c *runtime.PodSandboxConfig) { c.Hostname = strings.Repeat("h", 65) }),
		"huge label":             podOdd(func(c *runtime.PodSandboxConfig) { c.Labels = map[string]string{"k": strings.Repeat("v", 5000)} }),
		"huge annotation":        annotation("example.com/huge", strings.Repeat("v", 1<<20)),
		"bandwidth of no number": annotation("kubernetes.io/ingress-bandwidth", "wide"),
		"bandwidth too small":    annotation("kubernetes.io/egress-bandwidth", "1"),
		"untrusted workload":     annotation("io.kubernetes.cri.untrusted-workload", "true"),
		"privileged in a user namespace": podOdd(func(c *runtime.PodSandboxConfig) {
			security(c).Privileged = true
		}),
		"hostname on the node's network": podOdd(func(c *runtime.PodSandboxConfig) {
			harness.HostNetwork()(c)
			c.Hostname = "web"
		}),
		"a pod that is there already": podOdd(func(c *runtime.PodSandboxConfig) {
			c.Metadata = &runtime.PodSandboxMetadata{Name: "base", Namespace: "default", Uid: "uid-of-base"}
		}),
	}
}

// client is what odd calls are made with.
type client struct {
	ctx   context.Context
	t     *testing.T
	n     *harness.Node
	pod   *harness.Pod       // runs
	main  *harness.Container // runs in it
	ended *harness.Container // has run in it
	other *harness.Container // runs in another pod
}

// create asks for a container in the pod, and starts it.
func (c *client) create(change func(*runtime.CreateContainerRequest)) (proto.Message, error) {
	r := &runtime.CreateContainerRequest{
		PodSandboxId: c.pod.ID,
		Config: &runtime.ContainerConfig{
			Metadata: &runtime.ContainerMetadata{Name: "odd"},
			Image:    &runtime.ImageSpec{Image: harness.BusyboxImage},
			Command:  []string{"true"},
			LogPath:  "odd.log",
			Linux: &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{
				NamespaceOptions: proto.CloneOf(nsOptions(c.pod.Config)),
			}},
		},
		SandboxConfig: proto.CloneOf(c.pod.Config),
	}
	change(r)
	created, err := c.n.Runtime.CreateContainer(c.ctx, r)
	if err != nil {
		return nil, err
	}
	_, err = c.n.Runtime.StartContainer(c.ctx, &runtime.StartContainerRequest{ContainerId: created.GetContainerId()})
	_, removeErr := c.n.Runtime.RemoveContainer(c.ctx, &runtime.RemoveContainerRequest{ContainerId: created.GetContainerId()})
	require.NoError(c.t, removeErr)
	return &runtime.StartContainerResponse{}, err
}

// oddCall is a call that the kubelet never makes.
type oddCall func(*client) (proto.Message, error)

const nobody = "1234567890123456789012345678901234567890123456789012345678901234"

// oddContainers ask for containers that can't be, or hardly.
func oddContainers() map[string]oddCall {
	all := map[string]oddCall{}
	containerOdd := func(name string, change func(*client, *runtime.ContainerConfig)) {
		all["container: "+name] = func(c *client) (proto.Message, error) {
			return c.create(func(r *runtime.CreateContainerRequest) { change(c, r.Config) })
		}
	}
	for name, change := range map[string]func(*runtime.CreateContainerRequest){
		"nothing at all":       func(r *runtime.CreateContainerRequest) { proto.Reset(r) },
		"no configuration":     func(r *runtime.CreateContainerRequest) { r.Config = nil },
		"no pod configuration": func(r *runtime.CreateContainerRequest) { r.SandboxConfig = nil },
		"no pod metadata":      func(r *runtime.CreateContainerRequest) { r.SandboxConfig.Metadata = nil },
		"unknown pod":          func(r *runtime.CreateContainerRequest) { r.PodSandboxId = nobody },
		"pod by a short id":    func(r *runtime.CreateContainerRequest) { r.PodSandboxId = r.PodSandboxId[:10] },
		"another's configuration": func(r *runtime.CreateContainerRequest) {
			nsOptions(r.SandboxConfig).UsernsOptions.Uids[0].HostId += 65536
		},
	} {
		all["container: "+name] = func(c *client) (proto.Message, error) { return c.create(change) }
	}
	containerOdd("no metadata", func(_ *client, c *runtime.ContainerConfig) { c.Metadata = nil })
	containerOdd("no name", func(_ *client, c *runtime.ContainerConfig) { c.Metadata.Name = "" })
	containerOdd("name that is taken", func(_ *client, c *runtime.ContainerConfig) { c.Metadata.Name = "main" })
	containerOdd("no image", func(_ *client, c *runtime.ContainerConfig) { c.Image = nil })
	containerOdd("unknown image", func(_ *client, c *runtime.ContainerConfig) { c.Image.Image = "podfsm.test/none:1" })
	containerOdd("no Linux section", func(_ *client, c *runtime.ContainerConfig) { c.Linux = nil })
	containerOdd("no command", func(_ *client, c *runtime.ContainerConfig) { c.Command = []string{"/nowhere"} })
	containerOdd("missing volume", func(_ *client, c *runtime.ContainerConfig) {
		c.Mounts = []*runtime.Mount{{HostPath: "/proc/nowhere", ContainerPath: "/v"}}
	})
	containerOdd("missing volume under the pod's ids", func(cl *client, c *runtime.ContainerConfig) {
		users := nsOptions(cl.pod.Config).GetUsernsOptions()
		c.Mounts = []*runtime.Mount{{HostPath: "/proc/nowhere", ContainerPath: "/v", UidMappings: users.GetUids(), GidMappings: users.GetGids()}}
	})
	containerOdd("volume to be made, under the pod's ids", func(cl *client, c *runtime.ContainerConfig) {
		users := nsOptions(cl.pod.Config).GetUsernsOptions()
		c.Mounts = []*runtime.Mount{{HostPath: filepath.Join(cl.t.TempDir(), "a/b"), ContainerPath: "/v", UidMappings: users.GetUids(), GidMappings: users.GetGids()}}
	})
	containerOdd("volume without a path", func(_ *client, c *runtime.ContainerConfig) { c.Mounts = []*runtime.Mount{{ContainerPath: "/v"}} })
	containerOdd("mount of tomorrow", func(_ *client, c *runtime.ContainerConfig) {
		c.Mounts = []*runtime.Mount{{HostPath: "/etc/hostname", ContainerPath: "/v", Propagation: 77}}
	})
	containerOdd("shared volume", func(cl *client, c *runtime.ContainerConfig) {
		c.Mounts = []*runtime.Mount{{HostPath: cl.n.Dir(), ContainerPath: "/v", Propagation: runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL}}
	})
	for name, mount := range map[string]*runtime.Mount{
		"image volume that can be written": {ContainerPath: "/v", Image: &runtime.ImageSpec{Image: harness.BusyboxImage}},
		"image volume with a path":         {ContainerPath: "/v", Readonly: true, HostPath: "/etc", Image: &runtime.ImageSpec{Image: harness.BusyboxImage}},
		"image volume of an unknown image": {ContainerPath: "/v", Readonly: true, Image: &runtime.ImageSpec{Image: "podfsm.test/none:1"}},
		"image volume of no image":         {ContainerPath: "/v", Readonly: true, Image: &runtime.ImageSpec{}},
		"image volume of a missing path":   {ContainerPath: "/v", Readonly: true, Image: &runtime.ImageSpec{Image: harness.BusyboxImage}, ImageSubPath: "../../nowhere"},
	} {
		containerOdd(name, func(_ *client, c *runtime.ContainerConfig) { c.Mounts = []*runtime.Mount{proto.CloneOf(mount)} })
	}
	containerOdd("unknown device", func(_ *client, c *runtime.ContainerConfig) {
		c.Devices = []*runtime.Device{{HostPath: "/dev/nowhere", ContainerPath: "/dev/x", Permissions: "rwm"}}
	})
	containerOdd("unknown CDI device", func(_ *client, c *runtime.ContainerConfig) { c.CDIDevices = []*runtime.CDIDevice{{Name: "a.b/c=d"}} })
	containerOdd("unknown capability", func(_ *client, c *runtime.ContainerConfig) {
		c.Linux.SecurityContext.Capabilities = &runtime.Capability{AddCapabilities: []string{"FLY"}}
	})
	containerOdd("privileged", func(_ *client, c *runtime.ContainerConfig) { c.Linux.SecurityContext.Privileged = true })
	containerOdd("unknown user", func(_ *client, c *runtime.ContainerConfig) { c.Linux.SecurityContext.RunAsUsername = "nobody-else" })
	containerOdd("user outside the mapping", func(_ *client, c *runtime.ContainerConfig) {
		c.Linux.SecurityContext.RunAsUser = &runtime.Int64Value{Value: 70000}
	})
	containerOdd("group without user", func(_ *client, c *runtime.ContainerConfig) {
		c.Linux.SecurityContext.RunAsGroup = &runtime.Int64Value{Value: 7}
	})
	containerOdd("seccomp profile missing", func(_ *client, c *runtime.ContainerConfig) {
		c.Linux.SecurityContext.Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: "/nowhere.json"}
	})
	containerOdd("AppArmor profile missing", func(_ *client, c *runtime.ContainerConfig) {
		c.Linux.SecurityContext.Apparmor = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: "none"}
	})
	containerOdd("stop signal of tomorrow", func(_ *client, c *runtime.ContainerConfig) { c.StopSignal = 777 })
	containerOdd("negative memory", func(_ *client, c *runtime.ContainerConfig) {
		c.Linux.Resources = &runtime.LinuxContainerResources{MemoryLimitInBytes: -5}
	})
	containerOdd("too little memory", func(_ *client, c *runtime.ContainerConfig) {
		c.Linux.Resources = &runtime.LinuxContainerResources{MemoryLimitInBytes: 1}
	})
	containerOdd("the node's users", func(_ *client, c *runtime.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &runtime.UserNamespace{Mode: runtime.NamespaceMode_NODE}
	})
	containerOdd("the node's network", func(_ *client, c *runtime.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Network = runtime.NamespaceMode_NODE
	})
	for name, target := range map[string]func(*client) string{
		"nothing to look into":             func(*client) string { return "" },
		"an unknown one to look into":      func(*client) string { return nobody },
		"one that has ended to look into":  func(c *client) string { return c.ended.ID },
		"one of another pod to look into":  func(c *client) string { return c.other.ID },
		"one with a short id to look into": func(c *client) string { return c.main.ID[:12] },
	} {
		containerOdd(name, func(cl *client, c *runtime.ContainerConfig) {
			options := c.Linux.SecurityContext.NamespaceOptions
			options.Pid, options.TargetId = runtime.NamespaceMode_TARGET, target(cl)
		})
	}
	return all
}

// oddCalls name what isn't there, or isn't what it should be.
func oddCalls() map[string]oddCall {
	all := map[string]oddCall{}
	for name, id := range map[string]func(*client) string{
		"nobody":      func(*client) string { return nobody },
		"no id":       func(*client) string { return "" },
		"a path":      func(*client) string { return "../" },
		"a container": func(c *client) string { return c.main.ID },
	} {
		for method, call := range podCalls(id) {
			all[method+" of "+name] = call
		}
	}
	for name, id := range map[string]func(*client) string{
		"nobody":             func(*client) string { return nobody },
		"no id":              func(*client) string { return "" },
		"a pod":              func(c *client) string { return c.pod.ID },
		"one that has ended": func(c *client) string { return c.ended.ID },
		"one that runs":      func(c *client) string { return c.main.ID[:20] },
	} {
		for method, call := range containerCalls(id) {
			all[method+" of "+name] = call
		}
	}
	all["forward into a pod by a short id"] = func(c *client) (proto.Message, error) {
		return c.n.Runtime.PortForward(c.ctx, &runtime.PortForwardRequest{PodSandboxId: c.pod.ID[:10], Port: []int32{0, -1, 70000}})
	}
	all["update of a pod by nothing"] = func(c *client) (proto.Message, error) {
		return c.n.Runtime.UpdatePodSandboxResources(c.ctx, &runtime.UpdatePodSandboxResourcesRequest{PodSandboxId: c.pod.ID})
	}
	all["status of a pod updated by nothing"] = func(c *client) (proto.Message, error) {
		resp, err := c.n.Runtime.PodSandboxStatus(c.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: c.pod.ID, Verbose: true})
		return &runtime.PodSandboxStatusResponse{Status: resp.GetStatus()}, err
	}
	all["list of pods in an odd state"] = func(c *client) (proto.Message, error) {
		return c.n.Runtime.ListPodSandbox(c.ctx, &runtime.ListPodSandboxRequest{
			Filter: &runtime.PodSandboxFilter{State: &runtime.PodSandboxStateValue{State: 77}},
		})
	}
	for name, filter := range map[string]*runtime.PodSandboxFilter{
		"an unknown id":    {Id: nobody},
		"an unknown label": {LabelSelector: map[string]string{"io.kubernetes.pod.uid": "none"}},
	} {
		all["list of pods by "+name] = func(c *client) (proto.Message, error) {
			return c.n.Runtime.ListPodSandbox(c.ctx, &runtime.ListPodSandboxRequest{Filter: filter})
		}
		all["stats of pods by "+name] = func(c *client) (proto.Message, error) {
			return c.n.Runtime.ListPodSandboxStats(c.ctx, &runtime.ListPodSandboxStatsRequest{
				Filter: &runtime.PodSandboxStatsFilter{Id: filter.GetId(), LabelSelector: filter.GetLabelSelector()},
			})
		}
	}
	return all
}

// podCalls are the calls about a pod. Those that end it are for pods that there aren't.
func podCalls(id func(*client) string) map[string]oddCall {
	return map[string]oddCall{
		"stop": func(c *client) (proto.Message, error) {
			return c.n.Runtime.StopPodSandbox(c.ctx, &runtime.StopPodSandboxRequest{PodSandboxId: id(c)})
		},
		"removal": func(c *client) (proto.Message, error) {
			return c.n.Runtime.RemovePodSandbox(c.ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id(c)})
		},
		"status": func(c *client) (proto.Message, error) {
			return c.n.Runtime.PodSandboxStatus(c.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: id(c)})
		},
		"verbose status": func(c *client) (proto.Message, error) {
			return c.n.Runtime.PodSandboxStatus(c.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: id(c), Verbose: true})
		},
		"stats": func(c *client) (proto.Message, error) {
			return c.n.Runtime.PodSandboxStats(c.ctx, &runtime.PodSandboxStatsRequest{PodSandboxId: id(c)})
		},
		"update": func(c *client) (proto.Message, error) {
			return c.n.Runtime.UpdatePodSandboxResources(c.ctx, &runtime.UpdatePodSandboxResourcesRequest{PodSandboxId: id(c)})
		},
		"forward": func(c *client) (proto.Message, error) {
			return c.n.Runtime.PortForward(c.ctx, &runtime.PortForwardRequest{PodSandboxId: id(c)})
		},
	}
}

// containerCalls are the calls about a container, all of which leave one that runs as it is.
func containerCalls(id func(*client) string) map[string]oddCall {
	return map[string]oddCall{
		"start": func(c *client) (proto.Message, error) {
			return c.n.Runtime.StartContainer(c.ctx, &runtime.StartContainerRequest{ContainerId: id(c)})
		},
		"exec without a stream": func(c *client) (proto.Message, error) {
			return c.n.Runtime.Exec(c.ctx, &runtime.ExecRequest{ContainerId: id(c), Cmd: []string{"true"}})
		},
		"exec on a terminal with stderr": func(c *client) (proto.Message, error) {
			return c.n.Runtime.Exec(c.ctx, &runtime.ExecRequest{ContainerId: id(c), Cmd: []string{"true"}, Tty: true, Stdout: true, Stderr: true})
		},
		"attach without a stream": func(c *client) (proto.Message, error) {
			return c.n.Runtime.Attach(c.ctx, &runtime.AttachRequest{ContainerId: id(c)})
		},
		"exec of nothing": func(c *client) (proto.Message, error) {
			return c.n.Runtime.ExecSync(c.ctx, &runtime.ExecSyncRequest{ContainerId: id(c)})
		},
		"exec of a missing program": func(c *client) (proto.Message, error) {
			return c.n.Runtime.ExecSync(c.ctx, &runtime.ExecSyncRequest{ContainerId: id(c), Cmd: []string{"/nowhere"}})
		},
		"exec that lasts": func(c *client) (proto.Message, error) {
			return c.n.Runtime.ExecSync(c.ctx, &runtime.ExecSyncRequest{ContainerId: id(c), Cmd: []string{"sleep", "100"}, Timeout: 1})
		},
		"new log": func(c *client) (proto.Message, error) {
			return c.n.Runtime.ReopenContainerLog(c.ctx, &runtime.ReopenContainerLogRequest{ContainerId: id(c)})
		},
		"update by nothing": func(c *client) (proto.Message, error) {
			return c.n.Runtime.UpdateContainerResources(c.ctx, &runtime.UpdateContainerResourcesRequest{ContainerId: id(c)})
		},
		"update to too little": func(c *client) (proto.Message, error) {
			return c.n.Runtime.UpdateContainerResources(c.ctx, &runtime.UpdateContainerResourcesRequest{
				ContainerId: id(c), Linux: &runtime.LinuxContainerResources{MemoryLimitInBytes: 1},
			})
		},
		"checkpoint": func(c *client) (proto.Message, error) {
			return c.n.Runtime.CheckpointContainer(c.ctx, &runtime.CheckpointContainerRequest{ContainerId: id(c), Location: c.n.Dir() + "/checkpoint.tar"})
		},
	}
}

// outcomesOf makes all odd calls on a node of their own, one at a time, and sees that none leaves anything behind that fails.
func outcomesOf(t *testing.T, handler string) map[string]outcome {
	t.Helper()
	n := harness.StartNode(t, harness.Config{})
	require.NoError(t, n.SetChain(t.Context(), bridge(n, "cni0", harness.Subnet)))
	// containerd keeps this directory once there was an image for a volume.
	require.NoError(t, os.MkdirAll(filepath.Join(n.Dir(), "state/io.containerd.grpc.v1.cri/image-volumes"), 0o755))
	before, err := n.WarmUp(t.Context(), handler)
	require.NoError(t, err)
	c := &client{ctx: t.Context(), t: t, n: n}
	run := func(name string, options ...harness.ContainerOption) (pod *harness.Pod, main *harness.Container) {
		pod, err := n.RunPod(c.ctx, handler, n.PodConfig(name))
		require.NoError(t, err)
		return pod, startContainer(t, pod, "main", options...)
	}
	// An image for a volume stays mounted until its pod stops, whatever becomes of the container.
	c.pod, c.main = run("base", func(c *runtime.ContainerConfig) {
		c.Mounts = []*runtime.Mount{{ContainerPath: "/image", Readonly: true, Image: &runtime.ImageSpec{Image: harness.BusyboxImage}}}
	})
	otherPod, other := run("other")
	c.other = other
	c.ended = startContainer(t, c.pod, "ended", harness.Run("true"))
	waitExit(t, c.ended)
	with, err := n.Census(c.ctx)
	require.NoError(t, err)

	told := map[string]outcome{}
	note := func(name string, answer proto.Message, err error) {
		names := strings.NewReplacer(n.Dir(), "NODE", n.Name(), "NODE", c.main.ID, "MAIN", c.main.ID[:20], "MAIN", c.pod.ID, "POD", otherPod.ID, "OTHERPOD", c.ended.ID, "ENDED", other.ID, "OTHER")
		told[name] = outcomeOf(names, answer, err)
	}
	for name, change := range oddRuns() {
		r := &runtime.RunPodSandboxRequest{Config: n.PodConfig("odd"), RuntimeHandler: handler}
		change(r)
		resp, err := n.Runtime.RunPodSandbox(c.ctx, r)
		note("run: "+name, &runtime.RunPodSandboxResponse{}, err)
		if err == nil {
			require.NoError(t, n.FindPod(resp.GetPodSandboxId(), r.Config).StopAndRemove(c.ctx))
		}
	}
	n.RequireClean(t, with)
	for _, calls := range []map[string]oddCall{oddContainers(), oddCalls()} {
		for name, call := range calls {
			answer, err := call(c)
			note(name, answer, err)
		}
		n.RequireClean(t, with)
	}
	require.NoError(t, otherPod.StopAndRemove(c.ctx))
	require.NoError(t, c.pod.StopAndRemove(c.ctx))
	n.RequireClean(t, before)
	return told
}

// outcomeOf is an outcome without what differs from call to call, and without who of the two has come how far.
func outcomeOf(names *strings.Replacer, answer proto.Message, err error) outcome {
	if err != nil {
		failed := status.Convert(err)
		return outcome{failed.Code().String(), failedTo.ReplaceAllString(chance.ReplaceAllString(names.Replace(failed.Message()), "…"), "")}
	}
	text, err := protojson.Marshal(answer)
	if err != nil {
		return outcome{"no message", err.Error()}
	}
	return outcome{"OK", chance.ReplaceAllString(names.Replace(strings.ReplaceAll(string(text), " ", "")), "…")}
}

var (
	// chance is what differs from call to call: ids, ports, secrets, times, handlers, amounts of memory.
	chance = regexp.MustCompile(`[0-9a-f]{64}|127\.0\.0\.1:\d+/\w+/[^"]*|"createdAt":"\d+"|"runtimeHandler":"\w+"|current usage: \d+, peak usage: \d+`)
	// failedTo is what each of the two puts before the error of a part that both have.
	failedTo = regexp.MustCompile(`^failed to start sandbox "…": failed to create containerd (task|container): |` +
		`^step \w+ of pod "default/odd" failed: failed to create the pause (task|container) of sandbox "ID": `)
)

// betterRefusals are the calls that podfsm answers otherwise: what the class was and is, and what the text says.
var betterRefusals = map[string]struct{ stock, ours, text string }{
	"run: no configuration":                         {"Unknown", "InvalidArgument", "no metadata"},
	"run: no metadata":                              {"Unknown", "InvalidArgument", "no metadata"},
	"run: userns CONTAINER":                         {"Unknown", "InvalidArgument", "ask for POD or NODE"},
	"run: userns TARGET":                            {"Unknown", "InvalidArgument", "ask for POD or NODE"},
	"run: no mappings":                              {"Unknown", "InvalidArgument", "0 uid mappings"},
	"run: only uids":                                {"Unknown", "InvalidArgument", "0 gid mappings"},
	"run: two mappings":                             {"Unknown", "InvalidArgument", "2 uid mappings"},
	"run: length 0":                                 {"Unknown", "InvalidArgument", "map at least one id"},
	"run: node's users with a mapping":              {"Unknown", "InvalidArgument", "leave them out or ask for mode POD"},
	"run: seccomp of tomorrow":                      {"Unknown", "InvalidArgument", "seccomp profile type 77"},
	"run: old seccomp field":                        {"Unknown", "InvalidArgument", `"garbage" is none of`},
	"run: group without user":                       {"Unknown", "InvalidArgument", "without a user"},
	"run: negative user":                            {"Unknown", "InvalidArgument", "-7 is out of the range"},
	"run: cgroup parent with NUL":                   {"Unknown", "InvalidArgument", "has a line break or a NUL"},
	"run: bandwidth of no number":                   {"Unknown", "InvalidArgument", "can't be told to CNI plugins: annotation kubernetes.io/ingress-bandwidth"},
	"run: bandwidth too small":                      {"Unknown", "InvalidArgument", "can't be told to CNI plugins: annotation kubernetes.io/egress-bandwidth"},
	"run: untrusted workload":                       {"Unknown", "InvalidArgument", "name a handler instead"},
	"run: unknown handler":                          {"InvalidArgument", "InvalidArgument", "nobody"}, // whose handler it is, nobody knows
	"run: a pod that is there already":              {"FailedPrecondition", "AlreadyExists", "a new sandbox needs a new attempt"},
	"container: missing volume under the pod's ids": {"Unknown", "FailedPrecondition", "can't have its volume"},
	"run: long hostname":                            {"Unknown", "InvalidArgument", "has 65 bytes; choose one of at most 64"},
	"run: user outside the mapping":                 {"Unknown", "InvalidArgument", "it runs as user 70000, beyond the 65536 ids of its user namespace"},
	"run: hostname on the node's network":           {"Unknown", "InvalidArgument", `"web" would be the node's`},
	"container: user outside the mapping":           {"Unknown", "InvalidArgument", "it runs as user 70000, beyond the 65536 ids of its user namespace"},
	"run: sysctl of the node":                       {"Unknown", "InvalidArgument", `sysctl "vm.swappiness" is not of a namespace`},
	"run: sysctl on the node's network":             {"Unknown", "InvalidArgument", `sysctl "net.ipv4.ip_forward" would change the node's`},
	"run: sysctl that is no value":                  {"Unknown", "InvalidArgument", `net.ipv4.ip_forward = "maybe"`},
	"run: unknown sysctl":                           {"Unknown", "InvalidArgument", "net.ipv4.nonsense"},
	// Stock gives the pod's profile to pause, too. Ours has its own filter, and the profile is for the pod's containers.
	"run: seccomp that is no JSON": {"Unknown", "OK", ""},
	"run: seccomp profile missing": {"Unknown", "OK", ""},
	"run: seccomp without a path":  {"Unknown", "OK", ""},
	// Stock runs these: a mode that it doesn't know counts as POD, and the name of a pod goes to plugins as it is.
	"run: network CONTAINER":  {"OK", "InvalidArgument", "a sandbox has POD or NODE"},
	"run: network TARGET":     {"OK", "InvalidArgument", "a sandbox has POD or NODE"},
	"run: a mode of tomorrow": {"OK", "InvalidArgument", "a sandbox has POD or NODE"},
	"run: ipc CONTAINER":      {"OK", "InvalidArgument", "a sandbox has POD or NODE"},
	"run: pid TARGET":         {"OK", "InvalidArgument", "a sandbox has POD, CONTAINER or NODE"},
	"run: odd name":           {"OK", "InvalidArgument", "can't be told to CNI plugins: K8S_POD_NAME"},
}

// A caller who asks for what can't be, or names what isn't there, is told the same, but for the refusals above; and nothing is left of it.
func TestOddRequestsLikeStock(t *testing.T) {
	stock, ours := outcomesOf(t, harness.StockHandler), outcomesOf(t, harness.PodfsmHandler)
	require.Len(t, ours, len(stock))
	require.Greater(t, len(stock), 150)
	for name, want := range stock {
		got := ours[name]
		better, deliberate := betterRefusals[name]
		switch {
		case !deliberate && got != want:
			t.Errorf("%s\n\tstock: %s\n\tours:  %s", name, want, got)
		case deliberate && (want.class != better.stock || got.class != better.ours || !strings.Contains(got.text, better.text)):
			t.Errorf("%s isn't as it is listed\n\tstock: %s\n\tours:  %s", name, want, got)
		}
	}
	for name := range betterRefusals {
		require.Contains(t, stock, name)
	}
}
