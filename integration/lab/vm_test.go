package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// Only a panic of the boot that has just ended is a reason to boot again.
func TestMachineThatEndedAtBoot(t *testing.T) {
	m := &machine{dir: t.TempDir()}
	before := "[ 9.1] Kernel panic - not syncing: of the boot before\n"
	for _, tt := range []struct {
		name, said string
		panicked   bool
	}{
		{"a panic", "[ 2.6] Kernel panic - not syncing: Fatal exception in interrupt\n", true},
		{"nothing", "", false},
		{"a shutdown", "[ 30.0] reboot: Power down\n", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			require.NoError(t, os.WriteFile(filepath.Join(m.dir, "console.log"), []byte(before+tt.said), 0o600))
			err := m.ended(int64(len(before)))
			require.ErrorContains(t, err, "console.log")
			if tt.panicked {
				require.ErrorIs(t, err, errPanic)
			} else {
				require.NotErrorIs(t, err, errPanic)
			}
		})
	}
}
