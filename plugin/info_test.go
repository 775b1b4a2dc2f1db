package plugin

import (
	"os"
	"path/filepath"
	"testing"

	cg2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/require"
)

// The machines that the tests run on have cgroup v1, for which TestControllerAPI and TestStatsLikeStock stand. Here is a v2 in files.
func TestMetricsOfCgroup2(t *testing.T) {
	for name, tc := range map[string]struct {
		path  string
		files map[string]string
		check func(*testing.T, *cg2.Metrics)
		fails bool
	}{
		"a pod's": {
			path: "/kubepods/podu-1",
			files: map[string]string{
				"cpu.stat":       "usage_usec 1234\nuser_usec 1000\nsystem_usec 234\nnr_periods 3\n",
				"memory.stat":    "anon 4096\nfile 8192\ninactive_file 512\npgfault 7\npgmajfault 1\n",
				"memory.current": "65536\n",
				"memory.max":     "1048576\n",
			},
			check: func(t *testing.T, m *cg2.Metrics) {
				require.EqualValues(t, 1234, m.GetCPU().GetUsageUsec())
				require.EqualValues(t, 65536, m.GetMemory().GetUsage())
				require.EqualValues(t, 1048576, m.GetMemory().GetUsageLimit())
				require.EqualValues(t, 512, m.GetMemory().GetInactiveFile())
				require.EqualValues(t, 7, m.GetMemory().GetPgfault())
			},
		},
		"a slice without a limit": {
			path:  "/kubepods.slice/kubepods-podu_1.slice",
			files: map[string]string{"cpu.stat": "usage_usec 5\n", "memory.stat": "anon 1\n", "memory.current": "2\n", "memory.max": "max\n"},
			check: func(t *testing.T, m *cg2.Metrics) {
				require.EqualValues(t, 5, m.GetCPU().GetUsageUsec())
				require.EqualValues(t, uint64(1<<64-1), m.GetMemory().GetUsageLimit())
			},
		},
		"without controllers": {
			path:  "/bare",
			check: func(t *testing.T, m *cg2.Metrics) { require.Zero(t, m.GetCPU().GetUsageUsec()) },
		},
		"figures that are none": {path: "/odd", files: map[string]string{"cpu.stat": "usage_usec many\n"}, fails: true},
		"no path of a cgroup":   {path: "relative", fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			require.NoError(t, os.MkdirAll(filepath.Join(root, tc.path), 0o755))
			for file, content := range tc.files {
				require.NoError(t, os.WriteFile(filepath.Join(root, tc.path, file), []byte(content), 0o600))
			}
			read := func(path string) (any, error) { return cgroup2MetricsBelow(root, path) }
			metric, err := metricsBy(read, "s1", tc.path)
			if tc.fails {
				require.ErrorContains(t, err, tc.path)
				require.ErrorContains(t, err, "s1")
				return
			}
			require.NoError(t, err)
			require.Equal(t, "s1", metric.GetID())
			require.NotZero(t, metric.GetTimestamp().GetSeconds())
			figures := &cg2.Metrics{} // the type that containerd's service looks for
			require.NoError(t, typeurl.UnmarshalTo(metric.GetData(), figures))
			tc.check(t, figures)
		})
	}
	_, err := podMetrics("s1", "")
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
}
