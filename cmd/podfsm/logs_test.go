package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

// daemonLog is a log of containerd with lines about the pod ready and others.
var daemonLog = strings.Join([]string{
	`time="t" level=info msg="RunPodSandbox for &PodSandboxMetadata{Name:web,Uid:u,Namespace:default,Attempt:0,} returns sandbox id \"` + ready.GetId() + `\""`,
	`time="t" level=warning msg="step failed" error="no luck" sandbox=` + ready.GetId() + ` step=attach_network`,
	`time="t" level=info msg="drain started"`,
	`time="t" level=info msg="another line of the trace" trace_id=` + ready.GetTraceId(),
	`time="t" level=debug msg="PodSandboxConfig &PodSandboxConfig{Annotations:map[secret:debug],}" sandbox=` + pending.GetId(),
	`time="t" level=info msg="stock says secret:stock"`,
	`{"error":"no luck","level":"error","msg":"podfsm is degraded","time":"t"}`,
}, "\n") + "\n"

// findable is a daemon that knows the pod ready.
func findable() fakeSandboxes {
	return fakeSandboxes{status: faring, inspect: func(_ context.Context, ref string) (*podfsmv1.InspectResponse, error) {
		switch ref {
		case "web", ready.GetId():
			return readyInspection, nil
		case starting.GetId(), pending.GetId():
			return pendingInspection, nil
		}
		return nil, status.Errorf(codes.NotFound, "no sandbox of podfsm matches %q", ref)
	}}
}

// withJournal puts a journalctl in PATH that writes a text and its arguments.
func withJournal(t *testing.T, text string, code int) (args func() string) {
	t.Helper()
	dir := t.TempDir()
	log, said := filepath.Join(dir, "log"), filepath.Join(dir, "args")
	require.NoError(t, os.WriteFile(log, []byte(text), 0o600))
	script := fmt.Sprintf("#!/bin/sh\necho \"$@\" >%s\ncat %s\necho 'no such unit' >&2\nexit %d\n", said, log, code)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "journalctl"), []byte(script), 0o700))
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return func() string {
		all, err := os.ReadFile(said)
		require.NoError(t, err)
		return string(all)
	}
}

func TestLogsOfASandbox(t *testing.T) {
	address := serve(t, findable())
	args := withJournal(t, daemonLog, 0)
	out, err := podfsm(t, "--address", address, "logs", "web")
	require.NoError(t, err)
	require.Equal(t, 3, strings.Count(out, "\n"), out)
	require.Contains(t, out, "no luck")
	require.Contains(t, out, "another line of the trace")
	require.Equal(t, fmt.Sprintf("--unit containerd.service --since @%d --output short-iso --no-pager --quiet\n", begin.Unix()), args())

	file := filepath.Join(t.TempDir(), "log")
	require.NoError(t, os.WriteFile(file, []byte(daemonLog), 0o600))
	fromFile, err := podfsm(t, "--address", address, "logs", "--file", file, "web")
	require.NoError(t, err)
	require.Equal(t, out, fromFile)

	_, err = podfsm(t, "--address", address, "logs", "nobody")
	require.Equal(t, exitNotFound, exitStatus(err))
	withJournal(t, "", 1)
	_, err = podfsm(t, "--address", address, "logs", "web")
	require.EqualError(t, err, "journalctl failed: exit status 1: no such unit")
	t.Setenv("PATH", t.TempDir())
	_, err = podfsm(t, "--address", address, "logs", "web")
	require.ErrorContains(t, err, "name the daemon's log by --file")
}

// A bundle has every message that podfsm logs, in both formats of containerd. It has no other line,
// whatever the line quotes.
func TestBundledLines(t *testing.T) {
	messages := strings.Split(strings.TrimSpace(ownMessages), "\n")
	require.Greater(t, len(messages), 60)
	for name, format := range map[string]logrus.Formatter{"text": &logrus.TextFormatter{FullTimestamp: true}, "json": &logrus.JSONFormatter{}} {
		bundled := func(message string, fields logrus.Fields) bool {
			var line, kept bytes.Buffer
			line.WriteString("2026-01-02T03:04:05+0000 node containerd[123]: ")
			logger := &logrus.Logger{Out: &line, Formatter: format, Level: logrus.InfoLevel}
			logger.WithFields(fields).Info(message)
			all := line.String()
			require.NoError(t, keepBundled(&kept, &line))
			if kept.Len() > 0 {
				require.Equal(t, all, kept.String())
			}
			return kept.Len() > 0
		}
		for _, message := range append(messages, "RunPodSandbox for &PodSandboxMetadata{Name:web,}", `StopPodSandbox for "web"`) {
			require.NotRegexp(t, "^%", message, "it matches every line")
			require.True(t, bundled(formatted.ReplaceAllString(message, "a"), nil), "%s: %s", name, message)
			odd := `{"msg":"b"} msg="c"` + "\n<d>"
			require.True(t, bundled(formatted.ReplaceAllString(message, odd), logrus.Fields{"error": odd}), "%s: %s", name, message)
			quoting := logrus.Fields{"error": message, "note": fmt.Sprintf("{\"msg\":%q} msg=%q", message, message), "sandbox": ready.GetId(), "step": "attach_network"}
			require.False(t, bundled("secret, "+message, quoting), "%s: %s", name, message)
		}
	}
	var kept bytes.Buffer
	require.NoError(t, keepBundled(&kept, strings.NewReader("drain started\n{}\nmsg=drain started\n")))
	require.Empty(t, kept.String(), "no entry of containerd's log")
}

// unpacked returns the files of a bundle by name.
func unpacked(t *testing.T, packed io.Reader) map[string]string {
	t.Helper()
	plain, err := gzip.NewReader(packed)
	require.NoError(t, err)
	files := map[string]string{}
	for all := tar.NewReader(plain); ; {
		header, err := all.Next()
		if err == io.EOF {
			return files
		}
		require.NoError(t, err)
		text, err := io.ReadAll(all)
		require.NoError(t, err)
		_, name, _ := strings.Cut(header.Name, "/")
		files[name] = string(text)
	}
}

func TestBundle(t *testing.T) {
	withJournal(t, daemonLog, 0)
	service := findable()
	service.leaks = func(*podfsmv1.LeaksRequest) *podfsmv1.LeaksResponse { return someLeaks() }
	dir := t.TempDir()
	config := filepath.Join(dir, "config.toml")
	require.NoError(t, os.WriteFile(config, []byte(fmt.Sprintf(`version = 4
[plugins.'io.containerd.server.v1.grpc']
address = '%s'
[plugins.'io.containerd.cri.v1.images'.registry.configs.'example.com'.auth]
password = 'secret:registry'
[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
`, serve(t, service))), 0o600))
	path := filepath.Join(dir, "bundle.tar.gz")
	out, err := podfsm(t, "--config", config, "bundle", "--file", path)
	require.NoError(t, err)
	require.Equal(t, path+"\n", out)
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	files := unpacked(t, bytes.NewReader(text))
	for name, want := range map[string]string{
		"status.txt":                             "Degraded:",
		"status.txt.stderr":                      "exit status 2",
		"ps.json":                                ready.GetId(),
		"leaks.txt":                              lostID,
		"drain-plan.txt":                         "wait for 3 sandboxes",
		"ids.json":                               "quarantine",
		"config.toml":                            "restrict_oom_score_adj = true",
		"daemon.log":                             "podfsm is degraded",
		"node/proc/version":                      "Linux",
		"sandboxes/" + pending.GetId() + ".json": "attach_network",
	} {
		require.Contains(t, slices.Collect(maps.Keys(files)), name)
		require.Contains(t, files[name], want, name)
	}
	require.NotContains(t, files, "sandboxes/"+ready.GetId()+".json", "the sandbox is not in trouble")
	for name, text := range files {
		require.NotContains(t, text, "secret", name)
	}
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.EqualValues(t, 0o600, info.Mode().Perm())

	_, err = podfsm(t, "--config", config, "bundle", "--file", filepath.Join(dir, "no", "bundle"))
	require.ErrorContains(t, err, "no such file or directory")
}
