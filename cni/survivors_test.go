package cni

import (
	"context"
	"io"
	"os/exec"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// plugin is a shell with a child: both carry the marker, as a plugin and its IPAM plugin do. It ends when its stdin does.
func plugin(t *testing.T, env ...string) (cmd *exec.Cmd, finish func()) {
	cmd = exec.Command("sh", "-c", "cat; :")
	cmd.Env = append([]string{"PATH=/usr/bin:/bin"}, env...)
	in, out := io.Pipe()
	cmd.Stdin = in
	require.NoError(t, cmd.Start())
	return cmd, func() { out.Close() }
}

func TestEndSurvivors(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	s1, s2, s3 := sandboxID+"1", sandboxID+"2", sandboxID+"3"
	s12 := s1 + "2"
	reap := func(cmd *exec.Cmd, finish func()) <-chan error {
		reaped := make(chan error, 1)
		go func() {
			state, err := cmd.Process.Wait()
			finish()
			if err == nil && !state.Success() {
				err = &exec.ExitError{ProcessState: state}
			}
			_ = cmd.Wait()
			reaped <- err
		}()
		return reaped
	}
	t.Run("kills an ADD, and no other's", func(t *testing.T) {
		mine, finishMine := plugin(t, sandboxEnv+"="+s1, "CNI_COMMAND=ADD")
		other, finishOther := plugin(t, sandboxEnv+"="+s12, "CNI_COMMAND=ADD")
		reaped := reap(mine, finishMine)
		require.NoError(t, endSurvivors(ctx, s1, time.Minute))
		require.ErrorContains(t, <-reaped, "killed")
		left, err := survivors(s1)
		require.NoError(t, err)
		require.Empty(t, left)
		left, err = survivors(s12)
		require.NoError(t, err)
		require.NotEmpty(t, left)
		finishOther()
		_ = other.Wait()
	})
	t.Run("waits for a DEL", func(t *testing.T) {
		del, finish := plugin(t, sandboxEnv+"="+s2, "CNI_COMMAND=DEL")
		ended := make(chan error, 1)
		go func() { ended <- endSurvivors(ctx, s2, time.Minute) }()
		finish()
		require.NoError(t, del.Wait(), "it came to its own end")
		require.NoError(t, <-ended)
	})
	t.Run("kills a DEL that doesn't end", func(t *testing.T) {
		del, finish := plugin(t, sandboxEnv+"="+s3, "CNI_COMMAND=DEL")
		reaped := reap(del, finish)
		require.NoError(t, endSurvivors(ctx, s3, time.Millisecond))
		require.ErrorContains(t, <-reaped, "killed")
	})
	require.NoError(t, endSurvivors(ctx, "nobody", time.Minute))
}
