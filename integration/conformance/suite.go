package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// suite is a run of critest, with the same options on both sides.
type suite struct {
	bin      string // the folder of its programs
	images   map[string]v1.Image
	focus    string // a pattern; "" selects all specs
	parallel int    // how many specs run at a time
	seed     int64  // of the order of specs
}

// result is the outcome of a spec.
type result struct {
	state    string // as ginkgo names it; "" without such a spec
	attempts int    // 0 if it didn't run
	message  string // the reason of a failure or a skip
}

const (
	passed  = "passed"
	skipped = "skipped"
)

func (r result) String() string {
	switch {
	case r.state == "":
		return "missing"
	case r.state == passed && r.attempts > 1:
		return "passed at last"
	default:
		return r.state
	}
}

func (r result) failed() bool { return r.state != passed && r.state != skipped }

// run runs the specs on a node with this default runtime handler. Failed specs are no error.
func (s suite) run(ctx context.Context, side string, daemon harness.Daemon, handler string) (results map[string]result, err error) {
	begun := time.Now()
	hosts, err := os.MkdirTemp("", "podfsm-conformance-*")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(hosts)) }()
	n, err := harness.NewNode(ctx, harness.Config{Daemon: daemon, TOML: fmt.Sprintf(config, handler, hosts)})
	if err != nil {
		return nil, err
	}
	defer func() {
		ctx := context.WithoutCancel(ctx)
		err = errors.Join(err, removePods(ctx, n), s.keep(side, n.Log()), n.Close(ctx))
	}()
	r, err := serve(ctx, n, s.images, hosts)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if results, err = s.critest(ctx, n); err != nil {
		return nil, fmt.Errorf("failed to run critest on %s: %w", side, err)
	}
	fmt.Printf("%s: %d of %d specs pass, %d are skipped (%.0f s)\n", side, count(results, passed), len(results), count(results, skipped), time.Since(begun).Seconds())
	return results, nil
}

// removePods removes the pods of failed and interrupted specs. Their cgroups are outside of the
// node's, so nothing else finds them.
func removePods(ctx context.Context, n *harness.Node) error {
	ctx, cancel := context.WithTimeout(ctx, harness.Patience(time.Minute))
	defer cancel()
	for {
		list, err := n.Runtime.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
		if err != nil || len(list.GetItems()) == 0 {
			return err
		}
		for _, pod := range list.GetItems() {
			if _, err := n.Runtime.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: pod.GetId()}); err != nil {
				return fmt.Errorf("failed to stop a pod that critest has left: %w", err)
			}
			if _, err := n.Runtime.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: pod.GetId()}); err != nil {
				return fmt.Errorf("failed to remove a pod that critest has left: %w", err)
			}
		}
	}
}

// keep writes a daemon's log into the build folder.
func (s suite) keep(side, log string) error {
	dir := filepath.Join(filepath.Dir(s.bin), "failed")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "conformance-"+side+".log"), []byte(log), 0o644)
}

// config is added to the configuration of both sides.
const config = `
[plugins.'io.containerd.cri.v1.runtime'.containerd]
default_runtime_name = %q

[plugins.'io.containerd.cri.v1.images'.registry]
config_path = %q

[plugins.'io.containerd.nri.v1.nri']
disable = false
`

// critest runs the specs. It runs failed specs again: some examine the node while other specs change it.
func (s suite) critest(ctx context.Context, n *harness.Node) (map[string]result, error) {
	tmp := filepath.Join(n.Dir(), "tmp")
	segments, err := putPrograms(tmp)
	if err != nil {
		return nil, err
	}
	report := filepath.Join(tmp, "report.json")
	args := []string{
		"-runtime-endpoint=unix://" + n.Socket(),
		"-nri-socket=" + filepath.Join(n.Dir(), "nri.sock"),
		"-ginkgo.seed=" + strconv.FormatInt(s.seed, 10),
		"-ginkgo.focus=" + s.focus,
		"-ginkgo.flake-attempts=2",
		"-ginkgo.no-color",
		"-ginkgo.timeout=2h",
		"-ginkgo.json-report=" + report,
	}
	if s.parallel > 1 { // with 1, ginkgo would read the flag as one of go test
		args = append(args, "-parallel="+strconv.Itoa(s.parallel))
	}
	cmd := exec.CommandContext(ctx, filepath.Join(s.bin, "critest"), args...)
	var out bytes.Buffer
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp, "PATH="+tmp+":"+s.bin+":"+os.Getenv("PATH"))
	cmd.Dir, cmd.Stdout, cmd.Stderr = tmp, &out, &out
	// When interrupted, ginkgo ends the running specs, which remove their pods.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGINT) }
	cmd.WaitDelay = harness.Patience(30 * time.Second)
	if err := n.Inside(cmd.Start); err != nil {
		return nil, err
	}
	failed := cmd.Wait()
	if err := segments.remove(context.WithoutCancel(ctx)); err != nil {
		return nil, err
	}
	if ctx.Err() != nil { // the report is incomplete
		return nil, context.Cause(ctx)
	}
	text, err := os.ReadFile(report)
	if err != nil { // critest failed before any spec
		return nil, errors.Join(err, failed, errors.New(out.String()))
	}
	return parse(text)
}

// parse reads ginkgo's report, and numbers specs with the same text.
func parse(report []byte) (map[string]result, error) {
	var suites []struct {
		SpecReports []struct {
			ContainerHierarchyTexts []string
			LeafNodeType            string
			LeafNodeText            string
			State                   string
			NumAttempts             int
			Failure                 struct{ Message string }
		}
	}
	if err := json.Unmarshal(report, &suites); err != nil {
		return nil, fmt.Errorf("failed to read ginkgo's report: %w", err)
	}
	results := map[string]result{}
	for _, suite := range suites {
		for _, r := range suite.SpecReports {
			text := strings.Join(append(r.ContainerHierarchyTexts, r.LeafNodeText), " ")
			got := result{r.State, r.NumAttempts, r.Failure.Message}
			if r.LeafNodeType != "It" {
				if got.failed() {
					return nil, fmt.Errorf("%s %s: %s", r.LeafNodeType, r.State, r.Failure.Message)
				}
				continue
			}
			name := text
			for i := 2; results[name].state != ""; i++ {
				name = fmt.Sprintf("%s (%d)", text, i)
			}
			results[name] = got
		}
	}
	return results, nil
}

// segments is a file with the ids of the shared memory segments that critest makes with ipcmk and
// never removes.
type segments string

// putPrograms writes programs for critest into a directory: an ipcmk that records its segments, and
// a sudo, which some nodes lack.
func putPrograms(dir string) (segments, error) {
	ipcmk, err := exec.LookPath("ipcmk")
	if err != nil {
		return "", fmt.Errorf("%w: `make deps` installs it", err)
	}
	noted := filepath.Join(dir, "segments")
	for name, command := range map[string]string{
		"ipcmk": fmt.Sprintf("%s \"$@\" | tee -a %s", ipcmk, noted),
		"sudo":  `exec "$@"`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+command+"\n"), 0o755); err != nil {
			return "", err
		}
	}
	return segments(noted), nil
}

func (s segments) remove(ctx context.Context) error {
	noted, err := os.ReadFile(string(s))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for line := range strings.Lines(string(noted)) {
		id := strings.TrimSpace(strings.TrimPrefix(line, "Shared memory id: "))
		if out, err := exec.CommandContext(ctx, "ipcrm", "-m", id).CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("failed to remove shared memory segment %q: %w: %s", id, err, out))
		}
	}
	return errors.Join(errs...)
}
