package owners

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// BenchmarkShift shifts 33,000 files in 3,000 directories, whose content isn't copied, beside coreutils' chown on the same mount.
func BenchmarkShift(b *testing.B) {
	const dirs, files = 3000, 10
	o := overlays{b.TempDir()}
	layer := o.newDir(b, "layer")
	for d := range dirs {
		dir := filepath.Join(layer, fmt.Sprint(d%20), fmt.Sprint(d%200), fmt.Sprint(d))
		require.NoError(b, os.MkdirAll(dir, 0o755))
		for n := range files {
			require.NoError(b, os.WriteFile(filepath.Join(dir, fmt.Sprint(n)), []byte("content"), 0o644))
		}
	}
	bench := func(name string, change func(b *testing.B, dir string)) {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				upper := o.newDir(b, "upper")
				merged, unmount := o.mount(b, []string{layer}, upper, "index=on", "metacopy=on")
				b.StartTimer()
				change(b, merged)
				b.StopTimer()
				unmount()
				require.NoError(b, os.RemoveAll(upper))
				b.StartTimer()
			}
		})
	}
	bench("chown -R", func(b *testing.B, dir string) {
		require.NoError(b, exec.Command("chown", "-R", "200000:300000", dir).Run())
	})
	for _, workers := range []int{1, 2, 4, 8} {
		bench(fmt.Sprintf("workers=%d", workers), func(b *testing.B, dir string) {
			root, err := os.Open(dir)
			require.NoError(b, err)
			defer root.Close()
			_, err = shift(context.Background(), root, podMap, workers)
			require.NoError(b, err)
		})
	}
}
