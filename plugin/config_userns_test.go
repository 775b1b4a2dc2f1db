package plugin

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/userns"
)

// parsedUserNS reads and opens the configuration as the controller does.
func parsedUserNS(t *testing.T, text string) (policies, *userns.Pool, error) {
	t.Helper()
	config := defaultConfig()
	require.NoError(t, toml.Unmarshal([]byte(text), config))
	all, err := config.policies(stockWith(func(s *stockConfig) {
		s.Containerd.Runtimes["podfsm2"] = handler{Type: "io.containerd.runc.v2", Sandboxer: Name}
	}))
	if err != nil {
		return nil, nil, err
	}
	pool, err := config.openPool(all, t.TempDir())
	return all, pool, err
}

const nodeWide = `mode = "node"
node_wide_uid_mapping = { container_id = 0, host_id = 1000000, size = 65536 }
node_wide_gid_mapping = { container_id = 0, host_id = 2000000, size = 65536 }
`

func TestUserNSConfig(t *testing.T) {
	all, pool, err := parsedUserNS(t, "")
	require.NoError(t, err)
	require.Nil(t, pool)
	require.Equal(t, userns.ModeKubelet, all.of("podfsm").Mode)

	all, pool, err = parsedUserNS(t, "[userns.podfsm]\nunmappable = \"host\"\n[userns.podfsm2]\n"+nodeWide+"[userns_pool]\nranges = [{ host_id = 100000, size = 131072 }]")
	require.NoError(t, err)
	require.NotNil(t, pool)
	require.Equal(t, userns.Policy{Mode: userns.ModeKubelet, Unmappable: userns.UnmappableHost}, all.of("podfsm"))
	require.Equal(t, userns.Policy{Mode: userns.ModeNode, Unmappable: userns.UnmappableRefuse, NodeWide: &userns.Mappings{
		UIDs: userns.Mapping{HostID: 1000000, Length: 65536}, GIDs: userns.Mapping{HostID: 2000000, Length: 65536},
	}}, all.of("podfsm2"))

	_, _, err = parsedUserNS(t, "[userns.podfsm]\n"+nodeWide+"[userns.podfsm2]\n"+nodeWide)
	require.NoError(t, err, "handlers may share one")
	_, _, err = parsedUserNS(t, "[userns.podfsm]\n"+nodeWide+"[userns.podfsm2]\n"+strings.NewReplacer("1000000", "3000000", "2000000", "3000000").Replace(nodeWide))
	require.NoError(t, err, "or have them apart")

	for name, tc := range map[string]struct{ config, text string }{
		"an unknown handler":             {"[userns.nobodys]", `userns.nobodys: containerd has no runtime handler of that name with sandboxer = "podfsm"`},
		"another's handler":              {"[userns.runc]", "userns.runc"},
		"an unknown mode":                {"[userns.podfsm]\nmode = \"pod\"", `userns.podfsm: mode = "pod" is not one of ["kubelet" "auto" "node"]`},
		"an unknown answer":              {"[userns.podfsm]\nunmappable = \"run\"", `unmappable = "run" is not one of ["refuse" "host"]`},
		"a mapping in mode auto":         {"[userns.podfsm]\n" + nodeWide[len("mode = \"node\"\n"):] + "mode = \"auto\"", `a node-wide mapping is set, but mode is "auto"`},
		"mode node without":              {"[userns.podfsm]\nmode = \"node\"", "needs node_wide_uid_mapping and node_wide_gid_mapping"},
		"a negative id":                  {"[userns.podfsm]\nmode = \"node\"\nnode_wide_uid_mapping = { host_id = -1 }\nnode_wide_gid_mapping = {}", "node_wide_uid_mapping: host_id = -1 is not an id"},
		"more ids than there are":        {"[userns.podfsm]\nmode = \"node\"\nnode_wide_uid_mapping = {}\nnode_wide_gid_mapping = { size = 4294967296 }", "node_wide_gid_mapping: size = 4294967296 is not an id"},
		"not from 0":                     {"[userns.podfsm]\nmode = \"node\"\nnode_wide_uid_mapping = { container_id = 1, host_id = 100000, size = 1 }\nnode_wide_gid_mapping = { host_id = 100000, size = 1 }", "uid mapping starts at container id 1"},
		"an empty mapping":               {"[userns.podfsm]\nmode = \"node\"\nnode_wide_uid_mapping = {}\nnode_wide_gid_mapping = {}", "length 0"},
		"auto without a pool":            {"[userns.podfsm]\nmode = \"auto\"", `userns.podfsm: mode "auto" needs a pool; set userns_pool.ranges or userns_pool.user`},
		"two sources":                    {"[userns_pool]\nuser = \"x\"\nranges = [{ host_id = 100000, size = 131072 }]", "userns_pool: ranges and user are both set"},
		"no user of that name":           {"[userns_pool]\nuser = \"nobody-has-ids\"", `user "nobody-has-ids"`},
		"a negative range":               {"[userns_pool]\nranges = [{ host_id = -5, size = 131072 }]", "userns_pool: ranges: host_id = -5, size = 131072 is not a range"},
		"the node's ids":                 {"[userns_pool]\nranges = [{ host_id = 0, size = 131072 }]", "userns_pool: the pool's 131072 uids from 0 are"},
		"too low an id":                  {"userns_min_host_id = 999", "userns_min_host_id = 999 is not within 1000 to 4294967294"},
		"too high an id":                 {"userns_min_host_id = 4294967295", "userns_min_host_id = 4294967295 is not within"},
		"a node-wide mapping below":      {"userns_min_host_id = 1000001\n[userns.podfsm]\n" + nodeWide, "userns.podfsm: the uid mapping takes host ids 1000000 to 1065535: choose a range within 1000001"},
		"a pool below":                   {"userns_min_host_id = 100001\n[userns_pool]\nranges = [{ host_id = 100000, size = 131072 }]", "userns_pool: host ids below userns_min_host_id = 100001"},
		"too small":                      {"[userns_pool]\nranges = [{ host_id = 100000, size = 65535 }]", "userns_pool"},
		"overlapping node-wide mappings": {"[userns.podfsm]\n" + nodeWide + "[userns.podfsm2]\n" + strings.Replace(nodeWide, "1000000", "1065535", 1), "userns.podfsm2: node-wide mapping overlaps that of userns.podfsm; use the same mapping for both, or separate ids"},
		"pool and node-wide mapping":     {"[userns.podfsm]\n" + nodeWide + "[userns_pool]\nranges = [{ host_id = 2065535, size = 65536 }]", "userns.podfsm: node-wide mapping overlaps userns_pool"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := parsedUserNS(t, tc.config)
			require.ErrorContains(t, err, tc.text)
			require.True(t, errdefs.IsInvalidArgument(err) || errdefs.IsFailedPrecondition(err), "%v", err)
		})
	}
}
