package host

import (
	"errors"
	"testing"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
)

// Only found mounts are kept: after an error, or without mounts, they are read again.
func TestHierarchiesAreReadOnce(t *testing.T) {
	t.Parallel()
	v2 := []*mountinfo.Info{{FSType: "cgroup2", Mountpoint: "/sys/fs/cgroup"}}
	answers := []struct {
		mounts []*mountinfo.Info
		err    error
	}{{err: errors.New("no files left")}, {}, {mounts: v2}, {err: errors.New("it was read again")}}
	reads := 0
	read := onceFound(func() ([]*mountinfo.Info, error) {
		reads++
		return answers[reads-1].mounts, answers[reads-1].err
	})
	_, err := read()
	require.EqualError(t, err, "no files left")
	mounts, err := read()
	require.NoError(t, err)
	require.Empty(t, mounts)
	for range 3 {
		mounts, err = read()
		require.NoError(t, err)
		require.Equal(t, v2, mounts)
	}
	require.Equal(t, 3, reads)
}
