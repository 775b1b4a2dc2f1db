package main

import (
	"os"
	"os/exec"
	"syscall"
)

// beMany uses ids of args[2] ranges of 64Ki from args[1] on. By args[0], they are supplementary
// groups of one process, or the users of one process each. It returns when the processes have
// ended.
func beMany(args []string) error {
	first, ranges := number(args[1]), number(args[2])
	var all []uint32
	for i := range ranges {
		all = append(all, uint32(first+i*65536))
	}
	var credentials []*syscall.Credential
	if args[0] == "groups" {
		credentials = []*syscall.Credential{{Groups: all}}
	} else {
		for _, id := range all {
			credentials = append(credentials, &syscall.Credential{Uid: id, Gid: id})
		}
	}
	var children []*exec.Cmd
	for _, credential := range credentials {
		child := exec.Command("sleep", "600")
		child.SysProcAttr = &syscall.SysProcAttr{Credential: credential}
		if err := child.Start(); err != nil {
			return failed("setgroups", err)
		}
		children = append(children, child)
	}
	os.Stdout.WriteString("runs\n")
	for _, child := range children {
		if err := child.Wait(); err != nil {
			return err
		}
	}
	return nil
}
