package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Commands of podfsm within the text of the pages and of the package exist, with their flags.
// TestCommandsInTheDocs runs the commands in code blocks.
func TestFlagsInTheDocs(t *testing.T) {
	t.Parallel()
	inText, inScript := regexp.MustCompile("`podfsm ([a-z]+)([^`\n]*)"), regexp.MustCompile(`(?m)(?:\) |^)podfsm ([a-z]+)(.*)`)
	flag := regexp.MustCompile(`(?:^|[ \[])(--?[a-z][a-z-]*)`)
	count := 0
	for pattern, command := range map[string]*regexp.Regexp{
		"../../README.md": inText, "../../docs/*.md": inText, "../../docs/*/*.md": inText, "../../deploy/*.yaml": inText, "../../deploy/package/*": inScript,
	} {
		files, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, file := range files {
			text, err := os.ReadFile(file)
			require.NoError(t, err)
			for _, m := range command.FindAllStringSubmatch(string(text), -1) {
				command := []string{m[1]}
				if below := regexp.MustCompile(`^ (list|retry|write-off)\b`).FindStringSubmatch(m[2]); below != nil {
					command = append(command, below[1])
				}
				help, err := podfsm(t, append(command, "--help")...)
				require.NoError(t, err)
				for _, named := range flag.FindAllStringSubmatch(m[2], -1) {
					count++
					require.Regexp(t, `(?m)^ +(?:--\S+ .*, |--\S+, )?`+named[1]+`\b`, help, "%s: %s", file, strings.TrimSpace(m[0]))
				}
			}
		}
	}
	require.Greater(t, count, 10)
}
