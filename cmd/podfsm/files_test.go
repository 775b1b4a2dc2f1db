package main

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

// What podfsm writes in a directory where everyone may write gets into no file that another user has put there.
func TestFilesOfOthers(t *testing.T) {
	withJournal(t, daemonLog, 0)
	service := findable()
	service.leaks = func(*podfsmv1.LeaksRequest) *podfsmv1.LeaksResponse { return someLeaks() }
	address := serve(t, service)
	t.Chdir(t.TempDir())
	victim := filepath.Join(t.TempDir(), "victim")
	require.NoError(t, os.WriteFile(victim, []byte("precious"), 0o644))

	// The name of a bundle has the time.
	host, err := os.Hostname()
	require.NoError(t, err)
	for start, ahead := time.Now(), time.Duration(0); ahead < time.Minute; ahead += time.Second {
		require.NoError(t, os.Symlink(victim, fmt.Sprintf("podfsm-bundle-%s-%s.tar.gz", host, start.Add(ahead).UTC().Format("20060102T150405Z"))))
	}
	require.NoError(t, os.Symlink(victim, "link"))
	require.NoError(t, unix.Mkfifo("fifo", 0o666))
	require.NoError(t, os.WriteFile("open", nil, 0o666))
	theirs, err := os.Open("open")
	require.NoError(t, err)
	defer theirs.Close()
	for _, args := range [][]string{nil, {"--file=link"}, {"--file=open"}} {
		out, err := podfsm(t, append([]string{"--address", address, "bundle"}, args...)...)
		require.NoError(t, err)
		file := strings.TrimSpace(out)
		info, err := os.Lstat(file)
		require.NoError(t, err)
		require.Equal(t, fs.FileMode(0o600), info.Mode(), file)
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		require.Contains(t, unpacked(t, bytes.NewReader(text)), "ps.json")
	}
	info, err := theirs.Stat()
	require.NoError(t, err)
	require.Zero(t, info.Size())
	for _, args := range [][]string{{"bundle", "--file", "fifo"}, {"timeline", "--html", "fifo", "web"}} {
		_, err = podfsm(t, append([]string{"--address", address}, args...)...)
		require.ErrorContains(t, err, "is not a regular file")
	}

	require.NoError(t, os.Symlink(victim, "page"))
	_, err = podfsm(t, "--address", address, "timeline", "--html", "page", "web")
	require.NoError(t, err)
	require.NoError(t, os.Symlink(victim, fmt.Sprintf(".next.%d", os.Getpid())))
	_, err = podfsm(t, "--address", address, "timeline", "--html", "next", "web")
	require.ErrorContains(t, err, "file exists")
	text, err := os.ReadFile(victim)
	require.NoError(t, err)
	require.Equal(t, "precious", string(text))
}
