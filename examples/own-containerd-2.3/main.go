// Command own-containerd-2.3 is a containerd 2.3, the long-term release, with podfsm in it.
package main

import (
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/cmd/containerd/command"

	// All that containerd's own build has. Leave lines of it out, or put your own plugins beside it.
	_ "github.com/containerd/containerd/v2/cmd/containerd/builtins"

	_ "github.com/podfsm/podfsm/plugin"
)

func main() {
	if err := command.App().Run(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, "own-containerd-2.3:", err)
		os.Exit(1)
	}
}
