package pause

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"slices"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	seccompbpf "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
)

// SeccompFilter returns the filter that every pause runs under, whatever the pod's profile. It allows what
// containerd's RuntimeDefault allows a process without capabilities on this architecture: pause only sleeps and reaps.
// The file is an array of struct sock_filter (seccomp(2)). The caller closes it.
func SeccompFilter() (*os.File, error) {
	filter, err := assemble(seccomp.DefaultProfile(&specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{}}}))
	if err != nil {
		return nil, fmt.Errorf("failed to make the seccomp filter of pause: %w", err)
	}
	var program bytes.Buffer
	if err := binary.Write(&program, binary.NativeEndian, filter); err != nil {
		return nil, fmt.Errorf("failed to make the seccomp filter of pause: %w", err)
	}
	file, err := sealed("seccomp", &program)
	if err != nil {
		return nil, fmt.Errorf("failed to make the seccomp filter of pause: %w", err)
	}
	return file, nil
}

// assemble turns the rules of an OCI profile into a filter. A system call that no rule allows fails with EPERM or with
// the error of its rule. So does every system call of another architecture.
func assemble(profile *specs.LinuxSeccomp) ([]bpf.RawInstruction, error) {
	info, err := arch.GetInfo("")
	if err != nil {
		return nil, err
	}
	groups := groupsOf(profile, info)
	policy := seccompbpf.Policy{DefaultAction: seccompbpf.ActionErrno, Syscalls: groups}
	program, err := policy.Assemble()
	if err != nil {
		return nil, err
	}
	return bpf.Assemble(program)
}

// groupsOf returns the system calls of a profile that an architecture has: the allowed ones, and those with an error
// of their own.
func groupsOf(profile *specs.LinuxSeccomp, info *arch.Info) []seccompbpf.SyscallGroup {
	allowed := seccompbpf.SyscallGroup{Action: seccompbpf.ActionAllow}
	var groups []seccompbpf.SyscallGroup
	for _, rule := range profile.Syscalls {
		group := &allowed
		switch {
		case rule.Action == specs.ActErrno && rule.ErrnoRet != nil && len(rule.Args) == 0:
			groups = append(groups, seccompbpf.SyscallGroup{Action: seccompbpf.ActionErrno | seccompbpf.Action(*rule.ErrnoRet)})
			group = &groups[len(groups)-1]
		case rule.Action != specs.ActAllow:
			continue
		}
		conditions, ok := conditionsOf(rule.Args)
		for _, name := range rule.Names {
			switch _, known := info.SyscallNames[name]; {
			case !known || !ok: // of another architecture, or with a condition that the filter can't express
			case len(conditions) > 0:
				group.NamesWithCondtions = append(group.NamesWithCondtions, seccompbpf.NameWithConditions{Name: name, Conditions: conditions})
			case !slices.Contains(group.Names, name):
				group.Names = append(group.Names, name)
			}
		}
	}
	return append(groups, allowed)
}

// conditionsOf returns the conditions on the arguments of a system call. ok is false if the filter can't express one.
func conditionsOf(args []specs.LinuxSeccompArg) (all seccompbpf.ArgumentConditions, ok bool) {
	operations := map[specs.LinuxSeccompOperator]seccompbpf.Operation{
		specs.OpEqualTo: seccompbpf.Equal, specs.OpNotEqual: seccompbpf.NotEqual,
		specs.OpLessThan: seccompbpf.LessThan, specs.OpLessEqual: seccompbpf.LessOrEqual,
		specs.OpGreaterThan: seccompbpf.GreaterThan, specs.OpGreaterEqual: seccompbpf.GreaterOrEqual,
	}
	for _, arg := range args {
		operation := operations[arg.Op]
		if arg.Op == specs.OpMaskedEqual && arg.ValueTwo == 0 {
			operation = seccompbpf.BitsNotSet
		}
		if operation == "" {
			return nil, false
		}
		all = append(all, seccompbpf.Condition{Argument: uint32(arg.Index), Operation: operation, Value: arg.Value})
	}
	return all, true
}
