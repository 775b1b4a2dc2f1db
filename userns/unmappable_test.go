package userns

import (
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A container of a pod that podfsm has mapped is refused whatever needs the node's users; one of a pod that has asked, only what can't be.
func TestContainerCheck(t *testing.T) {
	dir := t.TempDir()
	device := func(name string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		require.NoError(t, unix.Mknod(path, unix.S_IFCHR, int(unix.Mkdev(1, 3))))
		require.NoError(t, os.Chmod(path, mode))
		return path
	}
	require.NoError(t, os.Mkdir(filepath.Join(dir, "few"), 0o755))
	closed, readable, one := device("closed", 0o660), device("readable", 0o664), device("few/one", 0o600)
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "some"), 0o755))
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "passed/pts"), 0o755))
	some := filepath.Dir(device("some/closed", 0o600))
	device("some/open", 0o666)
	device("passed/pts/0", 0o600)
	passed := filepath.Dir(device("passed/console", 0o600))
	link := filepath.Join(dir, "link")
	require.NoError(t, os.Symlink(closed, link))
	owned, grouped, nodes := device("owned", 0o640), device("grouped", 0o060), device("nodes", 0o660)
	require.NoError(t, os.Chown(owned, 131072+65535, 5))
	require.NoError(t, os.Chown(grouped, 131072+65536, 131072))
	require.NoError(t, os.Chown(nodes, 131071, 131072+65536))
	listed := device("listed", 0o600)
	acl := []byte{2, 0, 0, 0} // its version, then entries of a tag, permissions and an id
	for _, entry := range []struct {
		tag, permissions uint16
		id               uint32
	}{{0x01, 6, math.MaxUint32}, {0x02, 6, 131072}, {0x04, 0, math.MaxUint32}, {0x10, 6, math.MaxUint32}, {0x20, 0, math.MaxUint32}} {
		acl = binary.LittleEndian.AppendUint16(acl, entry.tag)
		acl = binary.LittleEndian.AppendUint16(acl, entry.permissions)
		acl = binary.LittleEndian.AppendUint32(acl, entry.id)
	}
	require.NoError(t, unix.Setxattr(listed, "system.posix_acl_access", acl, 0))
	type security = runtime.LinuxContainerSecurityContext
	id := func(n int64) *runtime.Int64Value { return &runtime.Int64Value{Value: n} }
	capabilities := func(added []string, dropped ...string) func(*runtime.ContainerConfig, *security) {
		return func(_ *runtime.ContainerConfig, s *security) {
			s.Capabilities = &runtime.Capability{AddCapabilities: added, DropCapabilities: dropped}
		}
	}
	add := func(names ...string) func(*runtime.ContainerConfig, *security) { return capabilities(names) }
	with := func(path, permissions string) func(*runtime.ContainerConfig, *security) {
		return func(c *runtime.ContainerConfig, _ *security) {
			c.Devices = []*runtime.Device{{HostPath: path, ContainerPath: path, Permissions: permissions}}
		}
	}
	as := func(path, inside string) func(*runtime.ContainerConfig, *security) {
		return func(c *runtime.ContainerConfig, _ *security) {
			c.Devices = []*runtime.Device{{HostPath: path, ContainerPath: inside, Permissions: "rw"}}
		}
	}
	mount := func(m *runtime.Mount) func(*runtime.ContainerConfig, *security) {
		m.ContainerPath = "/mounts"
		return func(c *runtime.ContainerConfig, _ *security) { c.Mounts = []*runtime.Mount{m} }
	}
	username := func(name string) func(*runtime.ContainerConfig, *security) {
		return func(_ *runtime.ContainerConfig, s *security) { s.RunAsUsername = name }
	}
	for name, tc := range map[string]struct {
		change    func(*runtime.ContainerConfig, *security)
		imageUser string
		says      string // to a pod of either kind
		saysOwn   string // to one that podfsm has mapped
	}{
		"nothing": {},
		"last ids": {imageUser: "65535:65535", change: func(_ *runtime.ContainerConfig, s *security) {
			s.RunAsUser, s.RunAsGroup, s.SupplementalGroups = id(65535), id(65535), []int64{65535}
		}},
		"user":                              {says: "it runs as user 70000, beyond the 65536 ids of its user namespace; ", change: func(_ *runtime.ContainerConfig, s *security) { s.RunAsUser = id(70000) }},
		"group":                             {says: "it runs as group 70000, beyond", change: func(_ *runtime.ContainerConfig, s *security) { s.RunAsUser, s.RunAsGroup = id(1), id(70000) }},
		"fsGroup":                           {says: "it has the group 1000660000, beyond", change: func(_ *runtime.ContainerConfig, s *security) { s.SupplementalGroups = []int64{1000660000} }},
		"username":                          {says: "it runs as user 70000, beyond", change: username("70000")},
		"username with a group":             {says: "it runs as group 70000, beyond", change: username("app:70000")},
		"username of both":                  {says: "it runs as user 70000, beyond the 65536 ids of its user namespace and runs as group 80000, beyond", change: username("70000:80000")},
		"username of mapped ids":            {change: username("65535:65535")},
		"username with a sign":              {says: "it runs as user 70000, beyond", change: username("+70000")},
		"name":                              {change: username("app")},
		"image's user with a sign":          {imageUser: "+70000", says: "it runs as user 70000, which its image names, beyond"},
		"image's user and group":            {imageUser: "70000:80000", says: "it runs as user 70000, which its image names, beyond the 65536 ids of its user namespace and runs as group 80000, which its image names, beyond"},
		"image's user":                      {imageUser: "70000", says: "it runs as user 70000, which its image names, beyond"},
		"image's group":                     {imageUser: "app:70000", says: "it runs as group 70000, which its image names, beyond"},
		"image's name":                      {imageUser: "app:users"},
		"image's user of more than 32 bits": {imageUser: "4294967296", says: "it runs as user 4294967296, which its image names, beyond"},
		"privileged":                        {saysOwn: "it is privileged; ", change: func(_ *runtime.ContainerConfig, s *security) { s.Privileged = true }},
		"capability":                        {saysOwn: "it has the capability sys_time, which only the node's users can use; ", change: add("NET_ADMIN", "sys_time")},
		"capabilities":                      {saysOwn: "it has the capability SYS_MODULE, which only the node's users can use and has the capability BPF", change: add("SYS_MODULE", "BPF")},
		"namespaced":                        {change: add("ALL", "SYS_ADMIN", "NET_ADMIN", "MAC_ADMIN")},
		"by default":                        {change: add("MKNOD", "AUDIT_WRITE")},
		"dropped":                           {change: capabilities([]string{"sys_time"}, "SYS_TIME")},
		"after all":                         {saysOwn: "it has the capability SYS_TIME", change: capabilities([]string{"SYS_TIME"}, "ALL")},
		"bidirectional":                     {saysOwn: `it has the mount "/mounts", which is bidirectional; `, change: mount(&runtime.Mount{Propagation: runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL})},
		"mapped mount":                      {saysOwn: `its mount "/mounts" comes with an id mapping`, change: mount(&runtime.Mount{GidMappings: extents(0, 1, 1)})},
		"user namespace": {saysOwn: "it asks for a user namespace", change: func(_ *runtime.ContainerConfig, s *security) {
			s.NamespaceOptions = &runtime.NamespaceOption{UsernsOptions: podMode(nil, nil)}
		}},
		"node's users": {change: func(_ *runtime.ContainerConfig, s *security) {
			s.NamespaceOptions = &runtime.NamespaceOption{UsernsOptions: &runtime.UserNamespace{Mode: runtime.NamespaceMode_NODE}}
		}},
		"closed device":                 {saysOwn: `it has the device "` + closed + `", which no id of its user namespace may open`, change: with(closed, "rwm")},
		"link to it":                    {saysOwn: `it has the device "` + closed + `"`, change: with(link, "r")},
		"directory of devices":          {saysOwn: `it has the device "` + one + `"`, change: with(filepath.Dir(one), "r")},
		"directory with an open one":    {change: with(some, "rw")},
		"directory that is passed over": {change: with(passed, "rw")},
		"device that all may read":      {change: with(readable, "rm")},
		"device that few may write":     {saysOwn: `it has the device "` + readable + `"`, change: with(readable, "rw")},
		"device that all may use":       {change: with("/dev/null", "rwm")},
		"device elsewhere":              {saysOwn: `it has the device "/dev/null" as "/dev/nowhere", and in a user namespace a device keeps its path; `, change: as("/dev/null", "/dev/nowhere")},
		"device for another":            {saysOwn: `it has the device "/dev/null" as "/dev/zero", and`, change: as("/dev/null", "/dev/zero")},
		"directory elsewhere":           {saysOwn: `" as "/dev/nowhere/`, change: as(some, "/dev/nowhere")},
		"device by another file":        {change: as(closed, "/dev/null")},
		"device without a path":         {change: as("/dev/null", "")},
		"device of one of its users":    {change: with(owned, "rwm")},
		"device of one of its groups":   {change: with(grouped, "rw")},
		"device of no mapped id":        {saysOwn: `it has the device "` + nodes + `"`, change: with(nodes, "r")},
		"device with an access list":    {change: with(listed, "rw")},
		"device that isn't there":       {change: with("/dev/nowhere", "rwm")},
		"ids and more":                  {saysOwn: "it is privileged and runs as user 70000", says: "runs as user 70000", change: func(_ *runtime.ContainerConfig, s *security) { s.Privileged, s.RunAsUser = true, id(70000) }},
	} {
		for _, chosen := range []bool{false, true} {
			t.Run(name+map[bool]string{true: ", mapped by podfsm"}[chosen], func(t *testing.T) {
				config := &runtime.ContainerConfig{Linux: &runtime.LinuxContainerConfig{SecurityContext: &security{}}}
				if tc.change != nil {
					tc.change(config, config.Linux.SecurityContext)
				}
				says, remedy := tc.says, "run the pod with hostUsers: true, or choose ids below 65536"
				if chosen && (tc.saysOwn != "" || tc.says != "") {
					remedy = "give the pod a runtime handler that leaves it on the node's users"
					if tc.saysOwn != "" {
						says = tc.saysOwn
					}
				}
				err := Container{Config: config, ImageUser: tc.imageUser, Mapped: ids(131072, 65536), Chosen: chosen}.Check()
				if says == "" {
					require.NoError(t, err)
					return
				}
				require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
				require.ErrorContains(t, err, says)
				if name != "mapped mount" && name != "user namespace" { // which are the caller's mistakes
					require.ErrorContains(t, err, remedy)
				}
			})
		}
	}
	require.NoError(t, Container{Mapped: ids(131072, 65536), Chosen: true}.Check())
}

// What the kernel hides from a user namespace is what hiddenSysctl says.
func TestHiddenSysctls(t *testing.T) {
	files := func(namespaces ...string) []string {
		list, err := exec.Command("unshare", append(namespaces, "find", "/proc/sys/net", "-type", "f", "-printf", "net/%P\n")...).Output()
		require.NoError(t, err)
		return strings.Fields(string(list))
	}
	shown := files("--net", "--map-root-user", "--user")
	if !slices.Contains(shown, "net/ipv6/route/max_size") {
		t.Skip("this kernel has no IPv6, or is older than 5.15")
	}
	for _, file := range files("--net") {
		require.Equal(t, !slices.Contains(shown, file), hiddenSysctl(file), file)
	}
}

// The ids of a pod that has asked for a user namespace are in it.
func TestCheckPod(t *testing.T) {
	m := Mappings{UIDs: Mapping{HostID: 131072, Length: 1000}, GIDs: Mapping{HostID: 131072, Length: 1000}}
	config := &runtime.PodSandboxConfig{Linux: &runtime.LinuxPodSandboxConfig{SecurityContext: &runtime.LinuxSandboxSecurityContext{
		Privileged: true, SupplementalGroups: []int64{999},
	}}}
	require.NoError(t, CheckPod(nil, m))
	require.NoError(t, CheckPod(config, m))
	config.Linux.SecurityContext.SupplementalGroups = []int64{999, 1000}
	config.Linux.Sysctls = map[string]string{"net.ipv4.ping_group_range": "0 1000"}
	err := CheckPod(config, m)
	require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
	require.ErrorContains(t, err, `it has the group 1000, beyond the 1000 ids of its user namespace and has the sysctl net.ipv4.ping_group_range = "0 1000", beyond the 1000 ids of its user namespace; `+
		"run the pod with hostUsers: true, or choose ids below 1000")
}

// A directory with more entries than anybody looks at is not judged by the first of them.
func TestManyDevices(t *testing.T) {
	for _, tc := range []struct {
		entries int
		closed  bool
	}{{maxEntries, true}, {maxEntries + 1, false}} {
		dir := t.TempDir()
		closed := filepath.Join(dir, "0")
		require.NoError(t, unix.Mknod(closed, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
		for n := range tc.entries - 1 {
			require.NoError(t, os.Symlink("/dev/null", filepath.Join(dir, fmt.Sprint("link", n)))) // which containerd passes over
		}
		reason := ids(131072, 65536).unusableDevice(&runtime.Device{HostPath: dir, Permissions: "rw"})
		require.Equal(t, tc.closed, strings.Contains(reason, closed), "%d entries: %q", tc.entries, reason)
	}
}
