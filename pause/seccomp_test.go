package pause

import (
	"encoding/binary"
	"io"
	"os"
	"testing"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	seccompbpf "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

func TestSeccompFilter(t *testing.T) {
	file, err := SeccompFilter()
	require.NoError(t, err)
	defer file.Close()
	data, err := io.ReadAll(file)
	require.NoError(t, err)
	require.Zero(t, len(data)%8)
	require.Less(t, len(data)/8, 4096, "BPF_MAXINSNS")
	_, err = file.Write([]byte("x"))
	require.Error(t, err)
	_, err = os.OpenFile(fdPath(file), os.O_RDWR, 0)
	if err == nil {
		writable, err := os.OpenFile(fdPath(file), os.O_RDWR, 0)
		require.NoError(t, err)
		defer writable.Close()
		_, err = writable.Write([]byte("x"))
		require.ErrorIs(t, err, unix.EPERM, "it is sealed")
	}
}

// What pause and its set-up need, and what it must not have, on each architecture that is released.
func TestSeccompGroups(t *testing.T) {
	profile := seccomp.DefaultProfile(&specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{}}})
	for _, info := range []*arch.Info{arch.X86_64, arch.AARCH64} {
		groups := groupsOf(profile, info)
		require.Len(t, groups, 2)
		require.Equal(t, seccompbpf.ActionErrno|seccompbpf.Action(unix.ENOSYS), groups[0].Action)
		require.Equal(t, []string{"clone3"}, groups[0].Names)
		allowed := groups[1]
		require.Equal(t, seccompbpf.ActionAllow, allowed.Action)
		require.Subset(t, allowed.Names, []string{
			"execve", "exit_group", "wait4", "rt_sigaction", "rt_sigsuspend", "rt_sigreturn", "ppoll", "nanosleep", "write", "prlimit64", "futex",
		}, info.Name)
		for _, name := range []string{
			"mount", "umount2", "pivot_root", "move_mount", "open_tree", "fsopen", "mount_setattr", "setns", "unshare", "chroot", "keyctl", "add_key",
			"request_key", "bpf", "perf_event_open", "userfaultfd", "init_module", "finit_module", "kexec_load", "reboot", "io_uring_setup",
			"open_by_handle_at", "settimeofday", "sethostname", "swapon", "clone", "clone3",
		} {
			require.NotContains(t, allowed.Names, name, info.Name)
		}
		var conditional []string
		for _, name := range allowed.NamesWithCondtions {
			conditional = append(conditional, name.Name)
		}
		require.Contains(t, conditional, "clone")
		require.Contains(t, conditional, "personality")
		require.Contains(t, conditional, "socket")
	}
}

func TestAssemble(t *testing.T) {
	nosys := uint(unix.ENOSYS)
	id := uint32(arch.X86_64.ID)
	if info, err := arch.GetInfo(""); err == nil {
		id = uint32(info.ID)
	}
	instructions, err := assemble(&specs.LinuxSeccomp{Syscalls: []specs.LinuxSyscall{
		{Names: []string{"read", "absent", "read"}, Action: specs.ActAllow},
		{Names: []string{"write"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Op: specs.OpMaskedEqual, Value: 6}}},
		{Names: []string{"close"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Op: specs.OpMaskedEqual, Value: 6, ValueTwo: 2}}},
		{Names: []string{"dup"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Op: specs.OpEqualTo, Value: 1}, {Index: 1, Op: specs.OpGreaterThan, Value: 1 << 33}}},
		{Names: []string{"dup"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Op: specs.OpEqualTo, Value: 9}}},
		{Names: []string{"chdir"}, Action: specs.ActKill},
		{Names: []string{"getuid"}, Action: specs.ActErrno, ErrnoRet: &nosys},
	}})
	require.NoError(t, err)
	program, all := bpf.Disassemble(instructions)
	require.True(t, all)
	vm, err := bpf.NewVM(program)
	require.NoError(t, err)
	const allow, eperm, enosys = 0x7fff0000, 0x50000 | int(unix.EPERM), 0x50000 | int(unix.ENOSYS)
	for _, tc := range []struct {
		name   string
		arch   uint32
		number uint32
		args   [2]uint64
		want   int
	}{
		{"allowed", id, unix.SYS_READ, [2]uint64{}, allow},
		{"not named", id, unix.SYS_GETGID, [2]uint64{}, eperm},
		{"of another action", id, unix.SYS_CHDIR, [2]uint64{}, eperm},
		{"with an error of its own", id, unix.SYS_GETUID, [2]uint64{}, enosys},
		{"bits not set", id, unix.SYS_WRITE, [2]uint64{9}, allow},
		{"one bit set", id, unix.SYS_WRITE, [2]uint64{4}, eperm},
		{"can't be expressed", id, unix.SYS_CLOSE, [2]uint64{2}, eperm},
		{"both conditions", id, unix.SYS_DUP, [2]uint64{1, 1<<33 + 1}, allow},
		{"one condition", id, unix.SYS_DUP, [2]uint64{1, 1 << 33}, eperm},
		{"the other rule", id, unix.SYS_DUP, [2]uint64{9}, allow},
		{"high bits", id, unix.SYS_DUP, [2]uint64{1<<32 | 9}, eperm},
		{"another architecture", id + 1, unix.SYS_READ, [2]uint64{}, eperm},
		{"i386", uint32(arch.I386.ID), 3, [2]uint64{}, eperm},
		{"x32", uint32(arch.X86_64.ID), 0x40000000 | unix.SYS_READ, [2]uint64{}, map[bool]int{true: enosys, false: eperm}[id == uint32(arch.X86_64.ID)]},
		{"-1", id, 0xffffffff, [2]uint64{}, map[bool]int{true: enosys, false: eperm}[id == uint32(arch.X86_64.ID)]},
	} {
		// The machine of package bpf reads big-endian words, the kernel's those of struct seccomp_data as they are.
		data := binary.BigEndian.AppendUint32(nil, tc.number)
		data = binary.BigEndian.AppendUint32(data, tc.arch)
		data = binary.BigEndian.AppendUint64(data, 0)
		for _, arg := range append(tc.args[:], 0, 0, 0, 0) {
			data = binary.BigEndian.AppendUint32(data, uint32(arg)) // little-endian hosts have the low half first
			data = binary.BigEndian.AppendUint32(data, uint32(arg>>32))
		}
		got, err := vm.Run(data)
		require.NoError(t, err, tc.name)
		require.Equal(t, tc.want, got, tc.name)
	}
}
