package cni

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/host"
)

func TestValidate(t *testing.T) {
	bin := t.TempDir()
	speaking := func(versions string) string {
		return "#!/bin/sh\necho '{\"cniVersion\": \"1.1.0\", \"supportedVersions\": [" + versions + "]}'"
	}
	for name, content := range map[string]string{
		"new":    speaking(`"0.4.0", "1.0.0"`),
		"old":    speaking(`"0.1.0"`),
		"broken": "#!/bin/sh\nexit 1",
	} {
		require.NoError(t, os.WriteFile(filepath.Join(bin, name), []byte(content), 0o755))
	}
	require.NoError(t, os.WriteFile(filepath.Join(bin, "data"), []byte("no program"), 0o644))

	for _, test := range []struct {
		plugins string
		says    []string // what is wrong, in its parts; none when nothing is
	}{
		{plugins: `{"type": "new"}`},
		{plugins: `{"type": "new", "ipam": {"type": "new"}}`},
		{plugins: `{"type": "new"}, {"type": "old"}`, says: []string{`plugin "old"`, "speaks CNI 0.1.0, not 1.0.0"}},
		{plugins: `{"type": "missing"}, {"type": "new", "ipam": {"type": "gone"}}`, says: []string{`plugin "missing"`, `plugin "gone"`, "failed to find"}},
		{plugins: `{"type": "data"}`, says: []string{`plugin "data"`, "permission denied"}},
		{plugins: `{"type": "broken"}`, says: []string{`plugin "broken"`, "can't be asked for its versions"}},
	} {
		t.Run(test.plugins, func(t *testing.T) {
			network := Network{Name: "net", Conflist: []byte(`{"cniVersion": "1.0.0", "name": "net", "plugins": [` + test.plugins + `]}`)}
			err := Validate(t.Context(), testGroups(t), Config{BinDirs: []string{bin}}, network)
			alone := Validate(t.Context(), host.Groups{}, Config{BinDirs: []string{bin}}, network)
			require.Equal(t, fmt.Sprint(err), fmt.Sprint(alone), "without a daemon's groups")
			own, groupsErr := host.GroupsBelow("podfsm-validate")
			require.NoError(t, groupsErr)
			left, globErr := filepath.Glob(own.Dir() + fmt.Sprintf("-%d-*", os.Getpid()))
			require.NoError(t, globErr)
			require.Empty(t, left)
			if test.says == nil {
				require.NoError(t, err)
				return
			}
			require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
			for _, says := range test.says {
				require.ErrorContains(t, err, says)
			}
		})
	}
}
