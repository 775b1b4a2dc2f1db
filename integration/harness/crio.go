package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// CRIO is CRI-O, for comparisons. Its node has the CRI, but no containerd API, and so no Census, no
// Memory and no Pid of a pod. Of a Config, only Env counts. Its only runtime handler is
// StockHandler.
const CRIO Daemon = "crio"

var crio = install{module: "tools/modules/crio", bin: ".build/bin", args: []string{
	"-tags=containers_image_openpgp,exclude_graphdriver_btrfs,exclude_graphdriver_devicemapper,seccomp", "tool", "./loadimages",
}, produces: "CRI-O (minutes the first time)"}

// pinns builds the program that makes namespaces for CRI-O. Its source is C, in
// the folder pinns of CRI-O's module.
func (b *builder) pinns(ctx context.Context) error {
	list := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/cri-o/cri-o")
	list.Dir = filepath.Join(b.repo, crio.module)
	list.Env = append(os.Environ(), "GOWORK=off")
	dir, err := list.Output()
	if err != nil {
		return fmt.Errorf("failed to find the source of pinns: %w", err)
	}
	sources, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(dir)), "pinns/src/*.c"))
	if err != nil {
		return err
	}
	return run(exec.CommandContext(ctx, "gcc", append([]string{"-std=c99", "-Os", "-s", "-static", "-o", filepath.Join(b.repo, ".build/bin/pinns")}, sources...)...))
}

func (n *Node) isCRIO() bool { return filepath.Base(n.executable) == string(CRIO) }

// prepareCRIO writes the configuration of CRI-O and of its storage, and imports the images there.
func (n *Node) prepareCRIO(ctx context.Context, images []byte) error {
	config, err := n.crioConfig()
	if err != nil {
		return err
	}
	n.env = append(n.env,
		"CONTAINERS_STORAGE_CONF="+n.path("storage.conf"),
		"CONTAINER_CONFIG_DIR="+n.path("crio.conf.d")) // default: /etc/crio/crio.conf.d
	storage := fmt.Sprintf("[storage]\ndriver = 'overlay'\ngraphroot = %q\nrunroot = %q\n", n.path("root"), n.path("state/storage"))
	for file, content := range map[string][]byte{
		"config.toml":  config,
		"policy.json":  []byte(`{"default": [{"type": "insecureAcceptAnything"}]}`),
		"storage.conf": []byte(storage),
	} {
		if err := os.WriteFile(n.path(file), content, 0o644); err != nil {
			return err
		}
	}
	archive := n.path("tmp/images.tar")
	if err := os.WriteFile(archive, images, 0o644); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, n.binary("loadimages"), archive, n.path("root"), n.path("state/storage"), PauseImage, BusyboxImage)
	cmd.Env = n.env
	return errors.Join(run(cmd), os.Remove(archive))
}

// crioConfig returns CRI-O's defaults, with cgroupfs, the node's runc, and every path inside the
// node's directory.
func (n *Node) crioConfig() ([]byte, error) {
	conmon, err := exec.LookPath("conmon")
	if err != nil {
		return nil, fmt.Errorf("%w: `make deps` installs it", err)
	}
	return toml.Marshal(settings{"crio": settings{
		"root":                n.path("root"),
		"runroot":             n.path("state/storage"),
		"storage_driver":      "overlay",
		"log_dir":             n.path("logs"),
		"version_file":        n.path("state/version"),
		"clean_shutdown_file": n.path("root/clean.shutdown"),
		"api":                 settings{"listen": n.Socket()},
		"runtime": settings{
			"default_runtime":                StockHandler,
			"cgroup_manager":                 "cgroupfs",
			"namespaces_dir":                 n.path("state/ns"),
			"pinns_path":                     n.binary("pinns"),
			"container_exits_dir":            n.path("state/exits"),
			"container_attach_socket_dir":    n.path("state/attach"),
			"hooks_dir":                      []string{},
			"cdi_spec_dirs":                  []string{n.path("cdi")},
			"decryption_keys_path":           n.path("root/keys"),
			"irqbalance_config_restore_file": "disable", // default: /etc/sysconfig/orig_irq_banned_cpus
			"runtimes": settings{
				StockHandler: settings{
					"runtime_path":   n.path("bin/runc"),
					"runtime_root":   n.path("state/runc"),
					"monitor_path":   conmon,
					"monitor_cgroup": "pod",
				},
				"crun": settings{"inherit_default_runtime": true}, // CRI-O's own default, which it looks for even so
			},
		},
		"image":   settings{"pause_image": PauseImage, "signature_policy": n.path("policy.json")},
		"network": settings{"network_dir": n.CNIConfDir(), "plugin_dirs": []string{n.path("cni/bin")}},
		"nri":     settings{"enable_nri": false},
	}})
}
