package main

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestPictureIsUpToDate(t *testing.T) {
	timeline, err := os.ReadFile("../../cmd/podfsm/testdata/timeline-crashed-80.txt")
	require.NoError(t, err)
	want := draw(string(timeline))
	got, err := os.ReadFile("../../docs/timeline.svg")
	require.NoError(t, err)
	require.Equal(t, want, string(got), "docs/timeline.svg is stale: run go generate ./docs")
}

// Bars and texts are drawn at their positions in the text, and markup in the output of a plugin is
// escaped.
func TestDraw(t *testing.T) {
	picture := draw("Failed:   a <step> & more\n\nCreation, from 2026-03-01T11:59:00.000Z, 2ms\n" +
		"a_step      +0s   1ms [==  ]\n  é/b ADD   +1ms  1ms [  xx]\n\n= done   x failed\n\nErrors\nnot drawn\n")
	for _, part := range []string{
		`>Failed:   a &lt;step&gt; &amp; more</text>`,
		`<rect x="201.6" y="73.0" width="16.8" height="11" rx="2" fill="#3fb950"/>`,
		`<rect x="218.4" y="92.0" width="16.8" height="11" rx="2" fill="#f85149"/>`,
		`>a_step      +0s   1ms</text>`,
	} {
		require.Contains(t, picture, part)
	}
	require.NotContains(t, picture, "drawn")
	for decoder := xml.NewDecoder(strings.NewReader(picture)); ; {
		if _, err := decoder.Token(); errors.Is(err, io.EOF) {
			break
		} else {
			require.NoError(t, err)
		}
	}
}
