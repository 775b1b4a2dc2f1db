package netns

import (
	"fmt"
	"path"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// FuzzParseParent has the name of a process, which is its own to choose, and must not pass for anything else in the line.
func FuzzParseParent(f *testing.F) {
	f.Add("pause", "S 17 17 17 0 -1")
	f.Add(") S 1 (", "R 17 1")
	f.Add("a\n) Z 1", "S")
	f.Fuzz(func(t *testing.T, name, rest string) {
		parent, err := parseParent(fmt.Appendf(nil, "42 (%s) S 17 %s", name, strings.ReplaceAll(rest, ")", "")))
		require.NoError(t, err)
		require.Equal(t, 17, parent)
		_, _ = parseParent([]byte(name + rest)) // what is no such line does no harm
	})
}

// FuzzCgroups has a cgroup path, part of which a caller of the CRI gives, and the cgroups of a process. Only in its own cgroup a
// process passes for the sandbox's.
func FuzzCgroups(f *testing.F) {
	f.Add("/kubepods/pod1/id", "4:memory:/kubepods/pod1/id\n")
	f.Add("kubepods.slice:cri-containerd:id", "0::/kubepods.slice/cri-containerd-id.scope\n")
	f.Add("/", "0::/\n")
	f.Add("../..", "0::/..\n")
	f.Add("a:b:c.slice", "0::/a:b:c.slice\n")
	f.Fuzz(func(t *testing.T, cgroupsPath, groups string) {
		matches, err := cgroupMatcher(cgroupsPath)
		if err != nil {
			return
		}
		require.False(t, matches("/"), "any process may be in the root cgroup")
		require.False(t, matches(""))
		if anyCgroup(groups, matches) {
			last := path.Base(strings.Split(cgroupsPath, ":")[strings.Count(cgroupsPath, ":")])
			require.Contains(t, groups, last)
		}
	})
}

// FuzzParseIDMap has the maps of a process's user namespace. What is read is what stands there.
func FuzzParseIDMap(f *testing.F) {
	f.Add("         0     131072      65536\n")
	f.Add("0 1 2\n3 4 5")
	f.Add("0 1\n2\n")
	f.Add("0x10 0b1 0o7\n-1 1 1\n1 1 99999999999\n")
	f.Fuzz(func(t *testing.T, text string) {
		maps, err := parseIDMap(text)
		if err != nil {
			require.Empty(t, maps)
			return
		}
		var written strings.Builder
		for _, m := range maps {
			fmt.Fprintf(&written, "%d %d %d\n", m.ContainerID, m.HostID, m.Size)
		}
		again, err := parseIDMap(written.String())
		require.NoError(t, err)
		require.Equal(t, maps, again)
	})
}
