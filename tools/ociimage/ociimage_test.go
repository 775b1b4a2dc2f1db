package ociimage

import (
	"archive/tar"
	"bytes"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A layer is a whole archive, which ends with two blocks of zeros: tar(1) refuses one without them.
func TestLayerIsWhole(t *testing.T) {
	files := []File{{Name: "dir/", Mode: 0o755}, {Name: "dir/file", Mode: 0o640, Body: []byte("text"), Owner: 7, Time: time.Unix(1000, 0)}}
	layer, err := Layer(files)
	require.NoError(t, err)
	stream, err := layer.Uncompressed()
	require.NoError(t, err)
	content, err := io.ReadAll(stream)
	require.NoError(t, err)
	require.Len(t, content, 512*(len(files)+1+2))
	require.True(t, bytes.HasSuffix(content, make([]byte, 1024)))

	archive := tar.NewReader(bytes.NewReader(content))
	_, err = archive.Next()
	require.NoError(t, err)
	header, err := archive.Next()
	require.NoError(t, err)
	require.Equal(t, "dir/file", header.Name)
	require.Equal(t, int64(0o640), header.Mode)
	require.Equal(t, []int{7, 7}, []int{header.Uid, header.Gid})
	require.Equal(t, int64(1000), header.ModTime.Unix())
	body, err := io.ReadAll(archive)
	require.NoError(t, err)
	require.Equal(t, "text", string(body))
}
