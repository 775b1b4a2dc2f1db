package pause

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/podfsm/podfsm/host"
)

// nsFile are the names of namespaces below /proc/PID/ns.
var nsFile = map[specs.LinuxNamespaceType]string{
	specs.UserNamespace: "user", specs.MountNamespace: "mnt", specs.PIDNamespace: "pid", specs.NetworkNamespace: "net",
	specs.IPCNamespace: "ipc", specs.UTSNamespace: "uts", specs.CgroupNamespace: "cgroup",
}

// daemonNS are the namespaces that the daemon was started in, as links of /proc. They are read at init, because
// later a goroutine may enter a pod's namespaces on the main thread, which /proc/self shows.
var daemonNS = func() map[specs.LinuxNamespaceType]string {
	links := map[specs.LinuxNamespaceType]string{}
	for kind, name := range nsFile {
		links[kind], _ = os.Readlink("/proc/self/ns/" + name) // "" matches no namespace
	}
	return links
}()

// Find finds a pause whose record is lost, and returns the record. The pause is the only process in its own cgroup,
// which only root can put processes into. It has the namespaces and the id mappings of its specification. Find
// ignores all that the process itself can choose.
//
// Errors: NotFound if there is no such process; those of reads of /proc.
func Find(ctx context.Context, cgroup *host.PodCgroup, spec *specs.Spec) (Record, error) {
	pid, err := only(cgroup)
	if err != nil {
		return Record{}, err
	}
	held, err := host.Open(pid)
	if err != nil {
		return Record{}, fmt.Errorf("failed to find pause: %w", err)
	}
	defer held.Close()
	record := Record{Pid: pid}
	if record.StartTime, err = held.StartTime(ctx); err != nil {
		return Record{}, fmt.Errorf("failed to find pause: %w", err)
	}
	for kind := range nsFile {
		if err := checkNamespace(ctx, pid, kind, spec.Linux.Namespaces); err != nil {
			return Record{}, err
		}
	}
	for file, want := range map[string][]specs.LinuxIDMapping{"uid_map": spec.Linux.UIDMappings, "gid_map": spec.Linux.GIDMappings} {
		if err := checkMap(ctx, pid, file, want); err != nil {
			return Record{}, err
		}
	}
	// The process is still alive and in the cgroup. So all that was read is about this process.
	if again, err := only(cgroup); err != nil || again != pid || !held.Alive() {
		return Record{}, fmt.Errorf("pause, process %d, ended meanwhile: %w", pid, errdefs.ErrNotFound)
	}
	return record, nil
}

// only returns the one process in a cgroup.
func only(cgroup *host.PodCgroup) (int, error) {
	pids, err := cgroup.Pids()
	if err != nil {
		return 0, fmt.Errorf("failed to find pause: %w", err)
	}
	if len(pids) != 1 {
		return 0, fmt.Errorf("pause's cgroup has the processes %d: %w", pids, errdefs.ErrNotFound)
	}
	return pids[0], nil
}

// checkNamespace fails unless a process has a namespace of its own if the specification asks for one, else the
// daemon's.
func checkNamespace(ctx context.Context, pid int, kind specs.LinuxNamespaceType, asked []specs.LinuxNamespace) error {
	has, err := host.Readlink(ctx, pid, "ns/"+nsFile[kind])
	if err != nil {
		return fmt.Errorf("failed to find pause: %w", err)
	}
	own := slices.ContainsFunc(asked, func(n specs.LinuxNamespace) bool { return n.Type == kind })
	if own != (has != daemonNS[kind]) {
		return fmt.Errorf("process %d in pause's cgroup is in the %s namespace %s, and the daemon in %s: %w", pid, kind, has, daemonNS[kind], errdefs.ErrNotFound)
	}
	return nil
}

// checkMap fails unless a process has the id mappings of its specification. A process without mappings of its own is
// in the daemon's user namespace, which checkNamespace checks.
func checkMap(ctx context.Context, pid int, file string, want []specs.LinuxIDMapping) error {
	if len(want) == 0 {
		return nil
	}
	text, err := host.Read(ctx, pid, file)
	if err != nil {
		return fmt.Errorf("failed to find pause: %w", err)
	}
	var has []specs.LinuxIDMapping
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		var m specs.LinuxIDMapping
		if _, err := fmt.Sscan(lines.Text(), &m.ContainerID, &m.HostID, &m.Size); err != nil {
			return fmt.Errorf("failed to read %s of process %d: %w", file, pid, err)
		}
		has = append(has, m)
	}
	if !slices.Equal(has, want) {
		return fmt.Errorf("process %d in pause's cgroup has the ids %v, not %v: %w", pid, has, want, errdefs.ErrNotFound)
	}
	return nil
}
