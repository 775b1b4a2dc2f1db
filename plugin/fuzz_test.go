package plugin

import (
	"encoding/json"
	"testing"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/podfsm/podfsm/ledger"
)

// FuzzStockRecord has what containerd's store says of a sandbox: the metadata of its CRI service and the OCI spec. It may be of any
// version of containerd's, or damaged.
func FuzzStockRecord(f *testing.F) {
	f.Add([]byte(`{"Version":"v1","Metadata":{"ID":"s1","Config":{"metadata":{"name":"web"}},"RuntimeHandler":"podfsm"}}`), []byte(`{"linux":{"namespaces":[{"type":"network"}],"uidMappings":[{"hostID":1,"size":1}],"gidMappings":[{}]}}`))
	f.Add([]byte(`{"Metadata":null}`), []byte(`{"linux":null}`))
	f.Add([]byte(`null`), []byte(`null`))
	f.Add([]byte(`{"Metadata":{"Config":{"linux":{"security_context":{"namespace_options":{"userns_options":{"uids":[null]}}}}}}}`), []byte{})
	url, err := typeurl.TypeURL(&specs.Spec{})
	require.NoError(f, err)
	c := &Controller{stock: stockWith()}
	f.Fuzz(func(t *testing.T, metadata, spec []byte) {
		record := sandbox.Sandbox{ID: "s1", Extensions: map[string]typeurl.Any{metadataExtension: &anypb.Any{Value: metadata}}}
		if len(spec) > 0 {
			record.Spec = &anypb.Any{TypeUrl: url, Value: spec}
		}
		made := c.specOf(ledger.Key{Namespace: "k8s.io", ID: "s1"}, record)
		require.NotNil(t, made.Config.GetMetadata())
		_, err := ledger.Marshal(made)
		require.NoError(t, err)
		if labelled, err := withProcessLabel(metadata, "label"); err == nil {
			var kept sandboxMetadata
			if json.Unmarshal(labelled, &kept) == nil {
				require.Equal(t, "label", kept.Metadata.ProcessLabel)
			}
			again, err := withProcessLabel(labelled, "label")
			require.NoError(t, err)
			require.Equal(t, labelled, again)
		}
	})
}
