package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/podfsm/podfsm/integration/harness"
)

// makeParts makes the image of the machines' second disk, which is mounted at /lab: all programs, the integration tests and what these
// read, laid out as the repository is.
func makeParts(ctx context.Context, dir string) (image string, err error) {
	repo, images, err := harness.BuildAll(ctx)
	if err != nil {
		return "", err
	}
	bin := filepath.Join(repo, ".build/bin")
	log := filepath.Join(dir, "parts.log")
	for _, build := range [][]string{
		{"go", "test", "-c", "-o", filepath.Join(bin, "integration.test"), "./integration"},
		{"go", "test", "-c", "-o", filepath.Join(bin, "node.test"), "./integration/lab/node"},
		{"env", "CGO_ENABLED=0", "go", "build", "-o", bin, "./integration/lab/agent"},
	} {
		if err := run(ctx, log, build[0], build[1:]...); err != nil {
			return "", err
		}
	}
	if err := pack(ctx, repo, filepath.Join(dir, "package"), log); err != nil {
		return "", err
	}
	stage, err := os.MkdirTemp(dir, "parts-*")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(stage)
	copies := []string{"--archive", "--parents", "bin", ".build/bin", ".build/nodes/package", "integration/testdata", "deploy", "docs", "README.md", stage}
	if err := run(ctx, log, "cp", copies...); err != nil {
		return "", err
	}
	unit, err := containerdUnit(ctx)
	if err != nil {
		return "", err
	}
	for name, content := range map[string][]byte{"containerd.service": unit, "images.tar": images} {
		if err := os.WriteFile(filepath.Join(stage, name), content, 0o644); err != nil {
			return "", err
		}
	}
	image = filepath.Join(dir, "parts.img")
	return image, run(ctx, log, "mkfs.ext4", "-q", "-F", "-d", stage, "-L", "lab", image, "4G")
}

// pack makes the project's Debian package of static binaries, as make dist does.
func pack(ctx context.Context, repo, out, log string) error {
	bin := out + "-bin/"
	if err := run(ctx, log, "env", "CGO_ENABLED=0", "go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin, "./cmd/..."); err != nil {
		return err
	}
	nfpm, err := harness.BuildNFPM(ctx)
	if err != nil {
		return err
	}
	if err := os.RemoveAll(out); err != nil {
		return err
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	return run(ctx, log, filepath.Join(repo, "deploy/package/pack"), "v0.0.0-lab", "1795529540", "amd64", bin, nfpm, out)
}

// containerdUnit is containerd's own.
func containerdUnit(ctx context.Context) ([]byte, error) {
	dir, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/containerd/containerd/v2").Output()
	if err != nil {
		return nil, err
	}
	return os.ReadFile(filepath.Join(strings.TrimSpace(string(dir)), "containerd.service"))
}
