package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/html"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/ledger/records"
	"github.com/podfsm/podfsm/states"
)

const ms = time.Millisecond

func try(kind, step string, start, took time.Duration, err string) *podfsmv1.Try {
	return &podfsmv1.Try{Step: step, Kind: kind, StartedAt: at(start), Duration: durationpb.New(took), Error: err}
}

func plugin(kind, name string, start, took time.Duration, err string) *podfsmv1.Try {
	a := try(kind, "attach_network", start, took, err)
	a.Plugin = name
	return a
}

func transition(seq uint64, after, moment time.Duration, event, from, to, err string) *podfsmv1.Transition {
	return &podfsmv1.Transition{Seq: seq, At: at(moment), After: durationpb.New(after), Event: event, From: from, To: to, Error: err}
}

const pluginError = `plugin type="portmap" name="pods" failed (add): unable to create chain CNI-HOSTPORT-SETMARK: running [/usr/sbin/iptables -t nat -N CNI-HOSTPORT-SETMARK --wait]: exit status 4: iptables v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)`

// crashed was rolled back because its network failed, and its first DEL failed, too.
var crashed = &podfsmv1.InspectResponse{
	Sandbox: &podfsmv1.Sandbox{
		Id: "7c41d09e55aa" + strings.Repeat("0", 52), ContainerdNamespace: "k8s.io", PodName: "web", PodNamespace: "default",
		PodUid: ready.GetPodUid(), RuntimeHandler: "podfsm", State: "RolledBack", CreatedAt: at(-time.Minute), Since: at(-time.Minute + 3*time.Second),
		TraceId: "0af7651916cd43dd8448eb211c80319c", FailedStep: "attach_network",
		Error: `step attach_network of pod "default/web" failed: ` + pluginError,
	},
	Steps: []*podfsmv1.Step{
		{Name: "allocate_ids", Status: "undone"}, {Name: "remap_snapshot", Status: "undone"}, {Name: "start_pause", Status: "undone"},
		{Name: "capture_netns", Status: "undone"}, {Name: "attach_network", Status: "undone"}, {Name: "declare_ready", Status: "pending"},
	},
	Transitions: []*podfsmv1.Transition{
		transition(1, 300*time.Microsecond, -time.Minute, "allocate_ids", "New", "IDsAllocated", ""),
		transition(2, 12*ms, -time.Minute+12*ms, "remap_snapshot", "IDsAllocated", "SnapshotRemapped", ""),
		transition(3, 50*ms, -time.Minute+62*ms, "start_pause", "SnapshotRemapped", "PauseStarted", ""),
		transition(4, 2*ms, -time.Minute+64*ms, "capture_netns", "PauseStarted", "NetNSCaptured", ""),
		transition(5, 340*ms, -time.Minute+404*ms, "roll_back", "NetNSCaptured", "RollingBack", `step attach_network of pod "default/web" failed: `+pluginError),
		transition(6, 90*ms, -time.Minute+494*ms, "leave_cleanup_pending", "RollingBack", "CleanupOwed", "undo of step attach_network of pod \"default/web\" failed: no luck"),
		transition(7, 2400*ms, -time.Minute+2894*ms, "roll_back", "CleanupOwed", "RollingBack", ""),
		transition(8, 106*ms, -time.Minute+3*time.Second, "finish_rollback", "RollingBack", "RolledBack", ""),
	},
	Tries: []*podfsmv1.Try{
		try("do", "allocate_ids", -time.Minute, 300*time.Microsecond, ""),
		try("do", "remap_snapshot", -time.Minute+ms, 11*ms, ""),
		try("do", "start_pause", -time.Minute+12*ms, 50*ms, ""),
		try("do", "capture_netns", -time.Minute+62*ms, 2*ms, ""),
		try("do", "attach_network", -time.Minute+64*ms, 340*ms, pluginError),
		plugin("ADD", "pods/bridge", -time.Minute+70*ms, 44*ms, ""),
		plugin("ADD", "pods/portmap", -time.Minute+115*ms, 288*ms, pluginError),
		try("undo", "attach_network", -time.Minute+405*ms, 60*ms, "no luck"),
		try("undo", "attach_network", -time.Minute+2894*ms, 70*ms, ""),
		plugin("DEL", "pods/portmap", -time.Minute+2900*ms, 20*ms, ""),
		plugin("DEL", "pods/bridge", -time.Minute+2921*ms, 30*ms, ""),
		try("undo", "capture_netns", -time.Minute+2965*ms, ms, ""),
		try("undo", "start_pause", -time.Minute+2966*ms, 30*ms, ""),
		try("undo", "remap_snapshot", -time.Minute+2996*ms, 3*ms, ""),
		try("undo", "allocate_ids", -time.Minute+2999*ms, ms, ""),
	},
}

// readyTimeline is a pod that runs after an attempt that was rolled back.
var readyTimeline = &timeline{
	InspectResponse: &podfsmv1.InspectResponse{
		Sandbox: ready, Steps: readyInspection.GetSteps(), Transitions: readyInspection.GetTransitions(),
		Tries: []*podfsmv1.Try{
			try("do", "allocate_ids", 0, 300*time.Microsecond, ""),
			try("do", "remap_snapshot", ms, 11*ms, ""),
			try("do", "start_pause", 12*ms, 50*ms, ""),
			try("do", "capture_netns", 62*ms, 2*ms, ""),
			try("do", "attach_network", 64*ms, 55*ms, ""),
			plugin("ADD", "pods/bridge", 66*ms, 40*ms, ""),
			plugin("ADD", "a-network-with-a-very-long-name/host-device", 107*ms, 11*ms, ""),
			try("do", "declare_ready", 120*ms, 100*time.Microsecond, ""),
		},
	},
	siblings: []*podfsmv1.Sandbox{crashed.GetSandbox(), ready},
}

// servingTimeline is the same pod with a first container a minute later.
var servingTimeline = func() *timeline {
	r := proto.CloneOf(readyTimeline.InspectResponse)
	r.Steps = append(r.Steps, &podfsmv1.Step{Name: "start_shim", Status: "done"})
	r.Tries = append(r.Tries, try("do", "start_shim", time.Minute, 30*ms, ""))
	return &timeline{InspectResponse: r, siblings: readyTimeline.siblings}
}()

// hostile is the text of a malicious pod.
const hostile = `</title></style></pre><script>alert(1)</script><img src=x onerror="alert(2)">'"` + "`{{.}}\x1b[2J\u202e\u2028\x00" + `javascript:alert(3)`

// pendingTimeline has a pending cleanup, and all its texts are hostile.
var pendingTimeline = func() *timeline {
	s := proto.CloneOf(pending)
	s.PodName, s.PodNamespace, s.Error, s.FailedStep, s.Step, s.RuntimeHandler, s.TraceId = hostile, hostile, hostile, hostile, "attach_network", hostile, hostile
	s.Ip, s.NetnsPath = hostile, hostile
	s.PendingCleanups = append(s.PendingCleanups, &podfsmv1.PendingCleanup{Step: hostile, Error: hostile})
	return &timeline{
		InspectResponse: &podfsmv1.InspectResponse{
			Sandbox: s,
			Steps:   []*podfsmv1.Step{{Name: "attach_network", Status: "undoing"}, {Name: hostile, Status: hostile, Error: hostile, Detail: map[string]string{hostile: hostile}}},
			Transitions: []*podfsmv1.Transition{
				{Seq: 8, At: at(time.Second), Event: "leave_cleanup_pending", From: "RollingBack", To: "CleanupOwed", Error: hostile},
				{Seq: 99, At: at(2 * time.Second), Event: hostile, From: hostile, To: hostile, Error: hostile},
			},
			Tries: []*podfsmv1.Try{
				{Step: hostile, Kind: hostile, StartedAt: at(0), Error: hostile},
				{Step: "attach_network", Kind: "undo", StartedAt: at(time.Second)},
				{Step: "attach_network", Kind: "DEL", Plugin: hostile, Error: hostile},
			},
			CniResult: hostile,
		},
		siblings: []*podfsmv1.Sandbox{s, s},
	}
}()

var timelines = map[string]*timeline{
	"crashed": {InspectResponse: crashed, siblings: readyTimeline.siblings},
	"ready":   readyTimeline,
	"serving": servingTimeline,
	"pending": pendingTimeline,
	"starting": {InspectResponse: &podfsmv1.InspectResponse{Sandbox: starting, Steps: startingInspection.GetSteps(), Tries: []*podfsmv1.Try{
		try("do", "allocate_ids", 5*time.Minute, time.Second, ""),
		{Step: "start_pause", Kind: "do", StartedAt: at(5*time.Minute + time.Second)},
		{Step: "attach_network", Kind: "do", StartedAt: at(5*time.Minute + 2*time.Second)},
	}}},
	"blank": {InspectResponse: &podfsmv1.InspectResponse{}},
}

func TestTimeline(t *testing.T) {
	for name, tl := range timelines {
		for _, width := range []int{80, 120} {
			t.Run(fmt.Sprint(name, width), func(t *testing.T) {
				var b bytes.Buffer
				require.NoError(t, writeTimeline(&b, tl, width, now))
				requireGolden(t, fmt.Sprintf("timeline-%s-%d.txt", name, width), b.Bytes())
				for line := range strings.Lines(b.String()) {
					require.LessOrEqual(t, utf8.RuneCountInString(strings.TrimSuffix(line, "\n")), width, line)
				}
				require.NotContains(t, b.String(), "\x1b")
				require.NotContains(t, b.String(), "\u202e")
			})
		}
	}
}

// serveTimelines is a daemon that has the ready pod and its sandbox before.
func serveTimelines(t *testing.T) string {
	return serve(t, fakeSandboxes{
		ended: []*podfsmv1.Sandbox{crashed.GetSandbox()},
		inspect: func(_ context.Context, ref string) (*podfsmv1.InspectResponse, error) {
			switch ref {
			case ready.GetId():
				return readyTimeline.InspectResponse, nil
			case crashed.GetSandbox().GetId():
				return crashed, nil
			}
			return nil, status.Errorf(codes.NotFound, "no sandbox matches %q", ref)
		},
	})
}

func TestTimelineFindsTheSandbox(t *testing.T) {
	address := serveTimelines(t)
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"web"}, ready.GetId()},
		{[]string{"default/web"}, ready.GetId()},
		{[]string{"7c41"}, crashed.GetSandbox().GetId()},
		{[]string{"--attempt", "0", "web"}, ready.GetId()},
	} {
		out, err := podfsm(t, append([]string{"--address", address, "timeline"}, tc.args...)...)
		require.NoError(t, err)
		require.Contains(t, out, "Sandbox:  "+tc.want)
		require.Regexp(t, `(?m)^[* ] +0 +`+tc.want[:shortID]+` .* ago +(Ready +-|RolledBack +attach_network)$`, out)
		require.Regexp(t, `(?m)^\* +0 +`+tc.want[:shortID], out)
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{nil, "timeline takes one argument"},
		{[]string{"nobody"}, `no sandbox of podfsm matches "nobody"`},
		{[]string{"--attempt", "3", "web"}, "unknown attempt 3; known attempts: 0"},
		{[]string{"--attempt", "-1", "web"}, "invalid value"},
		{[]string{"--html", "", "web"}, "the file has no name"},
		{[]string{"--html", t.TempDir(), "web"}, "is not a regular file"},
		{[]string{"--html", "/dev/null", "web"}, "is not a regular file"},
		{[]string{"--html", filepath.Join(t.TempDir(), "none", "x"), "web"}, "no such file"},
	} {
		_, err := podfsm(t, append([]string{"--address", address, "timeline"}, tc.args...)...)
		require.ErrorContains(t, err, tc.want)
	}
}

// A pod that was deleted and made again under its name is another pod.
func TestTimelineTellsPodsOfOneNameApart(t *testing.T) {
	earlier := proto.CloneOf(crashed)
	earlier.Sandbox.PodUid = "a-former-uid"
	removed := proto.CloneOf(readyTimeline.InspectResponse)
	removed.Sandbox.State = "Removed"
	daemon := fakeSandboxes{
		ended: []*podfsmv1.Sandbox{earlier.GetSandbox()},
		list:  func() []*podfsmv1.Sandbox { return []*podfsmv1.Sandbox{ready} },
		inspect: func(_ context.Context, ref string) (*podfsmv1.InspectResponse, error) {
			if ref == ready.GetId() {
				return readyTimeline.InspectResponse, nil
			}
			return earlier, nil
		},
	}
	address := serve(t, daemon)
	out, err := podfsm(t, "--address", address, "timeline", "web")
	require.NoError(t, err)
	require.Contains(t, out, "Pod:      default/web, uid "+ready.GetPodUid()+", attempt 0\n")
	require.NotContains(t, out, "Note:")
	require.NotContains(t, out, earlier.GetSandbox().GetId()[:shortID], "a sandbox of another pod")

	out, err = podfsm(t, "--address", address, "timeline", earlier.GetSandbox().GetId())
	require.NoError(t, err)
	require.Contains(t, out, "Note:     this is an earlier pod of this name")
	require.NotContains(t, out, ready.GetId()[:shortID])

	daemon.list = func() []*podfsmv1.Sandbox { return []*podfsmv1.Sandbox{removed.GetSandbox()} }
	daemon.inspect = func(context.Context, string) (*podfsmv1.InspectResponse, error) { return removed, nil }
	address = serve(t, daemon)
	out, err = podfsm(t, "--address", address, "timeline", "web")
	require.NoError(t, err)
	require.Contains(t, out, "Note:     podfsm has no newer sandbox of this name")
	page, err := podfsm(t, "--address", address, "timeline", "--html", "-", "web")
	require.NoError(t, err)
	require.Contains(t, page, "podfsm has no newer sandbox of this name")
	require.NotContains(t, page, earlier.GetSandbox().GetId()[:shortID])
}

func TestPageIsWrittenWhole(t *testing.T) {
	address := serveTimelines(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "web.html")
	require.NoError(t, os.WriteFile(file, []byte("old"), 0o600))
	_, err := podfsm(t, "--address", address, "timeline", "--html", file, "web")
	require.NoError(t, err)
	written, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Contains(t, string(written), "default/web")
	out, err := podfsm(t, "--address", address, "timeline", "--html", "-", "web")
	require.NoError(t, err)
	require.Contains(t, out, "</html>")
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, left, 1, "no temporary file is left")
}

// render returns the parsed page of a timeline. The page must parse without an error.
func render(t testing.TB, tl *timeline) (string, *html.Node) {
	t.Helper()
	var b bytes.Buffer
	require.NoError(t, pageTemplate.Execute(&b, newPage(tl, now)))
	require.True(t, utf8.Valid(b.Bytes()))
	root, err := html.Parse(bytes.NewReader(b.Bytes()))
	require.NoError(t, err)
	return b.String(), root
}

// inert are the elements that a page may have. None of them loads or runs anything.
var inert = strings.Fields(`html head meta title style body header h1 h2 h3 small div span section p strong code pre main ol li
	time svg path g rect text table thead tbody tr th td dl dt dd footer`)

// requireInert fails if anything in a page loads, runs or links to something.
func requireInert(t testing.TB, root *html.Node) {
	t.Helper()
	for n := range root.Descendants() {
		if n.Type != html.ElementNode {
			require.NotEqual(t, html.CommentNode, n.Type, n.Data)
			continue
		}
		require.Contains(t, inert, n.Data)
		for _, a := range n.Attr {
			require.NotContains(t, []string{"src", "href", "srcset", "srcdoc", "action", "formaction", "xlink:href", "background"}, a.Key)
			require.False(t, strings.HasPrefix(a.Key, "on"), a.Key)
			if a.Key == "style" {
				require.Regexp(t, `^left: [0-9.]+%; width: [0-9.]+%$`, a.Val)
			}
			if a.Key == "class" {
				require.Regexp(t, `^[a-z -]*$`, a.Val)
			}
		}
		if n.Data == "style" {
			require.NotContains(t, n.FirstChild.Data, "url(")
			require.NotContains(t, n.FirstChild.Data, "@import")
		}
	}
}

func TestPage(t *testing.T) {
	for name, tl := range timelines {
		t.Run(name, func(t *testing.T) {
			text, root := render(t, tl)
			requireInert(t, root)
			require.False(t, strings.Contains(text, "ZgotmplZ"), "html/template has refused a value")
			for _, hidden := range []string{"\u202e", "\u2028", "\x1b"} {
				require.False(t, strings.Contains(text, hidden), "%q", hidden)
			}
			ids := map[string]bool{}
			titles := 0
			for n := range root.Descendants() {
				for _, a := range n.Attr {
					if a.Key == "id" {
						require.False(t, ids[a.Val], "id %q is there twice", a.Val)
						ids[a.Val] = true
					}
				}
				if n.Type == html.ElementNode && n.Data == "h1" {
					titles++
				}
			}
			require.Equal(t, 1, titles)
		})
	}
}

func TestPageShowsWhatHappened(t *testing.T) {
	text, _ := render(t, timelines["crashed"])
	for _, want := range []string{
		"the step <code>attach_network</code> failed", "Could not fetch rule set generation id", "pods/portmap ADD", "undo start_pause",
		"Rollback, tried again", "Slowest step: attach_network, 340ms", `class="line undo-failed"`, `class="line failed nested"`,
	} {
		require.True(t, strings.Contains(text, want), want)
	}
	text, _ = render(t, pendingTimeline)
	require.True(t, strings.Contains(text, "3 cleanups are pending"))
	require.True(t, strings.Contains(text, "&lt;script&gt;alert(1)&lt;/script&gt;"))
}

// requireDrawn requires that every state is drawn, and no two at the same place.
func requireDrawn(t *testing.T, d drawing, want []states.State) {
	t.Helper()
	require.Len(t, d.Nodes, len(want))
	for i, a := range d.Nodes {
		require.Equal(t, string(want[i]), a.Name)
		require.NotEmpty(t, a.Meaning)
		require.LessOrEqual(t, a.X+a.W, float64(d.Width))
		require.LessOrEqual(t, a.Y+a.H, float64(d.Height))
		for _, b := range d.Nodes[:i] {
			apart := a.X+a.W <= b.X || b.X+b.W <= a.X || a.Y+a.H <= b.Y || b.Y+b.H <= a.Y
			require.True(t, apart, "%s and %s overlap", a.Name, b.Name)
		}
	}
}

// tableWith returns a table with a path of steps between New and Ready.
func tableWith(t *testing.T, count int) *states.Table {
	t.Helper()
	var steps []states.Step
	for i := range count {
		steps = append(steps, states.Step{Name: states.Event(fmt.Sprint("step_", i)), State: states.State(fmt.Sprint("Step", i)), Meaning: "It is done.", Done: "It was done."})
	}
	table, err := states.NewTable(append(steps, states.Step{Name: "declare_ready", State: states.Ready, Done: "It was found complete."}))
	require.NoError(t, err)
	return table
}

// All states are drawn, whatever the number of steps.
func TestEachStateOfATableIsDrawn(t *testing.T) {
	for _, count := range []int{0, 1, 4, 5, 6, 12} {
		table := tableWith(t, count)
		d := draw(table, nil)
		requireDrawn(t, d, table.States())
		for _, transition := range table.Transitions() {
			drawn := slices.ContainsFunc(d.Edges, func(e edge) bool { return e.From == string(transition.From) && e.To == string(transition.To) })
			require.Equal(t, transition.Event != states.Quarantine, drawn, "%v", transition)
		}
	}
}

// An ended sandbox keeps the names of the release that ran it.
func TestEarlierNameOfAnEventIsDrawnAsTodays(t *testing.T) {
	path := func(event states.Event) []states.Passage {
		return passages([]*podfsmv1.Transition{{Seq: 1, From: "RollingBack", Event: string(event), To: "CleanupOwed"}})
	}
	require.Equal(t, path(states.LeaveCleanupPending), path("owe_cleanup"))
}

// A sandbox of another release is drawn with the states that it went through.
func TestStatesOfAnotherReleaseAreDrawn(t *testing.T) {
	var path []*podfsmv1.Transition
	at := "New"
	for i, to := range []string{"IDsAllocated", "Labelled", "Checked", "Ready", "Frozen", "Stopping", `x"; evil`} {
		path = append(path, &podfsmv1.Transition{Seq: uint64(i + 1), From: at, Event: "step", To: to})
		at = to
	}
	d := draw(records.Table(), path)
	requireDrawn(t, d, records.Table().StatesWith(passages(path)))
	var on []string
	for _, n := range d.Nodes {
		if n.On {
			on = append(on, n.Name)
		}
	}
	require.Equal(t, []string{"New", "IDsAllocated", "Labelled", "Checked", "Ready", "Frozen", "Stopping"}, on)
	require.True(t, slices.ContainsFunc(d.Edges, func(e edge) bool { return e.From == "Frozen" && e.To == "Stopping" && e.On }))
}

func TestEachStateIsDrawn(t *testing.T) {
	requireDrawn(t, draw(records.Table(), nil), records.Table().States())
	drawn := draw(records.Table(), crashed.GetTransitions())
	var on, numbered []string
	for _, n := range drawn.Nodes {
		if n.On {
			on = append(on, n.Name)
		}
		require.Equal(t, n.Name == "RolledBack", n.Last)
	}
	for _, e := range drawn.Edges {
		require.Equal(t, e.On, e.Numbers != "")
		if e.On {
			numbered = append(numbered, e.Numbers+" "+e.To)
		}
	}
	require.Equal(t, []string{"New", "IDsAllocated", "SnapshotRemapped", "PauseStarted", "NetNSCaptured", "RollingBack", "RolledBack", "CleanupOwed"}, on)
	require.Equal(t, []string{
		"1 IDsAllocated", "2 SnapshotRemapped", "3 PauseStarted", "4 NetNSCaptured", "5 RollingBack", "6 CleanupOwed", "7 RollingBack", "8 RolledBack",
	}, numbered)
	require.True(t, slices.ContainsFunc(draw(records.Table(), []*podfsmv1.Transition{{Seq: 1, From: "Ready", Event: "quarantine", To: "Quarantined"}}).Edges,
		func(e edge) bool { return e.On }), "what is left out of the picture is in it when it was taken")
}

func TestWrap(t *testing.T) {
	for _, tc := range []struct {
		text string
		want []string
	}{
		{"", []string{""}},
		{"short", []string{"short"}},
		{"exactly te", []string{"exactly te"}},
		{"one two three four", []string{"one two", "three", "four"}},
		{"abcdefghijklmnopq", []string{"abcdefghij", "klmnop", "q"}},
		{"ä漢ä漢ä漢ä漢ä漢ä漢", []string{"ä漢ä漢ä漢ä漢ä漢", "ä漢"}},
	} {
		require.Equal(t, tc.want, wrap(tc.text, 10, 6), "%q", tc.text)
	}
}

func TestCut(t *testing.T) {
	for text, want := range map[string]string{"": "", "1234": "1234", "12345": "123…", "a\n": `a\n`, "a\nbcd": `a\n…`} {
		require.Equal(t, want, cut(text, 4), "%q", text)
	}
}

// FuzzTimeline renders any answer of a daemon: nothing panics, every line fits, and no page loads
// or runs anything.
func FuzzTimeline(f *testing.F) {
	for _, tl := range timelines {
		text, err := proto.Marshal(tl.InspectResponse)
		require.NoError(f, err)
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		r := &podfsmv1.InspectResponse{}
		if proto.Unmarshal(text, r) != nil {
			return
		}
		tl := &timeline{InspectResponse: r, siblings: []*podfsmv1.Sandbox{r.GetSandbox(), r.GetSandbox()}}
		var b bytes.Buffer
		require.NoError(t, writeTimeline(&b, tl, 80, now))
		require.NoError(t, writePath(&b, r))
		require.NotContains(t, b.String(), "\x1b")
		_, root := render(t, tl)
		requireInert(t, root)
	})
}

// The first rollback of a creation that a crash interrupted begins after a pause, and is no second try.
func TestTitleOfARollback(t *testing.T) {
	interrupted := proto.CloneOf(crashed)
	interrupted.Tries = slices.DeleteFunc(interrupted.Tries, func(a *podfsmv1.Try) bool { return a.GetError() == "no luck" })
	titles := func(r *podfsmv1.InspectResponse) (all []string) {
		for _, s := range waterfall(r, now) {
			all = append(all, s.title)
		}
		return all
	}
	require.Equal(t, []string{"Creation", "Rollback"}, titles(interrupted))
	require.Equal(t, []string{"Creation and rollback", "Rollback, tried again"}, titles(crashed))
}

// A write-off is listed with its reason, and is not a part of the waterfall.
func TestWrittenOffIsShown(t *testing.T) {
	r := proto.CloneOf(readyInspection)
	periods := len(waterfall(r, now))
	r.Tries = append(r.Tries,
		&podfsmv1.Try{Step: "attach_network", Kind: "write-off", Plugin: "net/sbr", StartedAt: at(time.Minute), Reason: "it is gone\x1b for good"},
		&podfsmv1.Try{Step: "capture_netns", Kind: "write-off", StartedAt: at(2 * time.Minute), Duration: took(0), Error: "busy", Reason: "the node is wiped"})
	require.Len(t, waterfall(r, now), periods)
	const text = "\nWritten off\nnet/sbr DEL, 4m12s ago: it is gone\\x1b for good\nundo of capture_netns, 3m12s ago: the node is wiped\n"
	drawn := &timeline{InspectResponse: r}
	var b bytes.Buffer
	require.NoError(t, writeTimeline(&b, drawn, 80, now))
	require.Contains(t, b.String(), text)
	b.Reset()
	require.NoError(t, writeDescription(&b, r, now))
	require.Contains(t, b.String(), text)
	b.Reset()
	require.NoError(t, pageTemplate.Execute(&b, newPage(drawn, now)))
	require.Contains(t, b.String(), "<h2>Written off</h2>\n<div class=\"boxed\"><p>net/sbr DEL, 4m12s ago</p>")
}
