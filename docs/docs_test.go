// Package docs has the tests of the pages beside it.
package docs

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// pages are README.md and all pages of this directory, by their paths.
func pages(t *testing.T) map[string]string {
	files, err := filepath.Glob("*.md")
	require.NoError(t, err)
	all := map[string]string{}
	for _, file := range append(files, "../README.md") {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		all[file] = string(text)
	}
	return all
}

// code are the tests, fuzz targets and benchmarks that there are, with the files they are in.
func code(t *testing.T) map[string]string {
	declared := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)[A-Z]\w*)\(`)
	found := map[string]string{}
	require.NoError(t, filepath.WalkDir("..", func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() && strings.HasPrefix(entry.Name(), ".") && entry.Name() != ".." {
			return fs.SkipDir
		}
		if entry.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		text, err := os.ReadFile(path)
		for _, m := range declared.FindAllStringSubmatch(string(text), -1) {
			found[m[1]] = path
		}
		return err
	}))
	return found
}

var named = regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark)[A-Z]\w*\b(\*)?`)

// What the pages name as seen in a test was seen in one that there is.
func TestNamedTestsExist(t *testing.T) {
	there := code(t)
	require.NotEmpty(t, there["TestNamedTestsExist"])
	count := 0
	for page, text := range pages(t) {
		for _, name := range named.FindAllString(text, -1) {
			count++
			if group, ok := strings.CutSuffix(name, "*"); ok {
				found := false
				for one := range there {
					found = found || strings.HasPrefix(one, group)
				}
				require.True(t, found, "%s names %s, and no test begins so", page, name)
				continue
			}
			require.NotEmpty(t, there[name], "%s names %s, which isn't there", page, name)
		}
	}
	require.Greater(t, count, 50)
}

// Every input of others that is parsed stands in the table of security.md with the fuzz target that there is for it.
func TestEachFuzzTargetIsInTheTable(t *testing.T) {
	text := pages(t)["security.md"]
	for name := range code(t) {
		if strings.HasPrefix(name, "Fuzz") {
			require.True(t, strings.Contains(text, "`"+name+"`"), "security.md has no row of %s", name)
		}
	}
}

// Links lead to pages and files that there are.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#]+?)(?:#[^)]*)?\)`)
	for page, text := range pages(t) {
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			_, err := os.Stat(filepath.Join(filepath.Dir(page), m[1]))
			require.NoError(t, err, "linked in %s", page)
		}
	}
}
