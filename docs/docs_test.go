// Package docs has the tests of the pages beside it.
package docs

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/require"
	node "k8s.io/api/node/v1"
	"sigs.k8s.io/yaml"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
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

// anchors are a page's headings, as links lead to them.
func anchors(text string) map[string]bool {
	found := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^#+ (.+)$`).FindAllStringSubmatch(text, -1) {
		plain := regexp.MustCompile(`[^\p{L}\p{N} _-]`).ReplaceAllString(strings.ToLower(m[1]), "")
		found[strings.ReplaceAll(plain, " ", "-")] = true
	}
	return found
}

// Links lead to pages, headings and files that there are.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#]*)(?:#([^)]*))?\)`)
	all := pages(t)
	for page, text := range all {
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			target := page
			if m[1] != "" {
				target = filepath.Join(filepath.Dir(page), m[1])
				_, err := os.Stat(target)
				require.NoError(t, err, "linked in %s", page)
			}
			if m[2] != "" {
				require.True(t, anchors(all[target] + all[filepath.Base(target)])[m[2]], "%s links to %s, which has no heading #%s", page, target, m[2])
			}
		}
	}
}

// What a page says is told under a heading of it is.
func TestNamedHeadings(t *testing.T) {
	count := 0
	for page, text := range pages(t) {
		for _, m := range regexp.MustCompile(`(?:see|See) "([^"\n]+)"`).FindAllStringSubmatch(text, -1) {
			count++
			require.Regexp(t, `(?m)^#+ `+regexp.QuoteMeta(m[1]), text, "%s says: see %q", page, m[1])
		}
	}
	require.Greater(t, count, 5)
}

// rows are those of the tables between two headings of a page, without their heads.
func rows(t *testing.T, text, from, to string) (found []string) {
	t.Helper()
	_, text, there := strings.Cut(text, "\n"+from+"\n")
	require.True(t, there, from)
	if to != "" {
		text, _, there = strings.Cut(text, "\n"+to+"\n")
		require.True(t, there, to)
	}
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		head := strings.HasPrefix(line, "|---") || i+1 < len(lines) && strings.HasPrefix(lines[i+1], "|---")
		if strings.HasPrefix(line, "|") && !head {
			found = append(found, line)
		}
	}
	return found
}

// What is logged of a sandbox, but for level debug, stands in the table of messages.
func TestLogMessages(t *testing.T) {
	var told []string
	for _, row := range rows(t, pages(t)["operators.md"], "## Logs", "## Pending cleanups, and what has leaked") {
		for _, m := range regexp.MustCompile("`(sandbox: [^`]+)`").FindAllStringSubmatch(strings.Split(row, " | ")[0], -1) {
			told = append(told, strings.NewReplacer("…", ".*", "<event>", "%s").Replace(regexp.QuoteMeta(m[1])))
		}
	}
	files, err := filepath.Glob("../lifecycle/*.go")
	require.NoError(t, err)
	count := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		for _, m := range regexp.MustCompile(`\.(?:Info|Warn|Error)f?\("(sandbox: [^"]+)"`).FindAllStringSubmatch(string(text), -1) {
			count++
			require.Regexp(t, "^(?:"+strings.Join(told, "|")+")$", m[1], "%s logs what operators.md doesn't tell of", file)
		}
	}
	require.Greater(t, count, 10)
}

// Symptoms are in words that are said.
func TestSymptoms(t *testing.T) {
	var said strings.Builder
	for _, dir := range []string{"cmd/podfsm", "cri", "host", "lifecycle", "netns", "plugin", "states"} {
		files, err := filepath.Glob(filepath.Join("..", dir, "*.go"))
		require.NoError(t, err)
		for _, file := range files {
			if text, err := os.ReadFile(file); !strings.HasSuffix(file, "_test.go") {
				require.NoError(t, err)
				said.Write(text)
			}
		}
	}
	count := 0
	for _, row := range rows(t, pages(t)["operators.md"], "## By symptom", "## Configuration") {
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(strings.Split(row, " | ")[0], -1) {
			for _, piece := range regexp.MustCompile(`…|NAME|podfsm ps -o wide`).Split(m[1], -1) {
				count++
				require.True(t, strings.Contains(said.String(), strings.TrimSpace(piece)), "nothing says %q", piece)
			}
		}
	}
	require.Greater(t, count, 10)
}

// Every field of an event stands in the table of them.
func TestFieldsOfEvents(t *testing.T) {
	table := strings.Join(rows(t, pages(t)["operators.md"], "## Events", "## Metrics"), "\n")
	event := (&podfsmv1.SandboxTransition{}).ProtoReflect().Descriptor().Fields()
	transition := (&podfsmv1.Transition{}).ProtoReflect().Descriptor().Fields()
	for i := range event.Len() {
		if name := event.Get(i).Name(); name != "transition" {
			require.Contains(t, table, "`"+string(name)+"`")
		}
	}
	for i := range transition.Len() {
		require.Contains(t, table, "`transition."+string(transition.Get(i).Name())+"`")
	}
}

// Whoever compares, or says that a threat is met, names what shows it.
func TestClaimsNameTheirEvidence(t *testing.T) {
	evidence := regexp.MustCompile("`(?:Test|Fuzz|Benchmark)[A-Z]\\w*`|`make [a-z-]+`")
	all := pages(t)
	compared := rows(t, all["../README.md"], "## What you get", "## Limits")
	threats := rows(t, all["security.md"], "## A hostile pod", "")
	require.Greater(t, len(compared), 30)
	require.Greater(t, len(threats), 40)
	for _, row := range append(compared, threats...) {
		cells := strings.Split(strings.Trim(row, "| "), "|")
		require.Regexp(t, evidence, cells[len(cells)-1], row)
	}
}

// The targets of make that the pages name are there.
func TestMakeTargets(t *testing.T) {
	makefile, err := os.ReadFile("../Makefile")
	require.NoError(t, err)
	count := 0
	for page, text := range pages(t) {
		for _, m := range regexp.MustCompile("(?m)(?:`|^)make ([a-z-]+)").FindAllStringSubmatch(text, -1) {
			count++
			require.Regexp(t, `(?m)^`+m[1]+`: `, string(makefile), "named in %s", page)
		}
	}
	require.Greater(t, count, 20)
}

// Files of this repository that the pages name are there: by their path in it, or by that beside the page.
func TestNamedFilesExist(t *testing.T) {
	count := 0
	for page, text := range pages(t) {
		for _, m := range regexp.MustCompile("`([a-z][\\w-]*(?:/[\\w.-]+)*/[\\w-]+\\.(?:go|md|toml|yaml|json|proto))`").FindAllStringSubmatch(text, -1) {
			if strings.Contains(m[1], "NAME") {
				continue // it isn't one's name
			}
			count++
			_, besideErr := os.Stat(m[1])
			_, err := os.Stat(filepath.Join("..", m[1]))
			require.True(t, besideErr == nil || err == nil, "%s names %s", page, m[1])
		}
	}
	require.Greater(t, count, 20)
}

// What is installed fits together: the RuntimeClass names the handler that the drop-in has, and the kubelet has its cgroup driver.
func TestDeployedFilesFit(t *testing.T) {
	read := func(path string) []byte {
		text, err := os.ReadFile(filepath.Join("..", "deploy", path))
		require.NoError(t, err)
		return text
	}
	var class node.RuntimeClass
	require.NoError(t, yaml.UnmarshalStrict(read("runtimeclass.yaml"), &class))
	require.Equal(t, "node.k8s.io/v1 RuntimeClass", class.APIVersion+" "+class.Kind)
	var dropIn struct {
		Plugins map[string]struct {
			Containerd struct {
				Runtimes map[string]struct {
					Sandboxer string
					Options   struct{ SystemdCgroup bool }
				}
			}
		}
	}
	require.NoError(t, toml.Unmarshal(read("conf.d/podfsm.toml"), &dropIn))
	handler := dropIn.Plugins["io.containerd.cri.v1.runtime"].Containerd.Runtimes[class.Handler]
	require.Equal(t, "podfsm", handler.Sandboxer)
	var kubelet struct{ CgroupDriver string }
	require.NoError(t, yaml.Unmarshal(read("kubelet.yaml"), &kubelet))
	require.Equal(t, handler.Options.SystemdCgroup, kubelet.CgroupDriver == "systemd")
}
