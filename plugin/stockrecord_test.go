package plugin

import (
	"testing"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/anypb"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/cri"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/lifecycle"
)

func recordWith(extensions map[string]string) sandbox.Sandbox {
	record := sandbox.Sandbox{
		ID: "s1", Sandboxer: Name, Runtime: sandbox.RuntimeOpts{Name: "io.containerd.runc.v2"},
		Extensions: map[string]typeurl.Any{},
	}
	for name, text := range extensions {
		record.Extensions[name] = &anypb.Any{TypeUrl: "stock/" + name, Value: []byte(text)}
	}
	return record
}

func labelled(label string) lifecycle.View {
	return lifecycle.View{
		Key: ledger.Key{Namespace: cri.Namespace, ID: "s1"}, Spec: &Spec{Config: podConfig()},
		Steps: []lifecycle.StepView{{Name: StartPause, Result: &Pause{ProcessLabel: label}}},
	}
}

func TestKeepProcessLabel(t *testing.T) {
	const label = "system_u:system_r:container_t:s0:c1,c2"
	for name, tc := range map[string]struct {
		label, before, after string
		fails                bool
	}{
		"kept": {
			label:  label,
			before: `{"Version":"v1","Metadata":{"Config":{"linux":{"resources":{"memory_limit_in_bytes":9007199254740993}}},"ID":"s1","Later":1,"ProcessLabel":""},"More":2}`,
			after:  `{"Metadata":{"Config":{"linux":{"resources":{"memory_limit_in_bytes":9007199254740993}}},"ID":"s1","Later":1,"ProcessLabel":"` + label + `"},"More":2,"Version":"v1"}`,
		},
		"there already":      {label: label, before: `{"Metadata":{ "ProcessLabel":"` + label + `"}}`, after: `{"Metadata":{ "ProcessLabel":"` + label + `"}}`},
		"without SELinux":    {before: `{"Metadata":{ "ProcessLabel":""}}`, after: `{"Metadata":{ "ProcessLabel":""}}`},
		"can't be read":      {label: label, before: `[]`, after: `[]`, fails: true},
		"has no metadata":    {label: label, before: `{}`, after: `{}`, fails: true},
		"metadata is null":   {label: label, before: `{"Metadata":null}`, after: `{"Metadata":null}`, fails: true},
		"metadata is a list": {label: label, before: `{"Metadata":[]}`, after: `{"Metadata":[]}`, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			client, ctx := newStores(t), inCRI(t)
			record, err := client.SandboxStore().Create(ctx, recordWith(map[string]string{"metadata": tc.before, "other": "{}"}))
			require.NoError(t, err)

			err = keepProcessLabel(ctx, client, record, labelled(tc.label))
			require.Equal(t, tc.fails, err != nil, "%v", err)

			got, err := client.SandboxStore().Get(ctx, "s1")
			require.NoError(t, err)
			require.Equal(t, tc.after, string(got.Extensions["metadata"].GetValue()))
			require.Equal(t, "stock/metadata", got.Extensions["metadata"].GetTypeUrl())
			require.Contains(t, got.Extensions, "other")
		})
	}
	require.NoError(t, keepProcessLabel(inCRI(t), nil, recordWith(nil), labelled(label)), "a record that isn't the CRI's")
}

func TestUpdatedResources(t *testing.T) {
	client, ctx := newStores(t), inCRI(t)
	check := func(wantOverhead, wantResources *runtime.ContainerResources) {
		t.Helper()
		overhead, resources, err := updatedResources(ctx, client, "s1")
		require.NoError(t, err)
		require.Equal(t, wantOverhead, overhead)
		require.Equal(t, wantResources, resources)
	}
	check(nil, nil) // containerd has no record
	record, err := client.SandboxStore().Create(ctx, recordWith(map[string]string{"metadata": "{}"}))
	require.NoError(t, err)
	check(nil, nil) // never updated

	for text, want := range map[string]*runtime.ContainerResources{
		`{"Overhead":null,"Resources":{"cpu_shares":512}}`: {Linux: &runtime.LinuxContainerResources{CpuShares: 512}},
		`{"Overhead":null,"Resources":null}`:               nil,
	} {
		record.Extensions["updated-resources"] = &anypb.Any{TypeUrl: "stock", Value: []byte(text)}
		_, err = client.SandboxStore().Update(ctx, record, "extensions")
		require.NoError(t, err)
		check(nil, want)
	}
	record.Extensions["updated-resources"] = &anypb.Any{TypeUrl: "stock", Value: []byte("[]")}
	_, err = client.SandboxStore().Update(ctx, record, "extensions")
	require.NoError(t, err)
	_, _, err = updatedResources(ctx, client, "s1")
	require.Error(t, err)
}
