package host

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestRead(t *testing.T) {
	t.Parallel()
	pids, err := Pids()
	require.NoError(t, err)
	require.Contains(t, pids, os.Getpid())

	data, err := Read(t.Context(), os.Getpid(), "cgroup")
	require.NoError(t, err)
	want, err := os.ReadFile("/proc/self/cgroup")
	require.NoError(t, err)
	require.Equal(t, string(want), string(data))

	link, err := Readlink(t.Context(), os.Getpid(), "ns/pid")
	require.NoError(t, err)
	require.Regexp(t, `^pid:\[\d+\]$`, link)

	_, err = Read(t.Context(), 1<<22+1, "stat")
	require.True(t, errdefs.IsNotFound(err), err)
	for _, pid := range []int{0, -1} {
		_, err = Read(t.Context(), pid, "stat")
		require.True(t, errdefs.IsInvalidArgument(err), err)
	}
}

func TestParseStat(t *testing.T) {
	t.Parallel()
	const rest = " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20\n"
	for _, tc := range []struct {
		data string
		want Stat
	}{
		{"7 (sleep)" + rest, Stat{'S', 4711}},
		{"7 (a) Z 1 (b))" + rest, Stat{'S', 4711}},
		{"7 (a\n)" + rest, Stat{'S', 4711}},
		{"", Stat{}},
		{"7 (sleep) S 1 2", Stat{}},
		{"7 (sleep) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 -1 20", Stat{}},
	} {
		stat, err := parseStat([]byte(tc.data))
		require.Equal(t, tc.want, stat, tc.data)
		require.Equal(t, tc.want == Stat{}, errdefs.IsDataLoss(err), tc.data)
	}
}

// hangs returns the root of a /proc. Reads of "cmdline" of its processes 1 to n hang until the test
// ends; reads of "stat" don't.
func hangs(t *testing.T, n int) string {
	t.Helper()
	root := t.TempDir()
	for pid := 1; pid <= n; pid++ {
		dir := filepath.Join(root, strconv.Itoa(pid))
		require.NoError(t, os.Mkdir(dir, 0o755))
		require.NoError(t, unix.Mkfifo(filepath.Join(dir, "cmdline"), 0o644)) // open(2) waits for a writer
		require.NoError(t, os.WriteFile(filepath.Join(dir, "stat"), []byte("answers"), 0o644))
	}
	return root
}

func TestReadThatHangs(t *testing.T) {
	t.Parallel()
	root := hangs(t, 2)
	r := newReader(root, 50*time.Millisecond)
	_, err := r.read(t.Context(), 1, "cmdline", readFile)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "process 1 hangs")
	before := runtime.NumGoroutine()

	// Other reads of the same file fail at once and start nothing. Other files and other processes
	// answer.
	begun := time.Now()
	for range 1000 {
		_, err = r.read(t.Context(), 1, "cmdline", readFile)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "process 1")
	}
	require.Less(t, time.Since(begun), 10*time.Second)
	require.Less(t, runtime.NumGoroutine(), before+50)
	for pid := 1; pid <= 2; pid++ {
		data, err := r.read(t.Context(), pid, "stat", readFile)
		require.NoError(t, err)
		require.Equal(t, "answers", string(data))
	}

	// The end of the caller's context counts first.
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("not wanted any more"))
	_, err = r.read(ctx, 2, "cmdline", readFile)
	require.ErrorContains(t, err, "not wanted any more")

	// Once the read has answered, the file is read again.
	go os.WriteFile(filepath.Join(root, "1", "cmdline"), []byte("late"), 0)
	soon(t, func() bool { r.mu.Lock(); defer r.mu.Unlock(); return len(r.reading) == 0 }, "the read has answered")
	go os.WriteFile(filepath.Join(root, "1", "cmdline"), []byte("now"), 0)
	data, err := r.read(t.Context(), 1, "cmdline", readFile)
	require.NoError(t, err)
	require.Equal(t, "now", string(data))
}

func TestReadsThatHangAreBounded(t *testing.T) {
	t.Parallel()
	root := hangs(t, maxReads+1)
	r := newReader(root, 20*time.Millisecond)
	for pid := 1; pid <= maxReads; pid++ {
		_, err := r.read(t.Context(), pid, "cmdline", readFile)
		require.ErrorIs(t, err, context.DeadlineExceeded)
	}
	_, err := r.read(t.Context(), maxReads+1, "cmdline", readFile)
	require.True(t, errdefs.IsUnavailable(err), err)
	require.Len(t, r.reading, maxReads)
	for pid := 1; pid <= maxReads; pid++ {
		require.NoError(t, os.WriteFile(filepath.Join(root, strconv.Itoa(pid), "cmdline"), nil, 0))
	}
	soon(t, func() bool { return len(r.slots) == 0 }, "all have answered")
}

func TestReadIsBoundedInSize(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(root, "1"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(root, "1/environ"), make([]byte, maxFile+1), 0o644))
	_, err := newReader(root, time.Minute).read(t.Context(), 1, "environ", readFile)
	require.True(t, errdefs.IsResourceExhausted(err), err)
}
