package plugin

import (
	"encoding/json"
	"testing"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/userns"
)

// private are the mappings that podConfig asks for.
var private = userns.Mappings{UIDs: userns.Mapping{HostID: 131072, Length: 65536}, GIDs: userns.Mapping{HostID: 131072, Length: 65536}}

func onHostUsers(config *runtime.PodSandboxConfig) {
	options(config).UsernsOptions = &runtime.UserNamespace{Mode: runtime.NamespaceMode_NODE}
}

// A request's ids may be as low as the configuration says, and no lower.
func TestSpecOfLowestHostID(t *testing.T) {
	c := &Controller{stock: stockWith(), lowest: 2000}
	at := func(id uint32) func(*runtime.PodSandboxConfig) {
		return mappings(func(u *runtime.UserNamespace) { u.Uids[0].HostId, u.Gids[0].HostId = id, id })
	}
	_, err := c.specFor("podfsm", podConfig(at(1999)), sandbox.Sandbox{}, "")
	require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
	require.ErrorContains(t, err, `invalid user namespace of pod "default/web": the uid mapping takes host ids 1999 to 67534: choose a range within 2000 to`)
	spec, err := c.specFor("podfsm", podConfig(at(2000)), sandbox.Sandbox{}, "")
	require.NoError(t, err)
	require.EqualValues(t, 2000, spec.Mapping.UIDs.HostID)
}

func TestMappingsOfRecord(t *testing.T) {
	pack := func(v any) typeurl.Any {
		packed, err := typeurl.MarshalAny(v)
		require.NoError(t, err)
		return packed
	}
	request := func(change ...func(*runtime.PodSandboxConfig)) sandbox.Sandbox {
		text, err := json.Marshal(map[string]any{"Metadata": map[string]any{"Config": podConfig(change...)}})
		require.NoError(t, err)
		return sandbox.Sandbox{ID: "s1", Extensions: map[string]typeurl.Any{"metadata": &ledger.Data{TypeURL: "x", Value: text}}}
	}
	started := func(uids, gids []specs.LinuxIDMapping) sandbox.Sandbox {
		record := request()
		record.Spec = pack(&specs.Spec{Linux: &specs.Linux{UIDMappings: uids, GIDMappings: gids}})
		return record
	}
	auto := userns.Mappings{UIDs: userns.Mapping{HostID: 1 << 30, Length: 65536}, GIDs: userns.Mapping{HostID: 1 << 29, Length: 65536}}
	uids, gids := auto.Linux()
	for name, tc := range map[string]struct {
		record sandbox.Sandbox
		want   *userns.Mappings
		fails  bool
	}{
		"not started":                {record: request(), want: &private},
		"not started, on host users": {record: request(onHostUsers)},
		"nothing in it":              {record: sandbox.Sandbox{ID: "s1"}},
		"started":                    {record: started(uids, gids), want: &auto}, // what it runs with counts, not what it asked for
		"started, on host users":     {record: started(nil, nil)},
		"started, many extents":      {record: started(append(uids, uids...), gids), fails: true},
		"started, an invalid spec":   {record: sandbox.Sandbox{ID: "s1", Spec: &ledger.Data{TypeURL: "types.containerd.io/nothing", Value: []byte("{")}}, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := mappingsOfRecord(tc.record)
			require.Equal(t, tc.fails, err != nil, "%v", err)
			require.Equal(t, tc.want, got)
		})
	}
}

// A retry comes while the sandbox of the first request is being made, or is there.
func TestRetriesShareTheIDs(t *testing.T) {
	for name, uid := range map[string]string{"a pod with a uid": "u-7", "a pod without": ""} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			with := func(c *runtime.PodSandboxConfig) { c.Metadata.Uid = uid }
			w.run(t, "s1", with)
			require.NoError(t, w.admitIDs(t.Context(), &Spec{Config: podConfig(with), Mapping: &private}))
			other := podConfig(named("other"), func(c *runtime.PodSandboxConfig) { c.Metadata.Uid = "" })
			err := w.admitIDs(t.Context(), &Spec{Config: other, Mapping: &private})
			require.ErrorContains(t, err, `which pod "default/web" (sandbox "k8s.io/s1") holds`)
		})
	}
}

func TestStockPodsHoldTheirIDs(t *testing.T) {
	w := newWorld(t)
	taken := func() error {
		return w.admitIDs(t.Context(), &Spec{Config: podConfig(named("other"), func(c *runtime.PodSandboxConfig) { c.Metadata.Uid = "u-2" }), Mapping: &private})
	}
	require.NoError(t, taken())
	ended := w.StockRuns(podConfig())
	require.True(t, errdefs.IsInvalidArgument(taken()), "while it starts")
	ended("")
	require.NoError(t, taken(), "it has failed")

	ended = w.StockRuns(podConfig())
	ended("s1")
	overview, err := w.node.ids.Overview(t.Context())
	require.NoError(t, err)
	require.Len(t, overview.Holders, 1)
	require.Equal(t, "k8s.io/s1", overview.Holders[0].ID)
	require.Equal(t, userns.OriginStock, overview.Holders[0].Origin)
	w.StockRemoved("s1")
	require.NoError(t, taken())

	for name, config := range map[string]*runtime.PodSandboxConfig{
		"none":          nil,
		"on host users": podConfig(onHostUsers),
		"bad":           podConfig(mappings(func(u *runtime.UserNamespace) { u.Uids = nil })),
	} {
		w.StockRuns(config)("s2")
		require.NoError(t, taken(), name)
	}
}

func TestRestoredHolders(t *testing.T) {
	w := newWorld(t)
	w.run(t, "ready")
	require.NoError(t, w.create(t, "new", named("new"), func(c *runtime.PodSandboxConfig) { c.Metadata.Uid = "u-2" }))
	view := w.view(t, "ready")
	require.True(t, mayHold(view, false))
	require.False(t, mayHold(w.view(t, "new"), false), "nothing has been made")
	require.True(t, mayHold(w.view(t, "new"), true), "its records are unknown")
	require.True(t, mayHold(lifecycle.View{Steps: []lifecycle.StepView{{Name: AllocateIDs, Status: lifecycle.StepPending}, {Name: "reserve_ids", Unknown: true}}}, false),
		"another release has made something")
	require.NoError(t, w.Shutdown(inCRI(t), "ready"))
	require.False(t, mayHold(lifecycle.View{Steps: []lifecycle.StepView{{Name: AllocateIDs, Status: lifecycle.StepUndone}}}, true))

	other := sandbox.Sandbox{ID: "stock"}
	packed, err := typeurl.MarshalAny(&specs.Spec{Linux: &specs.Linux{
		UIDMappings: []specs.LinuxIDMapping{{HostID: 1 << 20, Size: 65536}}, GIDMappings: []specs.LinuxIDMapping{{HostID: 1 << 20, Size: 65536}},
	}})
	require.NoError(t, err)
	other.Spec = packed
	w.restoreIDs(t.Context(), map[ledger.Key]lifecycle.Action{{Namespace: "k8s.io", ID: "new"}: {AssumeActed: true}}, map[ledger.Key]sandbox.Sandbox{{Namespace: "k8s.io", ID: "stock"}: other})
	overview, err := w.node.ids.Overview(t.Context())
	require.NoError(t, err)
	var holders []string
	for _, h := range overview.Holders {
		holders = append(holders, h.ID+" "+string(h.Origin)+" "+h.Mappings.UIDs.String())
	}
	require.Equal(t, []string{"k8s.io/new request 0:131072:65536", "k8s.io/stock stock 0:1048576:65536"}, holders)
}
