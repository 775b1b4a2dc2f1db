package main

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// loadModule loads an invalid module: the kernel checks the permission before the module.
func loadModule([]string) error {
	return failed("init_module", unix.InitModule([]byte("no module"), ""))
}

// loadProgram loads a BPF program that reads kernel memory in a kprobe: code in the kernel like a module.
func loadProgram([]string) error {
	type instruction struct {
		code, registers uint8
		offset          int16
		value           int32
	}
	program := []instruction{
		{code: unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_K}, // r0 = 0
		{code: unix.BPF_JMP | unix.BPF_EXIT},
	}
	license := []byte("GPL\x00")
	// The beginning of union bpf_attr for BPF_PROG_LOAD.
	attr := struct {
		progType, insnCnt uint32
		insns, license    uint64
		_                 [96]byte
	}{
		progType: unix.BPF_PROG_TYPE_KPROBE,
		insnCnt:  uint32(len(program)),
		insns:    uint64(uintptr(unsafe.Pointer(&program[0]))),
		license:  uint64(uintptr(unsafe.Pointer(&license[0]))),
	}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return failed("bpf", errno)
	}
	return unix.Close(int(fd))
}

// makeDevice makes a node for the device with the numbers args[0] and args[1].
func makeDevice(args []string) error {
	const path = "/tmp/device"
	device := unix.Mkdev(uint32(number(args[0])), uint32(number(args[1])))
	if err := unix.Mknod(path, unix.S_IFBLK|0o600, int(device)); err != nil {
		return failed("mknod", err)
	}
	return os.Remove(path)
}

// mountDevice mounts the ext4 filesystem of the device at args[0] and reads args[1] on it.
func mountDevice(args []string) error {
	const at = "/tmp/mounted"
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	defer os.Remove(at)
	if err := unix.Mount(args[0], at, "ext4", unix.MS_RDONLY, ""); err != nil {
		return failed("mount", err)
	}
	_, err := os.Stat(at + "/" + args[1])
	if err := unix.Unmount(at, 0); err != nil {
		return failed("umount", err)
	}
	return failed("stat", err)
}

// resizeTmpfs changes the size of the host's tmpfs that is mounted at args[0].
func resizeTmpfs(args []string) error {
	return failed("mount", unix.Mount("", args[0], "", unix.MS_REMOUNT, "size=2M"))
}

// mountOn mounts a tmpfs on the directory args[0] in its own mount namespace, and leaves it there.
func mountOn(args []string) error {
	return failed("mount", unix.Mount("attack", args[0], "tmpfs", 0, "size=1M"))
}

// enterNetNS enters the network namespace at args[0].
func enterNetNS(args []string) error {
	f, err := os.Open(args[0])
	if err != nil {
		return failed("open", err)
	}
	defer f.Close()
	return failed("setns", unix.Setns(int(f.Fd()), unix.CLONE_NEWNET))
}

// ruleNetwork sets the MTU args[0] on the loopback interface of the container's network namespace.
func ruleNetwork(args []string) error {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return failed("socket", err)
	}
	defer unix.Close(socket)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint32(uint32(number(args[0])))
	return failed("ioctl", unix.IoctlIfreq(socket, unix.SIOCSIFMTU, lo))
}

// setClock sets the tick of the clock to its present length.
func setClock([]string) error {
	var timex unix.Timex
	if _, err := unix.Adjtimex(&timex); err != nil {
		return failed("read", err)
	}
	timex.Modes = unix.ADJ_TICK
	_, err := unix.Adjtimex(&timex)
	return failed("adjtimex", err)
}

// raisePriority raises the priority of its thread above that of other processes on the node.
func raisePriority([]string) error {
	return failed("setpriority", unix.Setpriority(unix.PRIO_PROCESS, 0, -10))
}

// watchProcessor counts the events of the first processor, including those of other processes.
func watchProcessor([]string) error {
	attr := &unix.PerfEventAttr{Type: unix.PERF_TYPE_SOFTWARE, Config: unix.PERF_COUNT_SW_CPU_CLOCK, Size: unix.PERF_ATTR_SIZE_VER0}
	fd, err := unix.PerfEventOpen(attr, -1, 0, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		return failed("perf_event_open", err)
	}
	return unix.Close(fd)
}
