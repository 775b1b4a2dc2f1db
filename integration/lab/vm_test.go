package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// The machine is booted again only if the emulation failed in the last boot.
func TestMachineThatEndedAtBoot(t *testing.T) {
	m := &machine{dir: t.TempDir()}
	before := "[ 9.1] Kernel panic - not syncing: of the boot before\n"
	for _, tt := range []struct {
		name, said string
		emulation  bool
	}{
		{"a panic", "[ 2.6] Kernel panic - not syncing: Fatal exception in interrupt\n", true},
		{"an assertion of qemu", "qemu-system-x86_64: ../../hw/pci/msix.c:218: msix_table_mmio_write: Assertion `addr + size <= 48' failed.\n", true},
		{"nothing", "", false},
		{"a shutdown", "[ 30.0] reboot: Power down\n", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			require.NoError(t, os.WriteFile(filepath.Join(m.dir, "console.log"), []byte(before+tt.said), 0o600))
			err := m.ended(int64(len(before)))
			require.ErrorContains(t, err, "console.log")
			if tt.emulation {
				require.ErrorIs(t, err, errEmulation)
			} else {
				require.NotErrorIs(t, err, errEmulation)
			}
		})
	}
}
