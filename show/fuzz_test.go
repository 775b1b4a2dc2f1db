package show

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/cni"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/lifecycle"
	"github.com/podfsm/podfsm/userns"
)

// FuzzRecords replays any specification and any step result, of every recorded type. The sandbox can
// always be shown.
func FuzzRecords(f *testing.F) {
	types := []any{&records.Spec{}, &userns.Mappings{}, &records.Snapshot{}, &records.Cgroup{}, &records.Pause{}, &records.NetNS{}, &records.Network{}, &records.Ready{}, &cni.Attachment{}, &cni.Progress{}, &lifecycle.Skipped{}, &lifecycle.Exit{}}
	f.Add([]byte(`{"Config":{"metadata":{"name":"web","namespace":"default"}},"Handler":"podfsm"}`), 0, []byte(`{"IP":"10.0.0.2","Result":{"Interfaces":{"eth0":null}}}`), 4, 5)
	f.Add([]byte(`null`), 0, []byte(`{"Plugins":[{}]}`), 4, 5)
	f.Add([]byte(`{"Config":null,"Mapping":{}}`), 0, []byte(`null`), 0, 1)
	f.Add([]byte(`[]`), 3, []byte(`{"UIDs":{"HostID":-1}}`), 9, 9)
	f.Fuzz(func(t *testing.T, spec []byte, specType int, result []byte, step, resultType int) {
		data := func(kind int, value []byte) *ledger.Data {
			url, err := typeurl.TypeURL(types[uint(kind)%uint(len(types))])
			require.NoError(t, err)
			return &ledger.Data{TypeURL: url, Value: value}
		}
		path := records.Table().Steps()
		name := string(path[uint(step)%uint(len(path))])
		key := ledger.Key{Namespace: "k8s.io", ID: "s1"}
		views, err := records.Replay([]ledger.Sandbox{{Key: key, Records: []ledger.Record{
			{Seq: 1, Key: key, Kind: ledger.Begun, Data: data(specType, spec), At: time.Unix(1, 0)},
			{Seq: 2, Key: key, Kind: ledger.Intent, Step: name, Data: data(resultType, result), At: time.Unix(1, 0)},
			{Seq: 3, Key: key, Kind: ledger.Done, Step: name, Data: data(resultType, result), At: time.Unix(1, 0)},
		}}})
		require.NoError(t, err)
		require.Len(t, List(views).GetSandboxes(), 1)
		shown, err := Inspection(views[0])
		require.NoError(t, err)
		if text := shown.GetCniResult(); text != "" {
			require.True(t, json.Valid([]byte(text)))
		}
	})
}

// FuzzFind looks up any text. It finds a sandbox that the text matches, or fails with NotFound or
// InvalidArgument.
func FuzzFind(f *testing.F) {
	views := []lifecycle.View{
		{Key: ledger.Key{Namespace: "k8s.io", ID: "abc1"}, Pod: "default/web", Spec: &records.Spec{}},
		{Key: ledger.Key{Namespace: "k8s.io", ID: "abc2"}, Pod: "default/abc1", Spec: &records.Spec{}},
		{Key: ledger.Key{Namespace: "k8s.io", ID: "d"}, Pod: "other/web", Spec: &records.Spec{}},
	}
	for _, ref := range []string{"", "abc1", "abc", "web", "default/web", "/", "/web", "d", "\xff", "*"} {
		f.Add(ref)
	}
	f.Fuzz(func(t *testing.T, ref string) {
		view, err := Find(ref, views)
		switch {
		case err == nil:
			require.Contains(t, view.Key.ID+" "+view.Pod, ref)
		default:
			require.True(t, errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err), "%v", err)
		}
	})
}
