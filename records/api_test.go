package records

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/lifecycle"
)

func TestDetail(t *testing.T) {
	require.Nil(t, detail(nil))
	require.Equal(t, map[string]string{"skipped": "why"}, detail(&lifecycle.Skipped{Reason: "why"}))
	require.Equal(t, "7", detail(&Pause{Pid: 7})["pid"])
	require.Contains(t, fmt.Sprint(detail(&Network{IP: "10.0.0.2", AdditionalIPs: []string{"fd00::2", "10.1.0.2"}})), "fd00::2,10.1.0.2")
	require.Equal(t, "", Text(nil))
}
