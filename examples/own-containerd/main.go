// Command own-containerd is a containerd of one's own with podfsm in it, in a module of its own.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/cmd/containerd/command"

	// All that containerd's own build has. Leave lines of it out, or put your own plugins beside it.
	_ "github.com/containerd/containerd/v2/cmd/containerd/builtins"

	_ "github.com/podfsm/podfsm/plugin"
)

func main() {
	if err := command.App().Run(context.Background(), os.Args); err != nil {
		fmt.Fprintln(os.Stderr, "own-containerd:", err)
		os.Exit(1)
	}
}
