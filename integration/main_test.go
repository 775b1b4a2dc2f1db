// Package integration tests podfsm from outside, on real containerd, runc, CNI plugins, kubelet and kernel namespaces.
package integration

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

// The names of test files begin with a capability that README.md lists. Each file has tests, unless
// its name says that it belongs to other files.
func TestFileNames(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	files, err := filepath.Glob("*_test.go")
	require.NoError(t, err)
	tests := regexp.MustCompile(`(?m)^func Test`)
	for _, file := range files {
		capability, _, _ := strings.Cut(file, "_")
		if capability == "main" {
			continue
		}
		require.Contains(t, string(readme), "| `"+capability+"_*` |", file)
		content, err := os.ReadFile(file)
		require.NoError(t, err)
		require.True(t, tests.Match(content) || capability == "helpers" || continuesAnother(file), "%s has no test", file)
	}
}

// Helpers that tests of several files use are in a file of helpers, where they are looked for. A
// file may also use what the file that it continues declares, and the other way round.
func TestHelpersAreInTheirFiles(t *testing.T) {
	names, err := filepath.Glob("*_test.go")
	require.NoError(t, err)
	files := token.NewFileSet()
	var parsed []*ast.File
	for _, name := range names {
		file, err := parser.ParseFile(files, name, nil, parser.SkipObjectResolution)
		require.NoError(t, err)
		parsed = append(parsed, file)
	}
	uses := map[*ast.Ident]types.Object{}
	config := types.Config{Importer: noPackages{}, Error: func(error) {}} // other packages don't matter
	pkg, _ := config.Check("integration", files, parsed, &types.Info{Uses: uses})
	shared := 0
	for use, object := range uses {
		by, of := files.File(use.Pos()).Name(), ""
		if object.Parent() == pkg.Scope() {
			of = files.File(object.Pos()).Name()
		}
		switch {
		case of == "" || of == by:
		case strings.HasPrefix(of, "helpers_"):
			shared++
		default:
			require.True(t, continues(by, of) || continues(of, by), "%s uses %s of %s; move it to a file helpers_*", by, object.Name(), of)
		}
	}
	require.Greater(t, shared, 500)
}

// noPackages imports no package.
type noPackages struct{}

func (noPackages) Import(path string) (*types.Package, error) { return nil, errors.New(path) }

// continues reports whether the name of a file begins with that of another one.
func continues(file, another string) bool {
	return strings.HasPrefix(file, strings.TrimSuffix(another, "test.go"))
}

// continuesAnother reports whether the name of a file begins with that of another file.
func continuesAnother(file string) bool {
	for name := strings.TrimSuffix(file, "_test.go"); ; {
		at := strings.LastIndexByte(name, '_')
		if at < 0 {
			return false
		}
		name = name[:at]
		if _, err := os.Stat(name + "_test.go"); err == nil {
			return true
		}
	}
}
