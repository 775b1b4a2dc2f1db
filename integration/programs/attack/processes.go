package main

import "golang.org/x/sys/unix"

// stopProcess stops the process args[0] by a signal.
func stopProcess(args []string) error {
	return failed("kill", unix.Kill(number(args[0]), unix.SIGSTOP))
}

// traceProcess becomes the tracer of the process args[0], until it ends itself.
func traceProcess(args []string) error { return failed("ptrace", unix.PtraceSeize(number(args[0]))) }

// readMemory reads a byte of the memory of the process args[0], or finds that nothing is mapped at that address.
func readMemory(args []string) error {
	into := make([]byte, 1)
	local := []unix.Iovec{{Base: &into[0], Len: 1}}
	_, err := unix.ProcessVMReadv(number(args[0]), local, []unix.RemoteIovec{{Base: 1, Len: 1}}, 0)
	if err == unix.EFAULT {
		return nil // it was allowed to look
	}
	return failed("process_vm_readv", err)
}
