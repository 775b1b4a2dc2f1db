package main

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// poseAs makes the process look like another program: it listens on the unix socket args[0], works
// in the directory args[1], and executes itself with the arguments args[2:], the first of which
// sets its comm. It makes the directories. Then it sleeps forever.
func poseAs(args []string) error {
	socket, dir, argv := args[0], args[1], args[2:]
	for _, made := range []string{filepath.Dir(socket), dir} {
		if err := os.MkdirAll(made, 0o777); err != nil {
			return err
		}
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return failed("socket", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: socket}); err != nil {
		return failed("bind", err)
	}
	if err := unix.Listen(fd, 1); err != nil {
		return failed("listen", err)
	}
	if err := unix.Chdir(dir); err != nil {
		return failed("chdir", err)
	}
	return failed("execve", unix.Exec("/proc/self/exe", argv, append(os.Environ(), posing+"="+filepath.Base(argv[0]))))
}

// posing is the environment variable that tells the executed program to sleep.
const posing = "ATTACK_POSES_AS"

// pose never returns.
func pose(comm string) {
	if err := os.WriteFile("/proc/self/comm", []byte(comm), 0); err != nil {
		fmt.Fprintln(os.Stderr, "attack:", err)
		os.Exit(1)
	}
	fmt.Println("poses")
	for {
		_ = unix.Pause()
	}
}
