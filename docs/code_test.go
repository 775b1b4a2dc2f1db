package docs

import (
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// source is a file of the module, by its path from the top of the tree.
type source struct {
	path string
	file *ast.File
	set  *token.FileSet
}

// sources parses the module's code without its tests, except that the tests of integration/ count as code.
func sources(t *testing.T, mode parser.Mode) (all []source) {
	t.Helper()
	set := token.NewFileSet()
	require.NoError(t, filepath.WalkDir("..", func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		below := strings.TrimPrefix(path, "../")
		hidden := strings.HasPrefix(entry.Name(), ".") && path != ".."
		if entry.IsDir() && (hidden || below == "tools/modules" || below == "examples") {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") && !strings.HasPrefix(below, "integration/") {
			return nil
		}
		file, err := parser.ParseFile(set, path, nil, mode)
		all = append(all, source{below, file, set})
		return err
	}))
	return all
}

var quoted = regexp.MustCompile("`([^`]+)`")

// The parts of design.md import of each other what its table says.
func TestImports(t *testing.T) {
	told := map[string][]string{}
	for _, line := range rows(t, pages(t)["explanation/design.md"], "## The parts", "## A pod's way") {
		cells := strings.Split(strings.Trim(line, "|"), "|")
		for _, part := range quoted.FindAllStringSubmatch(cells[0], -1) {
			told[part[1]] = nil
			for _, other := range quoted.FindAllStringSubmatch(cells[2], -1) {
				told[part[1]] = append(told[part[1]], other[1])
			}
		}
	}
	found := map[string]map[string]bool{}
	for _, s := range sources(t, parser.ImportsOnly) {
		part := partOf(filepath.Dir(s.path), told)
		if found[part] == nil {
			found[part] = map[string]bool{}
		}
		for _, spec := range s.file.Imports {
			other, ours := strings.CutPrefix(strings.Trim(spec.Path.Value, `"`), "github.com/podfsm/podfsm/")
			if other, _, _ = strings.Cut(other, "/"); ours && other != part {
				found[part][other] = true
			}
		}
	}
	delete(told, "plugin") // imports all parts above it
	for part, others := range told {
		require.ElementsMatch(t, slices.Collect(maps.Keys(found[part])), others, "imports of %s", part)
	}
}

// partOf is the part that a folder belongs to: the longest name of one that leads there.
func partOf(folder string, parts map[string][]string) string {
	for part := folder; part != "."; part = filepath.Dir(part) {
		if _, there := parts[part]; there {
			return part
		}
	}
	return folder
}

// Each message that the product logs from level info on stands in the tables of messages, with its level.
func TestLogMessages(t *testing.T) {
	type row struct{ text, level string }
	var told []row
	for _, line := range rows(t, pages(t)["reference/logs.md"], "## Messages", "### Level debug") {
		cells := strings.Split(strings.Trim(line, "| "), " | ")
		for _, m := range quoted.FindAllStringSubmatch(cells[0], -1) {
			told = append(told, row{m[1], cells[1]})
		}
	}
	pattern := func(text, open string) *regexp.Regexp {
		return regexp.MustCompile("^" + regexp.MustCompile(open).ReplaceAllString(regexp.QuoteMeta(text), ".*") + "$")
	}
	used := map[row]bool{}
	said := logged(t)
	require.Greater(t, len(said), 60)
	for _, m := range said {
		there := false
		for _, r := range told {
			same := pattern(r.text, "…").MatchString(m.text) || pattern(m.text, "%[sdvq]").MatchString(r.text)
			if same && strings.Contains(r.level, m.level) {
				there, used[r] = true, true
			}
		}
		require.True(t, there, "%s logs at level %q what docs/reference/logs.md lacks: %s", m.at, m.level, m.text)
	}
	for _, r := range told {
		require.True(t, used[r], "nothing logs what docs/reference/logs.md has: %s", r.text)
	}
}

var update = flag.Bool("update", false, "write the messages for podfsm bundle anew")

// podfsm bundle has the messages that the product logs. go generate writes them with -update.
func TestMessagesOfTheBundle(t *testing.T) {
	const file = "../cmd/podfsm/messages.txt"
	texts := map[string]bool{}
	for _, m := range logged(t) {
		texts[m.text] = true
	}
	want := strings.Join(slices.Sorted(maps.Keys(texts)), "\n") + "\n"
	if *update {
		require.NoError(t, os.WriteFile(file, []byte(want), 0o644))
	}
	got, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, want, string(got), "run go generate ./docs")
}

// message is a call that logs.
type message struct{ at, level, text string }

// logged are the calls of the daemon's code that log from level info on.
func logged(t *testing.T) (found []message) {
	for _, s := range sources(t, parser.SkipObjectResolution) {
		if slices.Contains([]string{"api", "cmd", "docs", "integration", "internal", "tools"}, strings.Split(s.path, "/")[0]) {
			continue
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			level, text := logCall(call)
			if text == nil {
				return true
			}
			at := s.set.Position(call.Pos()).String()
			literal, ok := text.(*ast.BasicLit)
			require.True(t, ok, "%s: a message that is no literal can't be held against logs.md", at)
			plain, err := strconv.Unquote(literal.Value)
			require.NoError(t, err)
			found = append(found, message{at, level, plain})
			return true
		})
	}
	return found
}

// logCall returns the level and the message of a call of a logger, nil for any other call and for lines of containerd
// that podfsm passes on. The level is "" if it is known at run time only.
func logCall(call *ast.CallExpr) (level string, text ast.Expr) {
	method, ok := call.Fun.(*ast.SelectorExpr)
	if !ok || len(call.Args) == 0 {
		return "", nil
	}
	of, named := method.X.(*ast.Ident)
	if named && slices.Contains([]string{"fmt", "http", "passed", "status", "tracing"}, of.Name) {
		return "", nil
	}
	if field, ok := call.Args[0].(*ast.SelectorExpr); ok && field.Sel.Name == "text" {
		return "", nil
	}
	switch method.Sel.Name {
	case "Info", "Infof":
		return "info", call.Args[0]
	case "Warn", "Warnf":
		return "warning", call.Args[0]
	case "Error", "Errorf":
		return "error", call.Args[0]
	case "Log":
		return "", call.Args[len(call.Args)-1]
	}
	return "", nil
}
