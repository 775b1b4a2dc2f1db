package userns

import (
	"math"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// extents are uids or gids as CRI writes them, one extent.
func extents(container, host, length uint32) []*runtime.IDMapping {
	return []*runtime.IDMapping{{ContainerId: container, HostId: host, Length: length}}
}

func podMode(uids, gids []*runtime.IDMapping) *runtime.UserNamespace {
	return &runtime.UserNamespace{Mode: runtime.NamespaceMode_POD, Uids: uids, Gids: gids}
}

func TestFromCRINodeUserNamespace(t *testing.T) {
	for name, opts := range map[string]*runtime.UserNamespace{
		"no options":             nil,
		"mode NODE":              {Mode: runtime.NamespaceMode_NODE},
		"mode NODE, empty lists": {Mode: runtime.NamespaceMode_NODE, Uids: []*runtime.IDMapping{}, Gids: []*runtime.IDMapping{}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := FromCRI(opts)
			require.NoError(t, err)
			require.Nil(t, got)
		})
	}
}

func TestFromCRIPodUserNamespace(t *testing.T) {
	for name, want := range map[string]Mappings{
		"the kubelet's 64Ki":       {UIDs: Mapping{0, 131072, 65536}, GIDs: Mapping{0, 131072, 65536}},
		"uids apart from gids":     {UIDs: Mapping{0, 131072, 65536}, GIDs: Mapping{0, 262144, 65536}},
		"a single id":              {UIDs: Mapping{0, 70000, 1}, GIDs: Mapping{0, 70000, 1}},
		"from the node's root":     {UIDs: Mapping{0, 0, 65536}, GIDs: Mapping{0, 0, 65536}}, // which containerd's own pods may have
		"to the last allowed id":   {UIDs: Mapping{0, 4294901760, 65535}, GIDs: Mapping{0, 4294901760, 65535}},
		"only the last allowed id": {UIDs: Mapping{0, 4294967294, 1}, GIDs: Mapping{0, 4294967294, 1}},
		"all ids":                  {UIDs: Mapping{0, 0, math.MaxUint32}, GIDs: Mapping{0, 0, math.MaxUint32}},
		"more than 64Ki":           {UIDs: Mapping{0, 1 << 20, 1 << 18}, GIDs: Mapping{0, 1 << 20, 1 << 18}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := FromCRI(podMode(
				extents(want.UIDs.ContainerID, want.UIDs.HostID, want.UIDs.Length),
				extents(want.GIDs.ContainerID, want.GIDs.HostID, want.GIDs.Length)))
			require.NoError(t, err)
			require.Equal(t, &want, got)
		})
	}
}

func TestFromCRIRefuses(t *testing.T) {
	good := extents(0, 131072, 65536)
	for name, tc := range map[string]struct {
		opts *runtime.UserNamespace
		text string
	}{
		"mode CONTAINER": {
			opts: &runtime.UserNamespace{Mode: runtime.NamespaceMode_CONTAINER},
			text: "mode CONTAINER is not supported: ask for POD or NODE",
		},
		"mode TARGET with mappings": {
			opts: &runtime.UserNamespace{Mode: runtime.NamespaceMode_TARGET, Uids: good, Gids: good},
			text: "mode TARGET is not supported",
		},
		"unknown mode": {
			opts: &runtime.UserNamespace{Mode: 42},
			text: "mode 42 is not supported",
		},
		"mode NODE with uids": {
			opts: &runtime.UserNamespace{Mode: runtime.NamespaceMode_NODE, Uids: good},
			text: "mode NODE came with 1 uid and 0 gid mappings: leave them out",
		},
		"mode NODE with gids": {
			opts: &runtime.UserNamespace{Mode: runtime.NamespaceMode_NODE, Gids: good},
			text: "mode NODE came with 0 uid and 1 gid mappings",
		},
		"no mappings":            {opts: podMode(nil, nil), text: "came with 0 uid mappings: give exactly one"},
		"no gids":                {opts: podMode(good, nil), text: "came with 0 gid mappings"},
		"no uids":                {opts: podMode(nil, good), text: "came with 0 uid mappings"},
		"two uid extents":        {opts: podMode(append(extents(0, 65536, 1), good...), good), text: "came with 2 uid mappings"},
		"two gid extents":        {opts: podMode(good, append(extents(0, 65536, 1), good...)), text: "came with 2 gid mappings"},
		"a nil extent":           {opts: podMode([]*runtime.IDMapping{nil}, good), text: "uid mapping has length 0"},
		"an empty extent":        {opts: podMode([]*runtime.IDMapping{{}}, good), text: "uid mapping has length 0"},
		"length 0":               {opts: podMode(good, extents(0, 131072, 0)), text: "gid mapping has length 0: map at least one id"},
		"uids not from 0":        {opts: podMode(extents(1, 131072, 65536), good), text: "uid mapping starts at container id 1: let it start at 0"},
		"gids not from 0":        {opts: podMode(good, extents(1000, 131072, 65536)), text: "gid mapping starts at container id 1000"},
		"lengths differ":         {opts: podMode(good, extents(0, 131072, 65535)), text: "uid mapping is 65536 ids long and the gid mapping 65535"},
		"kubernetes #139916":     {opts: podMode(extents(0, 4294901760, 65536), extents(0, 4294901760, 65536)), text: "uid mapping takes host ids 4294901760 to 4294967295: choose a range up to 4294967294"},
		"only the no-id value":   {opts: podMode(good, extents(0, 4294967295, 1)), text: "gid mapping takes host ids 4294967295 to 4294967295"},
		"wraps around":           {opts: podMode(extents(0, 4294901760, 131072), good), text: "takes host ids 4294901760 to 4295032831"},
		"wraps to a valid range": {opts: podMode(extents(0, 4294967295, math.MaxUint32), good), text: "takes host ids 4294967295 to 8589934589"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := FromCRI(tc.opts)
			require.Nil(t, got)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tc.text)
		})
	}
}

func TestCheckLowest(t *testing.T) {
	at := func(uid, gid uint32) Mappings {
		return Mappings{UIDs: Mapping{0, uid, 65536}, GIDs: Mapping{0, gid, 65536}}
	}
	for name, tc := range map[string]struct {
		m      Mappings
		lowest uint32
		text   string // "" where it passes
	}{
		"the lowest":          {at(1000, 1000), MinHostID, ""},
		"far above":           {at(131072, 196608), MinHostID, ""},
		"the node's root":     {at(0, 0), MinHostID, "the uid mapping takes host ids 0 to 65535: choose a range within 1000 to 4294967294"},
		"a uid of the node's": {at(999, 1000), MinHostID, "the uid mapping takes host ids 999 to 66534: choose a range within 1000 to 4294967294"},
		"a gid of the node's": {at(1000, 999), MinHostID, "the gid mapping takes host ids 999 to 66534: choose a range within 1000 to 4294967294"},
		"the id of tries":     {at(TryHostID, TryHostID), MinHostID, "the uid mapping takes host ids 999 to 66534"},
		"the lowest, raised":  {at(65536, 65536), 65536, ""},
		"below it, raised":    {at(65535, 65536), 65536, "the uid mapping takes host ids 65535 to 131070: choose a range within 65536 to 4294967294"},
	} {
		t.Run(name, func(t *testing.T) {
			err := tc.m.CheckLowest(tc.lowest)
			if tc.text == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tc.text)
		})
	}
}

func TestMappingsLinux(t *testing.T) {
	uids, gids := Mappings{UIDs: Mapping{0, 131072, 65536}, GIDs: Mapping{0, 262144, 65536}}.Linux()
	require.Equal(t, []specs.LinuxIDMapping{{ContainerID: 0, HostID: 131072, Size: 65536}}, uids)
	require.Equal(t, []specs.LinuxIDMapping{{ContainerID: 0, HostID: 262144, Size: 65536}}, gids)
}
