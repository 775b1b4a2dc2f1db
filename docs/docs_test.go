//go:generate go run ../tools/picture ../cmd/podfsm/testdata/timeline-crashed-80.txt timeline.svg
//go:generate go test -run ^TestMessagesOfTheBundle$ . -update

// Package docs has the tests of the pages beside it.
package docs

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/require"
	core "k8s.io/api/core/v1"
	node "k8s.io/api/node/v1"
	"sigs.k8s.io/yaml"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

// pages are the pages at the top of the tree, that of the integration tests, and all of this directory and below, by their paths from here.
func pages(t *testing.T) map[string]string {
	all := map[string]string{}
	for _, pattern := range []string{"../*.md", "../integration/*.md", "*.md", "*/*.md"} {
		files, err := filepath.Glob(pattern)
		require.NoError(t, err)
		require.NotEmpty(t, files, pattern)
		for _, file := range files {
			text, err := os.ReadFile(file)
			require.NoError(t, err)
			all[file] = string(text)
		}
	}
	return all
}

// Every page can be found from the index, and none is deeper than the tests look.
func TestIndex(t *testing.T) {
	index := pages(t)["README.md"]
	require.NoError(t, filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".md") && path != "README.md" {
			require.Contains(t, index, "]("+path+")", "docs/README.md doesn't lead to %s", path)
			require.LessOrEqual(t, strings.Count(path, "/"), 1, path)
		}
		return err
	}))
}

// code are the tests, fuzz targets and benchmarks that there are, with the files that declare them.
func code(t *testing.T) map[string][]string {
	declared := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)[A-Z]\w*)\(`)
	found := map[string][]string{}
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
			found[m[1]] = append(found[m[1]], path)
		}
		return err
	}))
	return found
}

var named = regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark)[A-Z]\w*\b(\*)?`)

// Each test that the pages name exists, and no other test has its name: readers find it by name.
// TestMain is no test.
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
			if name != "TestMain" {
				require.Len(t, there[name], 1, "%s names %s; exactly one package must declare it", page, name)
			}
		}
	}
	require.Greater(t, count, 50)
}

// Every input of others that is parsed stands in the table of security.md with the fuzz target that there is for it.
func TestEachFuzzTargetIsInTheTable(t *testing.T) {
	text := pages(t)["explanation/security.md"]
	for name := range code(t) {
		if strings.HasPrefix(name, "Fuzz") {
			require.True(t, strings.Contains(text, "`"+name+"`"), "security.md has no row of %s", name)
		}
	}
}

// Lines of pages have at most 100 columns, except where Markdown can't break them: rows of tables,
// images and code.
func TestPagesAreWrapped(t *testing.T) {
	for page, text := range pages(t) {
		for line := range strings.Lines(fenced.ReplaceAllString(text, "")) {
			if start := strings.TrimSpace(line); !strings.HasPrefix(start, "|") && !strings.HasPrefix(start, "![") {
				require.LessOrEqual(t, utf8.RuneCountInString(strings.TrimSpace(line)), 100, "%s: %s", page, line)
			}
		}
	}
}

var fenced = regexp.MustCompile("(?ms)^ *```.*?^ *```$")

// Code is in fences, where TestCommandsInTheDocs looks for commands.
func TestCodeIsFenced(t *testing.T) {
	for page, text := range pages(t) {
		require.NotRegexp(t, "\n\n {4}", fenced.ReplaceAllString(text, ""), page)
	}
}

// README.md counts the kills and the points of the kill matrix.
func TestKillsAreCounted(t *testing.T) {
	all := pages(t)
	kills, points := rows(t, all["explanation/kill-matrix.md"], "# The kill matrix", ""), map[string]bool{}
	for _, kill := range kills {
		points[strings.Split(kill, " | ")[2]] = true
	}
	require.Contains(t, all["../README.md"], fmt.Sprintf("%d kills at %d points", len(kills), len(points)))
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
				text, there := all[strings.TrimPrefix(target, "../docs/")]
				require.True(t, there, "%s links to a heading of %s, which is no page", page, target)
				require.True(t, anchors(text)[m[2]], "%s links to %s, which has no heading #%s", page, target, m[2])
			}
		}
	}
}

// Pages refer to each other by links, which TestLinks follows.
func TestNoHeadingsInQuotes(t *testing.T) {
	for page, text := range pages(t) {
		require.NotRegexp(t, `(?:see|See) "`, text, page)
	}
}

// rows are those of the tables between two headings of a page, without their heads.
func rows(t *testing.T, text, from, to string) (found []string) {
	t.Helper()
	_, text, there := strings.Cut("\n"+text, "\n"+from+"\n")
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

// Symptoms are in words that are said.
func TestSymptoms(t *testing.T) {
	var said strings.Builder
	for _, dir := range []string{"cmd/podfsm", "cri", "host", "ledger/records", "lifecycle", "netns", "plugin", "show", "states"} {
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
	for _, row := range rows(t, pages(t)["howto/debug-a-pod.md"], "## By symptom", "## Read a timeline") {
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(strings.Split(row, " | ")[0], -1) {
			for _, piece := range regexp.MustCompile(`…|NAME|podfsm ps -o wide`).Split(m[1], -1) {
				count++
				require.True(t, strings.Contains(said.String(), strings.TrimSpace(piece)), "nothing says %q", piece)
			}
		}
	}
	require.Greater(t, count, 10)
}

// The topics are those that the code publishes.
func TestTopicsOfEvents(t *testing.T) {
	files, err := filepath.Glob("../plugin/*.go")
	require.NoError(t, err)
	var published, told []string
	for _, file := range files {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		for _, m := range regexp.MustCompile(`\w+Topic += "([^"]+)"`).FindAllStringSubmatch(string(text), -1) {
			published = append(published, m[1])
		}
	}
	for _, row := range rows(t, pages(t)["reference/events.md"], "# Events", "## Fields of a transition") {
		told = append(told, strings.Split(row, "`")[1])
	}
	require.ElementsMatch(t, published, told)
}

// Every field of an event stands in the table of them.
func TestFieldsOfEvents(t *testing.T) {
	table := strings.Join(rows(t, pages(t)["reference/events.md"], "## Fields of a transition", "## Delivery"), "\n")
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
	compared := rows(t, all["explanation/comparison.md"], "## With containerd's own handler", "## Measured")
	threats := rows(t, all["explanation/security.md"], "## A hostile pod", "## What a user namespace keeps from a pod")
	promised := rows(t, all["compatibility.md"], "# What stays compatible", "## Go packages")
	require.Greater(t, len(compared), 30)
	require.Greater(t, len(threats), 40)
	require.Greater(t, len(promised), 10)
	for _, row := range slices.Concat(compared, threats, promised) {
		require.Regexp(t, evidence, last(row), row)
	}
	bullets := regexp.MustCompile(`(?m)^- \*\*(?:.+\n)(?:  .+\n)*`).FindAllString(all["../README.md"], -1)
	require.Len(t, bullets, 5)
	for _, bullet := range bullets {
		require.Regexp(t, evidence, bullet)
	}
}

// last is the last cell of a row.
func last(row string) string {
	cells := strings.Split(strings.Trim(row, "| "), "|")
	return cells[len(cells)-1]
}

// Each machine that README.md says podfsm was seen on is one that a target of make or a scenario of the lab makes.
func TestMachinesAreInTheLab(t *testing.T) {
	scenarios, err := os.ReadFile("../integration/lab/list.go")
	require.NoError(t, err)
	machines := rows(t, pages(t)["../README.md"], "## Where it was seen", "## Limits")
	require.Greater(t, len(machines), 5)
	for _, row := range machines {
		names := regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(last(row), -1)
		require.NotEmpty(t, names, row)
		for _, name := range names {
			if !strings.HasPrefix(name[1], "make ") { // those are looked for by TestMakeTargets
				require.Contains(t, string(scenarios), `name: "`+name[1]+`"`)
			}
		}
	}
}

// README.md names the releases of containerd that podfsm is built and tested with.
func TestReleasesOfContainerd(t *testing.T) {
	for _, module := range []string{"../go.mod", "../examples/own-containerd-2.3/go.mod"} {
		text, err := os.ReadFile(module)
		require.NoError(t, err)
		releases := regexp.MustCompile(`containerd/containerd/v2 v(\S+)\n`).FindAllStringSubmatch(string(text), -1)
		require.Contains(t, pages(t)["../README.md"], releases[len(releases)-1][1], module)
	}
}

// An alert's runbook is on a page that names the alert, and so does the index.
func TestRunbooks(t *testing.T) {
	text, err := os.ReadFile("../deploy/alerts.yaml")
	require.NoError(t, err)
	alerts := regexp.MustCompile(`(?m)^ *- alert: (\w+)$`).FindAllStringSubmatch(string(text), -1)
	runbooks := regexp.MustCompile(`(?m)^ *runbook_url: \S+/docs/(runbooks/[\w-]+\.md)$`).FindAllStringSubmatch(string(text), -1)
	require.Greater(t, len(alerts), 10)
	require.Len(t, runbooks, len(alerts))
	all := pages(t)
	for i, alert := range alerts {
		page := runbooks[i][1]
		require.Contains(t, all, page, "the runbook of %s", alert[1])
		require.Contains(t, all[page], "`"+alert[1]+"`", page)
		require.Regexp(t, "(?m)^\\| `"+alert[1]+"` \\| .*\\]\\("+page+"\\) \\|$", all["README.md"], "the index")
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
	require.Greater(t, count, 2)
}

// A pod in the pages can be pasted into a shell: its here-document ends, and the API server would take it.
func TestPodsInTheDocs(t *testing.T) {
	begin, document := regexp.MustCompile(`<<END`), regexp.MustCompile(`(?ms)^ *kubectl apply -f - <<END\n(.*?)^ *END$`)
	count := 0
	for page, text := range pages(t) {
		found := document.FindAllStringSubmatch(text, -1)
		require.Len(t, found, len(begin.FindAllString(text, -1)), "here-documents of %s", page)
		for _, m := range found {
			count++
			require.NoError(t, yaml.UnmarshalStrict([]byte(m[1]), &core.Pod{}), page)
		}
	}
	require.Positive(t, count)
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
