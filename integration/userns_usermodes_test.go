package integration

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// volumes are directories and files of the host, below one directory.
type volumes string

// groupID is the owning group of a volume, as by fsGroup.
const groupID = 4711

func (v volumes) path(name string) string { return filepath.Join(string(v), name) }

// makeVolumes makes one volume of each kind in the node's directory.
func makeVolumes(t *testing.T, n *harness.Node, name string) volumes {
	t.Helper()
	v := volumes(filepath.Join(n.Dir(), name))
	write := func(file, content string) {
		require.NoError(t, os.MkdirAll(filepath.Dir(v.path(file)), 0o755))
		require.NoError(t, os.WriteFile(v.path(file), []byte(content), 0o644))
	}
	write("dir/of-host", "from the host")
	write("single/file", "one file")
	write("read-only/file", "look, don't touch")
	// A ConfigMap as the kubelet writes it.
	write("config/..2026_01/key", "first")
	require.NoError(t, os.Symlink("..2026_01", v.path("config/..data")))
	require.NoError(t, os.Symlink("..data/key", v.path("config/key")))

	require.NoError(t, os.Mkdir(v.path("memory"), 0o755))
	require.NoError(t, unix.Mount("tmpfs", v.path("memory"), "tmpfs", 0, "size=1M,mode=0777"))

	require.NoError(t, os.Mkdir(v.path("group"), 0o755))
	require.NoError(t, os.Chown(v.path("group"), 0, groupID))
	require.NoError(t, os.Chmod(v.path("group"), 0o775|os.ModeSetgid))

	// A directory of the kubelet that only root can traverse.
	require.NoError(t, os.MkdirAll(v.path("closed/below"), 0o777))
	require.NoError(t, os.Chmod(v.path("closed/below"), 0o777))
	require.NoError(t, os.Chmod(v.path("closed"), 0o750))

	l, err := net.Listen("unix", v.path("socket"))
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	return v
}

// mounted returns the mounts of the volumes for a container.
func (v volumes) mounted(c *runtime.ContainerConfig) {
	for _, name := range []string{"dir", "single/file", "config", "memory", "group", "closed/below", "socket", "missing"} {
		harness.Volume(v.path(name), "/volumes/"+name)(c)
	}
	harness.Volume(v.path("read-only"), "/volumes/read-only")(c)
	c.Mounts[len(c.Mounts)-1].Readonly = true
	// A mount without a mapping stays as it is, except if podfsm maps the pod.
	c.Mounts = append(c.Mounts, &runtime.Mount{HostPath: v.path("closed/below"), ContainerPath: "/volumes/unmapped"})
	harness.Volume("", "/volumes/image")(c)
	c.Mounts[len(c.Mounts)-1].Image = &runtime.ImageSpec{Image: harness.BusyboxImage}
	c.Mounts[len(c.Mounts)-1].Readonly = true
}

// upperDir returns the directory on the host with a container's changes to its root filesystem.
func upperDir(t *testing.T, n *harness.Node, container *harness.Container) string {
	t.Helper()
	rootfs := filepath.Join(n.Dir(), "state/io.containerd.runtime.v2.task/k8s.io", container.ID, "rootfs")
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(rootfs))
	require.NoError(t, err)
	require.Len(t, mounts, 1)
	_, upper, _ := strings.Cut(mounts[0].VFSOptions, "upperdir=")
	upper, _, _ = strings.Cut(upper, ",")
	return upper
}

// Pods of all modes with volumes of all kinds: the owners inside and outside, and the answers to
// the kubelet.
func TestUserModes(t *testing.T) {
	t.Parallel()
	n, _ := startNodeWithModes(t)
	// containerd makes this directory with the first volume from an image, and leaves it.
	require.NoError(t, os.Mkdir(filepath.Join(n.Dir(), "state/io.containerd.grpc.v1.cri/image-volumes"), 0o755))
	before, err := n.Rest(t.Context())
	require.NoError(t, err)
	for _, mode := range append([]userMode{hostUsers}, userModes...) {
		t.Run(mode.name, func(t *testing.T) {
			files := makeVolumes(t, n, strings.ReplaceAll(mode.name, " ", "-"))
			before, err := n.Rest(t.Context())
			require.NoError(t, err)
			t.Run("pod", func(t *testing.T) { requirePodWithVolumes(t, n, mode, files) })
			require.DirExists(t, files.path("missing"), "as containerd makes it")
			require.NoError(t, os.Remove(files.path("missing")))
			require.NoError(t, os.Remove(files.path("memory/shared")))
			n.RequireClean(t, before)
			require.NoError(t, unix.Unmount(files.path("memory"), 0))
			require.NoError(t, os.RemoveAll(string(files)))
		})
	}
	n.RequireClean(t, before)
}

func requirePodWithVolumes(t *testing.T, n *harness.Node, mode userMode, files volumes) {
	t.Helper()
	p := startPodWithVolumes(t, n, mode, files)
	for _, tc := range []struct {
		name string
		test func(*testing.T)
	}{
		{"processes", p.processes},
		{"root filesystem", p.rootFilesystem},
		{"directory", p.directory},
		{"file", p.file},
		{"memory", p.memory},
		{"read-only", p.readOnly},
		{"configuration", p.configuration},
		{"group", p.group},
		{"below a directory that only the host's root may pass", p.closedDirectory},
		{"socket and missing directory", p.socket},
		{"devices", p.devices},
		{"resources", p.resources},
		{"shown as sent", p.shownAsSent},
		{"signals", p.signals},
	} {
		t.Run(tc.name, tc.test)
	}
}

// podWithVolumes is a pod with two containers that share its volumes: the first runs as root, the second as user 1000.
type podWithVolumes struct {
	*harness.Pod
	n             *harness.Node
	files         volumes
	config        *runtime.PodSandboxConfig
	pause         int
	root          uint32 // the host's id for the pod's root
	first, second *harness.Container
	sent          *runtime.ContainerConfig // of the first
}

func startPodWithVolumes(t *testing.T, n *harness.Node, mode userMode, files volumes) *podWithVolumes {
	t.Helper()
	p := &podWithVolumes{n: n, files: files, config: n.PodConfig("pod", mode.option)}
	p.Pod = startPod(t, n, mode.handler, p.config)
	var err error
	p.pause, err = p.Pid(t.Context())
	require.NoError(t, err)
	p.root = mappingOf(t, p.pause)
	require.Equal(t, mode.name == hostUsers.name, p.root == 0)

	p.first = startContainer(t, p.Pod, "first", files.mounted, func(c *runtime.ContainerConfig) {
		c.Command = []string{"sh", "-c", `trap 'echo ended > /volumes/dir/end; exit 7' TERM; touch /volumes/dir/ready; while :; do sleep 0.05; done`}
		p.sent = c
	})
	p.second = startContainer(t, p.Pod, "second", files.mounted, func(c *runtime.ContainerConfig) {
		c.Linux.SecurityContext.RunAsUser = &runtime.Int64Value{Value: 1000}
		c.Linux.SecurityContext.RunAsGroup = &runtime.Int64Value{Value: 1000}
		c.Linux.SecurityContext.SupplementalGroups = []int64{groupID}
	})
	return p
}

func (p *podWithVolumes) processes(t *testing.T) {
	for container, id := range map[*harness.Container]uint32{p.first: p.root, p.second: p.root + 1000} {
		pid, err := container.Pid(t.Context())
		require.NoError(t, err)
		requireOwner(t, fmt.Sprintf("/proc/%d", pid), id, id)
		require.Equal(t, inode(t, nsPath(p.pause, "user")), inode(t, nsPath(pid, "user")))
	}
	require.Equal(t, "uid=0(root) gid=0(root) groups=0(root)\n", exec(t, p.first, "id"))
	require.Equal(t, fmt.Sprintf("uid=1000 gid=1000 groups=%d\n", groupID), strings.ReplaceAll(exec(t, p.second, "id"), "groups=1000,", "groups="))
}

func (p *podWithVolumes) rootFilesystem(t *testing.T) {
	for _, file := range []string{"/bin/busybox", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/volumes/image/bin/busybox"} {
		require.Equal(t, "0:0\n", exec(t, p.first, "stat", "-c", "%u:%g", file), file)
	}
	exec(t, p.first, "touch", "/root/mine")
	requireOwner(t, filepath.Join(upperDir(t, p.n, p.first), "root/mine"), p.root, p.root)
	exec(t, p.second, "touch", "/tmp/mine")
	requireOwner(t, filepath.Join(upperDir(t, p.n, p.second), "tmp/mine"), p.root+1000, p.root+1000)
}

func (p *podWithVolumes) directory(t *testing.T) {
	require.Equal(t, "0:0\n", exec(t, p.first, "stat", "-c", "%u:%g", "/volumes/dir/of-host"))
	exec(t, p.first, "sh", "-c", "echo from first > /volumes/dir/first")
	require.Equal(t, "from first\n", exec(t, p.second, "cat", "/volumes/dir/first"))
	requireOwner(t, p.files.path("dir/first"), 0, 0)
	_, err := p.second.Exec(t.Context(), "touch", "/volumes/dir/second")
	require.ErrorContains(t, err, "Permission denied", "root's directory")
}

func (p *podWithVolumes) file(t *testing.T) {
	exec(t, p.first, "sh", "-c", "echo changed > /volumes/single/file")
	content, err := os.ReadFile(p.files.path("single/file"))
	require.NoError(t, err)
	require.Equal(t, "changed\n", string(content))
	requireOwner(t, p.files.path("single/file"), 0, 0)
}

func (p *podWithVolumes) memory(t *testing.T) {
	exec(t, p.second, "touch", "/volumes/memory/shared")
	require.Equal(t, "1000:1000\n", exec(t, p.first, "stat", "-c", "%u:%g", "/volumes/memory/shared"))
	requireOwner(t, p.files.path("memory/shared"), 1000, 1000)
	exec(t, p.second, "touch", "/dev/shm/greeting")
	require.Equal(t, "1000:1000\n", exec(t, p.first, "stat", "-c", "%u:%g", "/dev/shm/greeting"))
	requireOwner(t, filepath.Join(p.n.Dir(), "state/io.containerd.grpc.v1.cri/sandboxes", p.ID, "shm/greeting"), p.root+1000, p.root+1000)
}

func (p *podWithVolumes) readOnly(t *testing.T) {
	require.Equal(t, "look, don't touch", exec(t, p.first, "cat", "/volumes/read-only/file"))
	for _, file := range []string{"/volumes/read-only/new", "/volumes/image/new"} {
		_, err := p.first.Exec(t.Context(), "touch", file)
		require.ErrorContains(t, err, "Read-only file system")
	}
}

func (p *podWithVolumes) configuration(t *testing.T) {
	require.Equal(t, "first", exec(t, p.second, "cat", "/volumes/config/key"))
	require.Equal(t, "0:0\n", exec(t, p.second, "stat", "-L", "-c", "%u:%g", "/volumes/config/key"))
	require.NoError(t, os.Mkdir(p.files.path("config/..2026_02"), 0o755))
	require.NoError(t, os.WriteFile(p.files.path("config/..2026_02/key"), []byte("second"), 0o644))
	require.NoError(t, os.Symlink("..2026_02", p.files.path("config/..next")))
	require.NoError(t, os.Rename(p.files.path("config/..next"), p.files.path("config/..data")))
	require.Equal(t, "second", exec(t, p.second, "cat", "/volumes/config/key"), "as the kubelet renews it")
}

func (p *podWithVolumes) group(t *testing.T) {
	exec(t, p.second, "touch", "/volumes/group/file")
	requireOwner(t, p.files.path("group/file"), 1000, groupID)
	require.Equal(t, fmt.Sprintf("1000:%d\n", groupID), exec(t, p.first, "stat", "-c", "%u:%g", "/volumes/group/file"))
}

func (p *podWithVolumes) closedDirectory(t *testing.T) {
	exec(t, p.second, "touch", "/volumes/closed/below/file")
	requireOwner(t, p.files.path("closed/below/file"), 1000, 1000)
	exec(t, p.second, "test", "-e", "/volumes/unmapped/file")
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.n.Pid()))
	require.NoError(t, err)
	require.Regexp(t, `(?m)^Groups:\s*$`, string(groups), "containerd has no group that would let it pass")
}

func (p *podWithVolumes) socket(t *testing.T) {
	require.Equal(t, "socket 0:0\n", exec(t, p.first, "stat", "-c", "%F %u:%g", "/volumes/socket"))
	require.Equal(t, "directory 0:0\n", exec(t, p.first, "stat", "-c", "%F %u:%g", "/volumes/missing"))
}

func (p *podWithVolumes) devices(t *testing.T) {
	require.Equal(t, "4\n", exec(t, p.second, "sh", "-c", "echo > /dev/null && head -c 4 /dev/urandom | wc -c"))
}

func (p *podWithVolumes) resources(t *testing.T) {
	_, err := p.n.Runtime.UpdateContainerResources(t.Context(), &runtime.UpdateContainerResourcesRequest{
		ContainerId: p.first.ID, Linux: &runtime.LinuxContainerResources{CpuShares: 512},
	})
	require.NoError(t, err)
}

func (p *podWithVolumes) shownAsSent(t *testing.T) {
	shown, err := p.first.Status(t.Context())
	require.NoError(t, err)
	require.Len(t, shown.GetMounts(), len(p.sent.GetMounts()))
	for i, m := range p.sent.GetMounts() {
		got := shown.GetMounts()[i]
		if m.GetImage() != nil {
			// containerd's service writes where it has mounted the image, and takes the mapping off.
			require.NotEmpty(t, got.GetHostPath())
			require.Empty(t, got.GetUidMappings())
			continue
		}
		require.Equal(t, m.String(), got.String())
	}
	verbose, err := p.n.Runtime.ContainerStatus(t.Context(), &runtime.ContainerStatusRequest{ContainerId: p.first.ID, Verbose: true})
	require.NoError(t, err)
	var info struct {
		Config      *runtime.ContainerConfig
		RuntimeSpec struct {
			Linux struct{ UIDMappings []struct{ HostID uint32 } }
		}
	}
	require.NoError(t, json.Unmarshal([]byte(verbose.GetInfo()["info"]), &info))
	asked := nsOptions(p.config).GetUsernsOptions()
	require.Equal(t, asked.String(), info.Config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions().String())
	if p.root != 0 {
		require.Equal(t, p.root, info.RuntimeSpec.Linux.UIDMappings[0].HostID, "the OCI spec tells the truth")
	}
	podStatus, err := p.Status(t.Context())
	require.NoError(t, err)
	require.Equal(t, asked.String(), podStatus.GetLinux().GetNamespaces().GetOptions().GetUsernsOptions().String())
}

func (p *podWithVolumes) signals(t *testing.T) {
	require.Eventually(t, func() bool {
		_, err := os.Stat(p.files.path("dir/ready"))
		return err == nil
	}, waitFor, tick)
	require.NoError(t, p.first.Stop(t.Context(), 10*time.Second))
	ended, err := p.first.Status(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 7, ended.GetExitCode())
	requireOwner(t, p.files.path("dir/end"), 0, 0)
}

// Mappings survive a restart: those of the containers of a pod are the same before and after.
func TestUserModesOverRestart(t *testing.T) {
	n, before := startNodeWithModes(t)
	t.Run("pods", func(t *testing.T) {
		type of struct {
			pod  *harness.Pod
			root uint32
		}
		var all []of
		var pods []*harness.Pod
		for _, mode := range userModes {
			pod := startPod(t, n, mode.handler, n.PodConfig(mode.name, mode.option))
			startContainer(t, pod, "first")
			pause, err := pod.Pid(t.Context())
			require.NoError(t, err)
			all, pods = append(all, of{pod, mappingOf(t, pause)}), append(pods, pod)
		}
		seen := sight(t, n, pods...)
		require.NoError(t, n.Kill(t.Context()))
		require.NoError(t, n.Start(t.Context()))
		requireSame(t, seen, sight(t, n, pods...))
		for _, was := range all {
			late := startContainer(t, was.pod, "late")
			pid, err := late.Pid(t.Context())
			require.NoError(t, err)
			require.Equal(t, was.root, mappingOf(t, pid))
			requireOwner(t, fmt.Sprintf("/proc/%d", pid), was.root, was.root)
			require.Equal(t, "0:0\n", exec(t, late, "stat", "-c", "%u:%g", "/bin/busybox"))
		}
		next := startPod(t, n, autoHandler, n.PodConfig("next", harness.HostUsers()))
		pause, err := next.Pid(t.Context())
		require.NoError(t, err)
		for _, was := range all {
			require.NotEqual(t, was.root, mappingOf(t, pause))
		}
	})
	n.RequireClean(t, before)
}

// Pods that can't have a user namespace are refused with the remedy, or stay on the users of the
// node, as the handler is configured.
func TestUnmappablePods(t *testing.T) {
	const keepHandler = "podfsm-keep"
	n, before := startNodeWithPool(t, harness.Config{Handlers: []string{autoHandler, keepHandler}, TOML: usersOf(keepHandler, `
		mode = "auto"
		unmappable = "host"`)})

	privileged := func(c *runtime.PodSandboxConfig) {
		harness.HostUsers()(c)
		c.Linux.SecurityContext.Privileged = true
	}
	for _, pod := range []struct {
		name   string
		option harness.PodOption
		says   string
	}{
		{"privileged", privileged, "privileged"},
		{"host network", harness.HostNetwork(), "node's network"},
		{"host pids", func(c *runtime.PodSandboxConfig) {
			harness.HostUsers()(c)
			nsOptions(c).Pid = runtime.NamespaceMode_NODE
		}, "node's pid"},
		{"user beyond the range", func(c *runtime.PodSandboxConfig) {
			harness.HostUsers()(c)
			c.Linux.SecurityContext.RunAsUser = &runtime.Int64Value{Value: 70000}
		}, "runs as user 70000, beyond the 65536 ids"},
		{"fsGroup beyond the range", func(c *runtime.PodSandboxConfig) {
			harness.HostUsers()(c)
			c.Linux.SecurityContext.SupplementalGroups = []int64{1000660000}
		}, "has the group 1000660000, beyond"},
		{"sysctl of the node's users", func(c *runtime.PodSandboxConfig) {
			harness.HostUsers()(c)
			c.Linux.Sysctls = map[string]string{"net.ipv4.ping_group_range": "65536 2147483647"}
		}, "has the sysctl net.ipv4.ping_group_range"},
	} {
		t.Run(pod.name, func(t *testing.T) {
			err := failRun(t, n, autoHandler, n.PodConfig("pod", pod.option))
			require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
			require.ErrorContains(t, err, pod.says)
			require.ErrorContains(t, err, "default/pod")
			n.RequireClean(t, before)

			t.Run("kept", func(t *testing.T) {
				kept := startPod(t, n, keepHandler, n.PodConfig("pod", pod.option))
				container := startContainer(t, kept, "main", func(c *runtime.ContainerConfig) {
					security := kept.Config.GetLinux().GetSecurityContext()
					c.Linux.SecurityContext.Privileged = security.GetPrivileged()
					c.Linux.SecurityContext.RunAsUser, c.Linux.SecurityContext.SupplementalGroups = security.GetRunAsUser(), security.GetSupplementalGroups()
				})
				because := inspect(t, n, kept.ID).GetSteps()[0].GetDetail()["because"]
				require.Contains(t, because, pod.says, "podfsm inspect")
				require.Contains(t, because, "leaves such pods on the node's users")
				pid, err := container.Pid(t.Context())
				require.NoError(t, err)
				require.Equal(t, inode(t, nsPath(os.Getpid(), "user")), inode(t, nsPath(pid, "user")))
			})
			n.RequireClean(t, before)
		})
	}

	t.Run("containers", func(t *testing.T) {
		device := filepath.Join(n.Dir(), "closed-device")
		require.NoError(t, unix.Mknod(device, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
		defer os.Remove(device)
		for _, handler := range []string{autoHandler, keepHandler} {
			pod := startPod(t, n, handler, n.PodConfig("of-"+handler, harness.HostUsers()))
			with, err := n.Rest(t.Context())
			require.NoError(t, err)
			for _, tc := range []struct {
				says   string
				option harness.ContainerOption
			}{
				{"privileged", func(c *runtime.ContainerConfig) { c.Linux.SecurityContext.Privileged = true }},
				{"runs as user 70000, beyond the 65536 ids", func(c *runtime.ContainerConfig) {
					c.Linux.SecurityContext.RunAsUser = &runtime.Int64Value{Value: 70000}
				}},
				{"runs as user 70000, which its image names", harness.Image(harness.UserImage)},
				{"the capability SYS_TIME", func(c *runtime.ContainerConfig) {
					c.Linux.SecurityContext.Capabilities = &runtime.Capability{AddCapabilities: []string{"SYS_TIME"}}
				}},
				{fmt.Sprintf("the device %q", device), func(c *runtime.ContainerConfig) {
					c.Devices = []*runtime.Device{{HostPath: device, ContainerPath: device, Permissions: "r"}}
				}},
				{`the device "/dev/null" as "/dev/elsewhere"`, func(c *runtime.ContainerConfig) {
					c.Devices = []*runtime.Device{{HostPath: "/dev/null", ContainerPath: "/dev/elsewhere", Permissions: "r"}}
				}},
				{`"/mounts", which is bidirectional`, func(c *runtime.ContainerConfig) {
					c.Mounts = []*runtime.Mount{{HostPath: n.Dir(), ContainerPath: "/mounts", Propagation: runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL}}
				}},
			} {
				_, err := pod.StartContainer(t.Context(), "main", tc.option)
				require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
				require.ErrorContains(t, err, tc.says)
				require.ErrorContains(t, err, "on the node's users")
				n.RequireClean(t, with)
			}
			require.Contains(t, inspect(t, n, pod.ID).GetSteps()[0].GetDetail()["because"], `maps every pod, mode "auto"`)

			// The device that an id of the pod owns is the pod's.
			pause, err := pod.Pid(t.Context())
			require.NoError(t, err)
			require.NoError(t, os.Chown(device, int(mappingOf(t, pause)), -1))
			container := startContainer(t, pod, "main", func(c *runtime.ContainerConfig) {
				c.Devices = []*runtime.Device{{HostPath: device, ContainerPath: device, Permissions: "r"}}
			})
			require.Empty(t, exec(t, container, "cat", device))
			require.NoError(t, os.Chown(device, 0, 0))
		}
	})

	// A pod that requests a user namespace must have ids for it, whatever the mode of its handler.
	t.Run("mapped as it asks", func(t *testing.T) {
		err := failRun(t, n, harness.PodfsmHandler, n.PodConfig("pod", func(c *runtime.PodSandboxConfig) {
			c.Linux.SecurityContext.SupplementalGroups = []int64{1000660000}
		}))
		require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
		require.ErrorContains(t, err, "has the group 1000660000, beyond the 65536 ids of its user namespace; run the pod with hostUsers: true")
		pod := startPod(t, n, harness.PodfsmHandler, n.PodConfig("pod"))
		_, err = pod.StartContainer(t.Context(), "main", harness.Image(harness.UserImage))
		require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
		require.ErrorContains(t, err, "it runs as user 70000, which its image names")
		require.ErrorContains(t, err, "run the pod with hostUsers: true, or choose ids below 65536")
		startContainer(t, pod, "main", harness.Image(harness.UserImage), func(c *runtime.ContainerConfig) {
			c.Linux.SecurityContext.RunAsUser = &runtime.Int64Value{Value: 1000}
		})
	})
	n.RequireClean(t, before)
}

// The verbose status of the runtime shows how podfsm maps ids, which the kubelet and operators
// can't see otherwise.
func TestStatusTellsModes(t *testing.T) {
	n, _ := startNodeWithModes(t)
	resp, err := n.Runtime.Status(t.Context(), &runtime.StatusRequest{Verbose: true})
	require.NoError(t, err)
	require.JSONEq(t, `{"userns": {
		"podfsm": {"mode": "kubelet"},
		"podfsm-auto": {"mode": "auto", "unmappable": "refuse"},
		"podfsm-node": {"mode": "node", "unmappable": "refuse",
			"node_wide_uid_mapping": {"container_id": 0, "host_id": 2000000000, "size": 65536},
			"node_wide_gid_mapping": {"container_id": 0, "host_id": 2000000000, "size": 65536}}
	}}`, resp.GetInfo()["podfsm"])
	require.Contains(t, resp.GetInfo(), "config", "containerd's own")
}
