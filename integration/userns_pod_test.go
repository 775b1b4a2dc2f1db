package integration

import (
	"fmt"
	"io"
	"net/http"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// asRootOf runs a command of the machine as root of the user namespace of pid.
func asRootOf(t *testing.T, pid int, command ...string) error {
	args := append([]string{"--user", "--setuid", "0", "--setgid", "0", "--target", fmt.Sprint(pid), "--"}, command...)
	out, err := osexec.CommandContext(t.Context(), "nsenter", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

func TestUserNSPod(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	t.Run("pods", func(t *testing.T) {
		config := n.PodConfig("web")
		pod := startPod(t, n, harness.PodfsmHandler, config)
		pid, err := pod.Pid(t.Context())
		require.NoError(t, err)
		seen := inspect(t, n, "default/web")

		t.Run("is ready and shows what was asked for", func(t *testing.T) {
			status, err := pod.Status(t.Context())
			require.NoError(t, err)
			require.Equal(t, runtime.PodSandboxState_SANDBOX_READY, status.GetState())
			require.NotEmpty(t, status.GetNetwork().GetIp())
			require.Equal(t, config.GetLinux().GetSecurityContext().GetNamespaceOptions().String(),
				status.GetLinux().GetNamespaces().GetOptions().String())
			require.Equal(t, config.GetLabels(), status.GetLabels())
			require.Equal(t, config.GetAnnotations(), status.GetAnnotations())
			require.Equal(t, "Ready", seen.GetSandbox().GetState())
			require.Equal(t, status.GetNetwork().GetIp(), seen.GetSandbox().GetIp())
			require.Equal(t, uint32(pid), seen.GetSandbox().GetPid())
		})

		t.Run("has namespaces of its own, the network's owned by the user's", func(t *testing.T) {
			for _, kind := range []string{"user", "net", "ipc", "uts", "mnt", "pid"} {
				require.NotEqual(t, inode(t, nsPath(os.Getpid(), kind)), inode(t, nsPath(pid, kind)), kind)
			}
			pinned := seen.GetSandbox().GetNetnsPath()
			require.Equal(t, inode(t, nsPath(pid, "net")), inode(t, pinned))
			require.Equal(t, inode(t, nsPath(pid, "net")), seen.GetSandbox().GetNetnsInode())
			require.Equal(t, inode(t, nsPath(pid, "user")), ownerOf(t, pinned))

			mapping := config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions().GetUids()[0]
			for _, file := range []string{"uid_map", "gid_map"} {
				content, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
				require.NoError(t, err)
				require.Equal(t, []string{"0", fmt.Sprint(mapping.GetHostId()), fmt.Sprint(mapping.GetLength())}, strings.Fields(string(content)))
			}
		})

		server := startContainer(t, pod, "server", harness.Run("httpd", "-f", "-v", "-p", "80", "-h", "/www"))
		client := startContainer(t, pod, "client")
		ip, err := pod.IP(t.Context())
		require.NoError(t, err)

		t.Run("mounts the sysfs of its own network", func(t *testing.T) {
			require.Equal(t, []string{"eth0", "lo"}, strings.Fields(exec(t, client, "ls", "/sys/class/net")))
			require.Contains(t, exec(t, client, "grep", " /sys ", "/proc/mounts"), "sysfs")
		})

		t.Run("lets its root rule its network", func(t *testing.T) {
			// CAP_NET_ADMIN inside counts because the user namespace owns the network namespace.
			admin := startContainer(t, pod, "admin", func(c *runtime.ContainerConfig) {
				c.Linux.SecurityContext.Capabilities = &runtime.Capability{AddCapabilities: []string{"NET_ADMIN"}}
			})
			exec(t, admin, "ip", "address", "add", "127.9.9.9/32", "dev", "lo")
			_, err := client.Exec(t.Context(), "ip", "address", "del", "127.9.9.9/32", "dev", "lo")
			require.ErrorContains(t, err, "not permitted", "without the capability")
		})

		t.Run("shares its network between its containers", func(t *testing.T) {
			serverPid, err := server.Pid(t.Context())
			require.NoError(t, err)
			require.Equal(t, inode(t, nsPath(pid, "net")), inode(t, nsPath(serverPid, "net")))
			require.Equal(t, inode(t, nsPath(pid, "user")), inode(t, nsPath(serverPid, "user")))
			require.Equal(t, harness.IndexPage, exec(t, client, "wget", "-qO-", "http://127.0.0.1/"))
		})

		t.Run("logs and is reached from the node", func(t *testing.T) {
			resp, err := n.HTTP().Get("http://" + ip + "/")
			require.NoError(t, err)
			defer resp.Body.Close()
			require.Equal(t, http.StatusOK, resp.StatusCode)
			body, err := io.ReadAll(resp.Body)
			require.NoError(t, err)
			require.Equal(t, harness.IndexPage, string(body))
			require.Eventually(t, func() bool {
				log, err := server.Log()
				return err == nil && strings.Contains(log, "response:200")
			}, waitFor, tick)
		})

		t.Run("is reached from another pod", func(t *testing.T) {
			other := startPod(t, n, harness.PodfsmHandler, n.PodConfig("visitor"))
			visitor := startContainer(t, other, "visitor")
			require.Equal(t, harness.IndexPage, exec(t, visitor, "wget", "-qO-", "http://"+ip+"/"))
		})

		t.Run("shows its truth in the verbose status", func(t *testing.T) {
			info, err := pod.Info(t.Context())
			require.NoError(t, err)
			require.Contains(t, info["info"], fmt.Sprintf(`"pid":%d`, pid))
			require.Contains(t, info["info"], `"processStatus":"running"`)
			require.Contains(t, info["info"], seen.GetSandbox().GetNetnsPath())
			require.Contains(t, info["info"], ip)
			require.Contains(t, info["podfsm"], `"state":"Ready"`)
		})
	})
	n.RequireClean(t, before)
}

func TestUserNSPodsAreApart(t *testing.T) {
	n := harness.StartNode(t, harness.Config{})
	before, err := n.WarmUp(t.Context(), harness.PodfsmHandler)
	require.NoError(t, err)

	t.Run("pods", func(t *testing.T) {
		shared := t.TempDir()
		require.NoError(t, os.Chmod(shared, 0o777|os.ModeSticky))
		// Two pods that share a host directory without an id mapping see each other's files under each other's host ids.
		withShared := func(c *runtime.ContainerConfig) {
			c.Mounts = append(c.Mounts, &runtime.Mount{HostPath: shared, ContainerPath: "/shared"})
		}
		require.NoError(t, os.Chmod(filepath.Dir(shared), 0o711), "pods must get through to it")
		victim := startContainer(t, startPod(t, n, harness.PodfsmHandler, n.PodConfig("victim")), "main", withShared)
		attacker := startContainer(t, startPod(t, n, harness.PodfsmHandler, n.PodConfig("attacker")), "main", withShared)

		victimPid, err := victim.Pid(t.Context())
		require.NoError(t, err)
		attackerPid, err := attacker.Pid(t.Context())
		require.NoError(t, err)

		t.Run("root inside is an unprivileged user outside", func(t *testing.T) {
			require.Equal(t, "0\n", exec(t, attacker, "id", "-u"))
			for _, pid := range []int{victimPid, attackerPid} {
				var stat unix.Stat_t
				require.NoError(t, unix.Stat(fmt.Sprintf("/proc/%d", pid), &stat))
				require.GreaterOrEqual(t, stat.Uid, uint32(65536))
			}
		})

		t.Run("files", func(t *testing.T) {
			exec(t, victim, "sh", "-c", "echo secret > /shared/secret && chmod 600 /shared/secret")
			require.Equal(t, "secret\n", exec(t, victim, "cat", "/shared/secret"))
			_, err := attacker.Exec(t.Context(), "cat", "/shared/secret")
			require.ErrorContains(t, err, "Permission denied")
			_, err = attacker.Exec(t.Context(), "rm", "-f", "/shared/secret")
			require.Error(t, err)
		})

		t.Run("processes", func(t *testing.T) {
			// As root of the attacker's user namespace, with the victim's pid in sight: the kernel asks for ids, not for the view.
			proc := fmt.Sprintf("/proc/%d/", victimPid)
			require.NoError(t, asRootOf(t, attackerPid, "true"))
			for _, command := range [][]string{
				{"kill", "-0", fmt.Sprint(victimPid)},
				{"cat", proc + "environ"},
				{"ls", proc + "root/"},
				{"nsenter", "--net", "--target", fmt.Sprint(victimPid), "true"},
			} {
				require.Error(t, asRootOf(t, attackerPid, command...), "%q", command)
			}
			require.NoError(t, asRootOf(t, attackerPid, "kill", "-0", fmt.Sprint(attackerPid)), "its own process it may signal")
		})
	})
	n.RequireClean(t, before)
}
