package ledger

import (
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

type handles struct{ NetNS string }

type unregistered struct{}

func init() { typeurl.Register(&handles{}, "podfsm.test/handles") }

func TestMarshal(t *testing.T) {
	data, err := Marshal(&handles{NetNS: "/run/netns/a"})
	require.NoError(t, err)
	require.Equal(t, "podfsm.test/handles", data.TypeURL)
	var into handles
	require.NoError(t, (&Record{Data: data}).Unmarshal(&into))
	require.Equal(t, "/run/netns/a", into.NetNS)

	data, err = Marshal(wrapperspb.String("proto"))
	require.NoError(t, err)
	var s wrapperspb.StringValue
	require.NoError(t, (&Record{Data: data}).Unmarshal(&s))
	require.Equal(t, "proto", s.Value)

	again, err := Marshal(data)
	require.NoError(t, err)
	require.Equal(t, data, again, "what is encoded already is taken as it is")

	for name, v := range map[string]any{
		"nil": nil, "a value": handles{}, "a nil pointer": (*handles)(nil), "an unregistered type": &unregistered{},
	} {
		_, err := Marshal(v)
		require.True(t, errdefs.IsInvalidArgument(err), "%s: %v", name, err)
	}
}

func TestUnmarshalErrors(t *testing.T) {
	good, err := Marshal(&handles{})
	require.NoError(t, err)
	for name, tc := range map[string]struct {
		data *Data
		into any
		want func(error) bool
	}{
		"no data":        {into: &handles{}, want: errdefs.IsNotFound},
		"unknown type":   {data: &Data{TypeURL: "of/a/newer/version"}, into: &handles{}, want: errdefs.IsNotFound},
		"another type":   {data: good, into: &wrapperspb.StringValue{}, want: errdefs.IsDataLoss},
		"broken data":    {data: &Data{TypeURL: good.TypeURL, Value: []byte("{")}, into: &handles{}, want: errdefs.IsDataLoss},
		"not a pointer":  {data: good, into: handles{}, want: errdefs.IsInvalidArgument},
		"nowhere to put": {data: good, into: nil, want: errdefs.IsInvalidArgument},
	} {
		err := (&Record{Data: tc.data}).Unmarshal(tc.into)
		require.True(t, tc.want(err), "%s: %v", name, err)
	}
}
