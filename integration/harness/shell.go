package harness

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// crictl is not a part: tests use the CRI directly.
var crictl = install{module: "tools/modules/critest", bin: ".build/bin", args: []string{"sigs.k8s.io/cri-tools/cmd/crictl"}, produces: "crictl"}

const crictlTimeout = time.Minute

// WriteShell writes a program that opens a shell on the node, and returns its path. The program
// runs bash with its own arguments, in the network namespace and the directory of the node, with
// crictl, ctr and podfsm for its containerd. Beside the program are pod.json and container.json for
// crictl run. The shell and its processes end with the node.
func (n *Node) WriteShell(ctx context.Context) (path string, err error) {
	if _, err := builds.tool(ctx, crictl, "crictl"); err != nil {
		return "", err
	}
	if err := errors.Join(n.writeManifests(), n.writeCrictlConfig()); err != nil {
		return "", err
	}
	path = n.path("shell")
	return path, os.WriteFile(path, []byte(n.shellScript()), 0o755)
}

func (n *Node) shellScript() string {
	programs := []string{filepath.Dir(n.executable), n.binary(""), filepath.Join(n.repo, ".build/kubernetes"), os.Getenv("PATH")}
	env := slices.Concat(n.env, []string{
		"PATH=" + strings.Join(programs, ":"),
		"CRI_CONFIG_FILE=" + n.path("crictl.yaml"),
		"CONTAINERD_ADDRESS=" + n.Socket(),
		"CONTAINERD_NAMESPACE=" + criNamespace,
		`PS1=\w\$ `,
	})
	var script strings.Builder
	fmt.Fprintf(&script, "#!/bin/sh\n# Opens a shell on node %s, or runs what bash is asked to.\n", n.name)
	for _, variable := range env {
		name, value, _ := strings.Cut(variable, "=")
		fmt.Fprintf(&script, "export %s=%s\n", name, shellQuote(value))
	}
	fmt.Fprintf(&script, "cd %s\nexec nsenter --net=%s bash --norc \"$@\"\n", shellQuote(n.dir), shellQuote(n.netnsPath()))
	return script.String()
}

func shellQuote(text string) string { return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'" }

// writeCrictlConfig configures crictl for the node, with a longer timeout than 2 s, and without
// pulling images.
func (n *Node) writeCrictlConfig() error {
	config := fmt.Sprintf("runtime-endpoint: unix://%s\nimage-endpoint: unix://%[1]s\ntimeout: %.0f\ndisable-pull-on-run: true\n",
		n.Socket(), Patience(crictlTimeout).Seconds())
	return os.WriteFile(n.path("crictl.yaml"), []byte(config), 0o644)
}

// writeManifests writes a pod with a user namespace and its container in the format of crictl.
func (n *Node) writeManifests() error {
	pod := n.PodConfig("web")
	if err := os.MkdirAll(pod.GetLogDirectory(), 0o755); err != nil {
		return err
	}
	for name, config := range map[string]any{
		"pod.json":       pod,
		"container.json": containerConfig(pod, "server", Run("httpd", "-f", "-h", "/www")),
	} {
		text, err := json.MarshalIndent(config, "", "  ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(n.path(name), text, 0o644); err != nil {
			return err
		}
	}
	return nil
}
