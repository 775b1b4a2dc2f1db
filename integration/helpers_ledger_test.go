package integration

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
)

// pluginDir is the name of podfsm's directories, below containerd's root and state directories.
const pluginDir = "io.containerd.podsandbox.controller.v1.podfsm"

// The two logs of the ledger, below a node's directory.
const (
	durableLog = "root/" + pluginDir + "/ledger.log"
	ledgerLog  = "state/" + pluginDir + "/ledger.log"
)

// damages are the kinds of damage in a file of the ledger at the start of the daemon.
var damages = []struct {
	name  string
	do    func(t *testing.T, file string)
	total bool // nothing of the file is readable
	soon  bool // make test runs this damage, too
}{
	{name: "with a torn end", do: func(t *testing.T, file string) { rewrite(t, file, func(b []byte) []byte { return b[:len(b)-7] }) }},
	{name: "truncated", do: func(t *testing.T, file string) { rewrite(t, file, func(b []byte) []byte { return b[:len(b)/2] }) }, soon: true},
	{name: "empty", do: func(t *testing.T, file string) { rewrite(t, file, func(b []byte) []byte { return nil }) }, total: true},
	{name: "with bits flipped", do: func(t *testing.T, file string) { rewrite(t, file, flipped) }},
	{name: "of a newer version", do: func(t *testing.T, file string) { rewrite(t, file, newer) }, total: true},
	{name: "missing", do: func(t *testing.T, file string) { require.NoError(t, os.Remove(file)) }, total: true, soon: true},
}

func rewrite(t *testing.T, file string, change func([]byte) []byte) {
	t.Helper()
	content, err := os.ReadFile(file)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(file, change(content), 0o600))
}

// flipped inverts every hundredth byte of the middle third.
func flipped(b []byte) []byte {
	for i := len(b) / 3; i < 2*len(b)/3; i += 100 {
		b[i] ^= 0x10
	}
	return b
}

// newer changes each frame that has a version (magic, length and CRC32C of a JSON object) to a
// later version.
func newer(b []byte) []byte {
	old, next := []byte(`{"header":{"format":1,`), []byte(`{"header":{"format":9,`)
	for at := bytes.Index(b, old); at >= 0; at = bytes.Index(b, old) {
		copy(b[at:], next)
		seal(b, at)
	}
	return b
}

// seal corrects the checksum of the frame whose JSON is at this offset.
func seal(b []byte, at int) {
	length := binary.LittleEndian.Uint32(b[at-8:])
	sum := crc32.Checksum(b[at:at+int(length)], crc32.MakeTable(crc32.Castagnoli))
	binary.LittleEndian.PutUint32(b[at-4:], sum)
}

// removeKept removes the damaged files that podfsm keeps for the operator.
func removeKept(t *testing.T, n *harness.Node) {
	t.Helper()
	for _, file := range []string{ledgerLog, durableLog} {
		kept, err := filepath.Glob(filepath.Join(n.Dir(), file+".damaged-*"))
		require.NoError(t, err)
		for _, k := range kept {
			require.NoError(t, os.Remove(k))
		}
	}
}

func ledgerDirs(n *harness.Node) []string {
	dirs, _ := filepath.Glob(filepath.Join(n.Dir(), "*", "io.containerd.podsandbox.controller.v1.podfsm")) // a pattern that is well-formed
	return dirs
}
