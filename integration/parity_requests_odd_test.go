package integration

import (
	"maps"
	"path/filepath"
	"strings"

	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// oddRun asks for a pod that the kubelet never asks for.
type oddRun func(*runtime.RunPodSandboxRequest)

// podOdd changes the configuration alone.
func podOdd(change harness.PodOption) oddRun {
	return func(r *runtime.RunPodSandboxRequest) { change(r.Config) }
}

// oddRuns are requests for pods that can't be, or hardly.
func oddRuns() map[string]oddRun {
	all := map[string]oddRun{}
	for _, some := range []map[string]oddRun{missingParts(), oddNamespaces(), oddSysctls(), oddSecurity(), oddTexts()} {
		maps.Copy(all, some)
	}
	return all
}

func oddMode(set func(*runtime.NamespaceOption)) oddRun {
	return podOdd(func(c *runtime.PodSandboxConfig) { set(nsOptions(c)) })
}

func oddUsers(set func(*runtime.UserNamespace)) oddRun {
	return oddMode(func(o *runtime.NamespaceOption) { set(o.UsernsOptions) })
}

func oddAnnotation(key, value string) oddRun {
	return podOdd(func(c *runtime.PodSandboxConfig) { c.Annotations = map[string]string{key: value} })
}

func oddSeccomp(p *runtime.SecurityProfile) oddRun {
	return podOdd(func(c *runtime.PodSandboxConfig) { security(c).Seccomp = p })
}

func oddSysctl(key, value string) oddRun {
	return podOdd(func(c *runtime.PodSandboxConfig) { c.Linux.Sysctls = map[string]string{key: value} })
}

// missingParts are requests without something, or with an odd name.
func missingParts() map[string]oddRun {
	return map[string]oddRun{
		"nothing at all":   func(r *runtime.RunPodSandboxRequest) { proto.Reset(r) },
		"no configuration": func(r *runtime.RunPodSandboxRequest) { r.Config = nil },
		"no metadata":      podOdd(func(c *runtime.PodSandboxConfig) { c.Metadata = nil }),
		"no Linux section": podOdd(func(c *runtime.PodSandboxConfig) { c.Linux = nil }),
		"empty Linux":      podOdd(func(c *runtime.PodSandboxConfig) { c.Linux = &runtime.LinuxPodSandboxConfig{} }),
		"empty metadata":   podOdd(func(c *runtime.PodSandboxConfig) { c.Metadata = &runtime.PodSandboxMetadata{} }),
		"no name":          podOdd(func(c *runtime.PodSandboxConfig) { c.Metadata.Name = "" }),
		"no uid":           podOdd(func(c *runtime.PodSandboxConfig) { c.Metadata.Uid = "" }),
		"odd name":         podOdd(func(c *runtime.PodSandboxConfig) { c.Metadata.Name = "../a b\n;=" }),
		"unknown handler":  func(r *runtime.RunPodSandboxRequest) { r.RuntimeHandler = "nobody" },
	}
}

// oddNamespaces are requests for namespaces and mappings that can't be.
func oddNamespaces() map[string]oddRun {
	return map[string]oddRun{
		"network CONTAINER":  oddMode(func(o *runtime.NamespaceOption) { o.Network = runtime.NamespaceMode_CONTAINER }),
		"network TARGET":     oddMode(func(o *runtime.NamespaceOption) { o.Network = runtime.NamespaceMode_TARGET }),
		"ipc CONTAINER":      oddMode(func(o *runtime.NamespaceOption) { o.Ipc = runtime.NamespaceMode_CONTAINER }),
		"pid TARGET":         oddMode(func(o *runtime.NamespaceOption) { o.Pid = runtime.NamespaceMode_TARGET }),
		"a mode of tomorrow": oddMode(func(o *runtime.NamespaceOption) { o.Network = 77 }),
		"userns CONTAINER":   oddUsers(func(u *runtime.UserNamespace) { u.Mode = runtime.NamespaceMode_CONTAINER }),
		"userns TARGET":      oddUsers(func(u *runtime.UserNamespace) { u.Mode = runtime.NamespaceMode_TARGET }),
		"no mappings":        oddUsers(func(u *runtime.UserNamespace) { u.Uids, u.Gids = nil, nil }),
		"only uids":          oddUsers(func(u *runtime.UserNamespace) { u.Gids = nil }),
		"length 0":           oddUsers(func(u *runtime.UserNamespace) { u.Uids[0].Length, u.Gids[0].Length = 0, 0 }),
		"two mappings": oddUsers(func(u *runtime.UserNamespace) {
			u.Uids = append(u.Uids, &runtime.IDMapping{ContainerId: 65536, HostId: 1 << 30, Length: 65536})
			u.Gids = u.Uids
		}),
		"node's users with a mapping": oddUsers(func(u *runtime.UserNamespace) { u.Mode = runtime.NamespaceMode_NODE }),
	}
}

// oddSysctls are requests for sysctls that can't be set.
func oddSysctls() map[string]oddRun {
	return map[string]oddRun{
		"unknown sysctl":          oddSysctl("net.ipv4.nonsense", "1"),
		"sysctl of the node":      oddSysctl("vm.swappiness", "1"),
		"sysctl that is no value": oddSysctl("net.ipv4.ip_forward", "maybe"),
		"sysctl on the node's network": podOdd(func(c *runtime.PodSandboxConfig) {
			harness.HostNetwork()(c)
			c.Linux.Sysctls = map[string]string{"net.ipv4.ip_forward": "1"}
		}),
	}
}

// oddSecurity are requests for profiles, labels and users that can't be.
func oddSecurity() map[string]oddRun {
	return map[string]oddRun{
		"seccomp profile missing": oddSeccomp(&runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: "/nowhere.json"}),
		"seccomp without a path":  oddSeccomp(&runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost}),
		"seccomp that is no JSON": oddSeccomp(&runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: "/etc/hostname"}),
		"seccomp of tomorrow":     oddSeccomp(&runtime.SecurityProfile{ProfileType: 77}),
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
		"privileged in a user namespace": podOdd(func(c *runtime.PodSandboxConfig) {
			security(c).Privileged = true
		}),
	}
}

// oddTexts are requests with texts that are too long or say nothing.
func oddTexts() map[string]oddRun {
	return map[string]oddRun{
		"cgroup parent with NUL": podOdd(func(c *runtime.PodSandboxConfig) { c.Linux.CgroupParent += "\x00" }),
		"long hostname":          podOdd(func(c *runtime.PodSandboxConfig) { c.Hostname = strings.Repeat("h", 65) }),
		"huge label":             podOdd(func(c *runtime.PodSandboxConfig) { c.Labels = map[string]string{"k": strings.Repeat("v", 5000)} }),
		"huge annotation":        oddAnnotation("example.com/huge", strings.Repeat("v", 1<<20)),
		"bandwidth of no number": oddAnnotation("kubernetes.io/ingress-bandwidth", "wide"),
		"bandwidth too small":    oddAnnotation("kubernetes.io/egress-bandwidth", "1"),
		"untrusted workload":     oddAnnotation("io.kubernetes.cri.untrusted-workload", "true"),
		"hostname on the node's network": podOdd(func(c *runtime.PodSandboxConfig) {
			harness.HostNetwork()(c)
			c.Hostname = "web"
		}),
		"a pod that is there already": podOdd(func(c *runtime.PodSandboxConfig) {
			c.Metadata = &runtime.PodSandboxMetadata{Name: "base", Namespace: "default", Uid: "uid-of-base"}
		}),
	}
}

// oddCall is a call that the kubelet never makes.
type oddCall func(*client) (proto.Message, error)

const unknownID = "1234567890123456789012345678901234567890123456789012345678901234"

// oddConfig makes the configuration of a container invalid, or leaves it at the limit.
type oddConfig func(*client, *runtime.ContainerConfig)

// oddContainers are requests for containers that are invalid, or at the limit.
func oddContainers() map[string]oddCall {
	all := map[string]oddCall{}
	for name, change := range oddCreations() {
		all["container: "+name] = func(c *client) (proto.Message, error) { return c.create(change) }
	}
	for _, some := range []map[string]oddConfig{oddPrograms(), oddMounts(), oddImageVolumes(), oddRights(), oddLimits(), oddTargets()} {
		for name, change := range some {
			all["container: "+name] = func(c *client) (proto.Message, error) {
				return c.create(func(r *runtime.CreateContainerRequest) { change(c, r.Config) })
			}
		}
	}
	return all
}

// oddCreations are requests that aren't odd by the container's configuration alone.
func oddCreations() map[string]func(*runtime.CreateContainerRequest) {
	return map[string]func(*runtime.CreateContainerRequest){
		"nothing at all":       func(r *runtime.CreateContainerRequest) { proto.Reset(r) },
		"no configuration":     func(r *runtime.CreateContainerRequest) { r.Config = nil },
		"no pod configuration": func(r *runtime.CreateContainerRequest) { r.SandboxConfig = nil },
		"no pod metadata":      func(r *runtime.CreateContainerRequest) { r.SandboxConfig.Metadata = nil },
		"unknown pod":          func(r *runtime.CreateContainerRequest) { r.PodSandboxId = unknownID },
		"pod by a short id":    func(r *runtime.CreateContainerRequest) { r.PodSandboxId = r.PodSandboxId[:10] },
		"another's configuration": func(r *runtime.CreateContainerRequest) {
			nsOptions(r.SandboxConfig).UsernsOptions.Uids[0].HostId += 65536
		},
	}
}

// oddPrograms are containers without a name, an image or a program.
func oddPrograms() map[string]oddConfig {
	return map[string]oddConfig{
		"no metadata":        func(_ *client, c *runtime.ContainerConfig) { c.Metadata = nil },
		"no name":            func(_ *client, c *runtime.ContainerConfig) { c.Metadata.Name = "" },
		"name that is taken": func(_ *client, c *runtime.ContainerConfig) { c.Metadata.Name = "main" },
		"no image":           func(_ *client, c *runtime.ContainerConfig) { c.Image = nil },
		"unknown image":      func(_ *client, c *runtime.ContainerConfig) { c.Image.Image = "podfsm.test/none:1" },
		"no Linux section":   func(_ *client, c *runtime.ContainerConfig) { c.Linux = nil },
		"no command":         func(_ *client, c *runtime.ContainerConfig) { c.Command = []string{"/nowhere"} },
	}
}

// oddMounts are containers with volumes that can't be.
func oddMounts() map[string]oddConfig {
	return map[string]oddConfig{
		"missing volume": func(_ *client, c *runtime.ContainerConfig) {
			c.Mounts = []*runtime.Mount{{HostPath: "/proc/nowhere", ContainerPath: "/v"}}
		},
		"missing volume under the pod's ids": func(cl *client, c *runtime.ContainerConfig) {
			users := nsOptions(cl.pod.Config).GetUsernsOptions()
			c.Mounts = []*runtime.Mount{{HostPath: "/proc/nowhere", ContainerPath: "/v", UidMappings: users.GetUids(), GidMappings: users.GetGids()}}
		},
		"volume to be made, under the pod's ids": func(cl *client, c *runtime.ContainerConfig) {
			users := nsOptions(cl.pod.Config).GetUsernsOptions()
			c.Mounts = []*runtime.Mount{{HostPath: filepath.Join(cl.t.TempDir(), "a/b"), ContainerPath: "/v", UidMappings: users.GetUids(), GidMappings: users.GetGids()}}
		},
		"volume without a path": func(_ *client, c *runtime.ContainerConfig) { c.Mounts = []*runtime.Mount{{ContainerPath: "/v"}} },
		"mount of tomorrow": func(_ *client, c *runtime.ContainerConfig) {
			c.Mounts = []*runtime.Mount{{HostPath: "/etc/hostname", ContainerPath: "/v", Propagation: 77}}
		},
		"shared volume": func(cl *client, c *runtime.ContainerConfig) {
			c.Mounts = []*runtime.Mount{{HostPath: cl.n.Dir(), ContainerPath: "/v", Propagation: runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL}}
		},
	}
}

// oddImageVolumes are containers with image volumes that can't be.
func oddImageVolumes() map[string]oddConfig {
	all := map[string]oddConfig{}
	for name, mount := range map[string]*runtime.Mount{
		"image volume that can be written": {ContainerPath: "/v", Image: &runtime.ImageSpec{Image: harness.BusyboxImage}},
		"image volume with a path":         {ContainerPath: "/v", Readonly: true, HostPath: "/etc", Image: &runtime.ImageSpec{Image: harness.BusyboxImage}},
		"image volume of an unknown image": {ContainerPath: "/v", Readonly: true, Image: &runtime.ImageSpec{Image: "podfsm.test/none:1"}},
		"image volume of no image":         {ContainerPath: "/v", Readonly: true, Image: &runtime.ImageSpec{}},
		"image volume of a missing path":   {ContainerPath: "/v", Readonly: true, Image: &runtime.ImageSpec{Image: harness.BusyboxImage}, ImageSubPath: "../../nowhere"},
	} {
		all[name] = func(_ *client, c *runtime.ContainerConfig) { c.Mounts = []*runtime.Mount{proto.CloneOf(mount)} }
	}
	return all
}

// oddRights are containers with devices, capabilities, users and profiles that can't be.
func oddRights() map[string]oddConfig {
	return map[string]oddConfig{
		"unknown device": func(_ *client, c *runtime.ContainerConfig) {
			c.Devices = []*runtime.Device{{HostPath: "/dev/nowhere", ContainerPath: "/dev/x", Permissions: "rwm"}}
		},
		"unknown CDI device": func(_ *client, c *runtime.ContainerConfig) { c.CDIDevices = []*runtime.CDIDevice{{Name: "a.b/c=d"}} },
		"unknown capability": func(_ *client, c *runtime.ContainerConfig) {
			c.Linux.SecurityContext.Capabilities = &runtime.Capability{AddCapabilities: []string{"FLY"}}
		},
		"privileged":   func(_ *client, c *runtime.ContainerConfig) { c.Linux.SecurityContext.Privileged = true },
		"unknown user": func(_ *client, c *runtime.ContainerConfig) { c.Linux.SecurityContext.RunAsUsername = "nobody-else" },
		"user outside the mapping": func(_ *client, c *runtime.ContainerConfig) {
			c.Linux.SecurityContext.RunAsUser = &runtime.Int64Value{Value: 70000}
		},
		"group without user": func(_ *client, c *runtime.ContainerConfig) {
			c.Linux.SecurityContext.RunAsGroup = &runtime.Int64Value{Value: 7}
		},
		"seccomp profile missing": func(_ *client, c *runtime.ContainerConfig) {
			c.Linux.SecurityContext.Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: "/nowhere.json"}
		},
		"AppArmor profile missing": func(_ *client, c *runtime.ContainerConfig) {
			c.Linux.SecurityContext.Apparmor = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: "none"}
		},
	}
}

// oddLimits are containers with signals, resources and namespaces that can't be.
func oddLimits() map[string]oddConfig {
	return map[string]oddConfig{
		"stop signal of tomorrow": func(_ *client, c *runtime.ContainerConfig) { c.StopSignal = 777 },
		"negative memory": func(_ *client, c *runtime.ContainerConfig) {
			c.Linux.Resources = &runtime.LinuxContainerResources{MemoryLimitInBytes: -5}
		},
		"too little memory": func(_ *client, c *runtime.ContainerConfig) {
			c.Linux.Resources = &runtime.LinuxContainerResources{MemoryLimitInBytes: 1}
		},
		"the node's users": func(_ *client, c *runtime.ContainerConfig) {
			c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &runtime.UserNamespace{Mode: runtime.NamespaceMode_NODE}
		},
		"the node's network": func(_ *client, c *runtime.ContainerConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Network = runtime.NamespaceMode_NODE
		},
	}
}

// oddTargets are containers that look into the processes of another.
func oddTargets() map[string]oddConfig {
	all := map[string]oddConfig{}
	for name, target := range map[string]func(*client) string{
		"nothing to look into":             func(*client) string { return "" },
		"an unknown one to look into":      func(*client) string { return unknownID },
		"one that has ended to look into":  func(c *client) string { return c.ended.ID },
		"one of another pod to look into":  func(c *client) string { return c.other.ID },
		"one with a short id to look into": func(c *client) string { return c.main.ID[:12] },
	} {
		all[name] = func(cl *client, c *runtime.ContainerConfig) {
			options := c.Linux.SecurityContext.NamespaceOptions
			options.Pid, options.TargetId = runtime.NamespaceMode_TARGET, target(cl)
		}
	}
	return all
}

// oddCalls are calls about missing objects, or objects in the wrong state.
func oddCalls() map[string]oddCall {
	all := map[string]oddCall{}
	for name, id := range map[string]func(*client) string{
		"nobody":      func(*client) string { return unknownID },
		"no id":       func(*client) string { return "" },
		"a path":      func(*client) string { return "../" },
		"a container": func(c *client) string { return c.main.ID },
	} {
		for method, call := range podCalls(id) {
			all[method+" of "+name] = call
		}
	}
	for name, id := range map[string]func(*client) string{
		"nobody":             func(*client) string { return unknownID },
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
		"an unknown id":    {Id: unknownID},
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

// podCalls are the calls about a pod. Those that end a pod are only made for missing pods.
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

// containerCalls are the calls about a container. None of them changes a running container.
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
