package main

import (
	"os"
	"os/exec"
	"syscall"
)

// beMany uses ids of each of args[2] ranges of 64Ki that start at args[1], in the way args[0]: as supplementary groups of one process,
// or as the user of a process each. It returns when they have ended.
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
