package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"k8s.io/client-go/rest"
)

func TestWithImport(t *testing.T) {
	const line = `imports = ["/etc/containerd/conf.d/*.toml"]` + "\n"
	for name, tc := range map[string]struct{ has, gets, fails string }{
		"none":           {has: "version = 3\n[grpc]\n", gets: line + "version = 3\n[grpc]\n"},
		"the directory":  {has: "version = 3\n" + line, gets: "version = 3\n" + line},
		"relative":       {has: `imports = ["conf.d/*"]`, gets: `imports = ["conf.d/*"]`},
		"one of several": {has: `imports = ["/a/*", "/etc/containerd/conf.d/podfsm.toml"]`, gets: `imports = ["/a/*", "/etc/containerd/conf.d/podfsm.toml"]`},
		"others":         {has: `imports = ["/a/*"]`, fails: "has other imports"},
		"an empty list":  {has: `imports = []`, fails: "has other imports"},
		"no TOML":        {has: `imports = [`, fails: "failed to read"},
	} {
		t.Run(name, func(t *testing.T) {
			text, err := withImport([]byte(tc.has))
			if tc.fails != "" {
				require.ErrorContains(t, err, tc.fails)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tc.gets, string(text))
		})
	}
}

func TestLabel(t *testing.T) {
	var method, path, kind, body, token string
	status, answer := http.StatusOK, `{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":{"name":"node-1"}}`
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, _ := io.ReadAll(r.Body)
		method, path, kind, body, token = r.Method, r.URL.Path, r.Header.Get("Content-Type"), string(text), r.Header.Get("Authorization")
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, answer)
	}))
	defer server.Close()
	config := &rest.Config{Host: server.URL, BearerToken: "secret"}
	yes := "true"
	require.NoError(t, labelBy(t.Context(), config, "node-1", &yes))
	require.Equal(t, []string{http.MethodPatch, "/api/v1/nodes/node-1", "application/merge-patch+json", "Bearer secret"}, []string{method, path, kind, token})
	require.JSONEq(t, `{"metadata":{"labels":{"podfsm.io/installed":"true"}}}`, body)
	require.NoError(t, labelBy(t.Context(), config, "node-1", nil))
	require.JSONEq(t, `{"metadata":{"labels":{"podfsm.io/installed":null}}}`, body)

	status, answer = http.StatusForbidden, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"the policy forbids it","reason":"Forbidden","code":403}`
	require.ErrorContains(t, labelBy(t.Context(), config, "node-1", nil), `failed to label node "node-1": the policy forbids it`)
	require.ErrorContains(t, labelBy(t.Context(), config, "", nil), "NODE_NAME")
}

// A node that has podfsm already, or whose containerd has flags, is left alone.
func TestRefuse(t *testing.T) {
	require.NoFileExists(t, program)
	h := &host{}
	require.NoError(t, h.refuse(false, state{}))
	require.NoError(t, h.refuse(true, state{podfsm: true, flags: []string{"--log-level=debug"}}), "the operator has edited the drop-in")
	require.ErrorContains(t, h.refuse(false, state{podfsm: true}), "podfsm is installed already")
	require.ErrorContains(t, h.refuse(false, state{flags: []string{"--config", "/etc/c.toml"}}), `containerd with flags, which podfsm's drop-in doesn't have: "--config /etc/c.toml"; set them in "/etc/containerd/config.toml"`)
}

// A power cut in the middle of a removal leaves no drop-in that names a program which is gone.
func TestDropInsAreRemovedFirst(t *testing.T) {
	i := installation{Files: []string{"/etc/a", program, dropIn, "/usr/share/b"}}
	require.Equal(t, []string{trialDropIn, dropIn, "/etc/a", program, "/usr/share/b"}, i.inOrder())
}

// A pod prints what the switch says while the switch works.
func TestFollow(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	done, printed := make(chan struct{}), make(chan error, 1)
	in, out := io.Pipe()
	go func() {
		defer out.Close()
		printed <- follow(out, file, done)
	}()
	lines := bufio.NewScanner(in)
	for _, line := range []string{"first", "second"} {
		log, err := os.OpenFile(file, os.O_APPEND|os.O_WRONLY, 0)
		require.NoError(t, err)
		_, err = fmt.Fprintln(log, line)
		require.NoError(t, errors.Join(err, log.Close()))
		require.True(t, lines.Scan())
		require.Equal(t, line, lines.Text())
	}
	close(done)
	require.False(t, lines.Scan())
	require.NoError(t, <-printed)
}

// The scheduler sends pods to a node only while podfsm can run them.
func TestOrderOfLabelAndWork(t *testing.T) {
	failure := errors.New("it fails")
	noPod := exec.CommandContext(t.Context(), "sh", "-c", fmt.Sprint("exit ", noPodStatus)).Run()
	for _, tc := range []struct {
		command string
		failure error
		want    string
	}{
		{"install", nil, "unready work labelled ready "},
		{"install", failure, "unready work "},
		{"install", noPod, "unready work unlabelled "},
		{"uninstall", nil, "unready unlabelled work ready "},
		{"uninstall", failure, "unready unlabelled work "},
	} {
		var did string
		p := &pod{
			out: &bytes.Buffer{},
			work: func(context.Context, string) error {
				did += "work "
				return tc.failure
			},
			label: func(_ context.Context, value *string) error {
				if value == nil {
					did += "un"
				}
				did += "labelled "
				return nil
			},
			ready: func(done bool) error {
				if !done {
					did += "un"
				}
				did += "ready "
				return nil
			},
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // it would rest until then
		do := map[string]func(context.Context) error{"install": p.install, "uninstall": p.uninstall}[tc.command]
		require.ErrorIs(t, do(ctx), tc.failure)
		require.Equal(t, tc.want, did, tc.command)
	}
}

// The operator reads on a terminal what CNI plugins say.
func TestSay(t *testing.T) {
	var out bytes.Buffer
	h := &host{out: &out}
	h.say("a pod has failed: %v", errors.New("é\x1b[2J\u009b2J\u202e\nand more"))
	require.Equal(t, "a pod has failed: é\uFFFD[2J\uFFFD2J\uFFFD\nand more\n", out.String())
}
