package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/internal/roottest"
	"github.com/podfsm/podfsm/tracing"
)

// ledger is a Record that keeps the events. It fails on the events that fail selects.
type ledger struct {
	mu    sync.Mutex
	notes []Progress
	fail  func(Progress) error
}

func (l *ledger) record(ctx context.Context, p Progress) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if l.fail != nil {
		if err := l.fail(p); err != nil {
			return err
		}
	}
	l.notes = append(l.notes, p)
	return nil
}

// phases returns the events as text, with a mark if they report an error: "network.plugin
// phase[!]".
func (l *ledger) phases() []string { return textsOf(l.notes) }

// announced returns the events of ADDs that were about to start.
func (l *ledger) announced() []string {
	return textsOf(slices.DeleteFunc(slices.Clone(l.notes), func(p Progress) bool { return !p.Announces() }))
}

func textsOf(notes []Progress) []string {
	var texts []string
	for _, p := range notes {
		text := strconv.Itoa(p.Network) + "." + strconv.Itoa(p.Plugin) + " " + string(p.Phase)
		if p.Error != "" {
			text += "!"
		}
		texts = append(texts, text)
	}
	return texts
}

// rig has a network namespace of a pod, fake plugins, and an attachment to networks of these
// plugins.
type rig struct {
	*plugins
	*ledger
	attachment *Attachment
	before     []byte // the attachment as the ledger got it first
	driver     *Driver
}

// sandboxID is the id of the sandboxes of rigs.
const sandboxID = "sandbox.1"

func newRig(t *testing.T, p *plugins, config Config, networks ...Network) *rig {
	t.Helper()
	for i := range networks {
		networks[i].IfName = "eth" + strconv.Itoa(i)
	}
	config.BinDirs = []string{"/nonexistent", p.dir}
	args := Args{{"IgnoreUnknown", "1"}, {"K8S_POD_NAME", "web"}}
	capabilities := Capabilities{"bandwidth": []byte(`{"IngressRate":1000000000000000}`), "dns": []byte(`{}`)}
	a, err := NewAttachment(config, networks, sandboxID, newNetNS(t), args, capabilities)
	require.NoError(t, err)
	before, err := json.Marshal(a)
	require.NoError(t, err)
	driver := newDriver(t, Options{PipeTimeout: 100 * time.Millisecond})
	return &rig{plugins: p, ledger: &ledger{}, attachment: a, before: before, driver: driver}
}

func (r *rig) add(ctx context.Context) error { return r.driver.Add(ctx, r.attachment, r.record) }
func (r *rig) del(ctx context.Context) error { return r.driver.Del(ctx, r.attachment, r.record) }

// requireForgotten requires that no group of a run is left.
func (r *rig) requireForgotten(t *testing.T) {
	t.Helper()
	require.Empty(t, groupNames(t))
}

// requireReplay requires that a replay of the ledger gives the attachment.
func (r *rig) requireReplay(t *testing.T) {
	t.Helper()
	replayed := &Attachment{}
	require.NoError(t, json.Unmarshal(r.before, replayed))
	for _, note := range r.notes {
		data, err := json.Marshal(note)
		require.NoError(t, err)
		var p Progress
		require.NoError(t, json.Unmarshal(data, &p))
		require.NoError(t, replayed.Apply(p))
		require.NoError(t, replayed.Apply(p), "applying an event again changes nothing")
	}
	want, err := json.Marshal(r.attachment)
	require.NoError(t, err)
	got, err := json.Marshal(replayed)
	require.NoError(t, err)
	require.JSONEq(t, string(want), string(got))
}

func TestAddAndDel(t *testing.T) {
	spans := recordSpans(t)
	p := newPlugins(t)
	p.script("first", good("10.1.2.3"))
	p.script("second", `[ $CNI_COMMAND = ADD ] || exit 0
echo '{"cniVersion":"1.0.0","interfaces":[{"name":"eth0"}],"ips":[{"address":"10.1.2.3/24","interface":0}],"routes":[{"dst":"0.0.0.0/0"}]}'
echo for the log >&2`)
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0",
		`{"type":"first","name":"overridden","mtu":1400,"capabilities":{"bandwidth":true,"dns":false,"portMappings":true}}`,
		`{"type":"second"}`))

	ctx, root := otel.Tracer("test").Start(t.Context(), "root")
	require.NoError(t, r.add(ctx))
	require.Equal(t, []string{"ADD first eth0", "ADD second eth0"}, r.calls())
	require.Equal(t, []string{"0.0 adding", "0.0 added", "0.1 adding", "0.1 added"}, r.phases())
	require.Equal(t, []string{"0.0 adding", "0.1 adding"}, r.announced())
	require.False(t, r.attachment.Settled())
	r.requireReplay(t)
	require.True(t, loopbackIsUp(t, r.attachment.NetNSPath))

	prevResult := map[string]any{
		"cniVersion": "1.0.0",
		"interfaces": []any{map[string]any{"name": "eth0"}},
		"ips":        []any{map[string]any{"address": "10.1.2.3/24", "interface": float64(0)}},
	}
	require.Equal(t, map[string]any{
		"type": "first", "name": "net", "cniVersion": "1.0.0", "mtu": float64(1400),
		"capabilities":  map[string]any{"bandwidth": true, "dns": false, "portMappings": true},
		"runtimeConfig": map[string]any{"bandwidth": map[string]any{"IngressRate": 1e15}},
	}, r.stdin("first", "ADD"))
	require.Equal(t, map[string]any{
		"type": "second", "name": "net", "cniVersion": "1.0.0", "prevResult": prevResult,
	}, r.stdin("second", "ADD"))

	environ := strings.Split(r.read("second.ADD.env"), "\n")
	for _, want := range []string{
		"CNI_COMMAND=ADD", "CNI_CONTAINERID=" + sandboxID, "CNI_IFNAME=eth0", "CNI_NETNS=" + r.attachment.NetNSPath,
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAME=web", "CNI_PATH=/nonexistent:" + r.dir,
		"PATH=" + os.Getenv("PATH"),
	} {
		require.Contains(t, environ, want)
	}
	require.Contains(t, r.read("second.ADD.env"), "TRACEPARENT=00-"+root.SpanContext().TraceID().String())

	ip, additional, err := r.attachment.IPs("")
	require.NoError(t, err)
	require.Equal(t, "10.1.2.3", ip)
	require.Empty(t, additional)

	// DEL, by another driver that knows the attachment from the ledger.
	recorded, err := json.Marshal(r.attachment)
	require.NoError(t, err)
	r.attachment = &Attachment{}
	require.NoError(t, json.Unmarshal(recorded, r.attachment))
	require.NoError(t, r.del(ctx))
	require.Equal(t, []string{"DEL second eth0", "DEL first eth0"}, r.calls())
	require.Equal(t, []string{"0.1 deleted", "0.0 deleted"}, r.phases()[4:])
	require.True(t, r.attachment.Settled())
	r.requireReplay(t)

	prevResult["routes"] = []any{map[string]any{"dst": "0.0.0.0/0"}}
	require.Equal(t, prevResult, r.stdin("first", "DEL")["prevResult"], "the last plugin's result")
	require.Equal(t, r.stdin("first", "ADD")["runtimeConfig"], r.stdin("first", "DEL")["runtimeConfig"])
	require.Contains(t, r.read("first.DEL.env"), "CNI_NETNS="+r.attachment.NetNSPath)

	require.NoError(t, r.del(ctx))
	require.Empty(t, r.calls(), "nothing is left to delete")

	root.End()
	var names []string
	for _, span := range spans.Ended() {
		attrs := map[string]string{}
		for _, kv := range span.Attributes() {
			attrs[string(kv.Key)] = kv.Value.AsString()
		}
		names = append(names, strings.TrimSpace(span.Name()+" "+attrs[string(tracing.CNICommand)]+" "+attrs[string(tracing.CNIPlugin)]+" "+attrs[string(tracing.CNINetwork)]+" "+attrs[string(tracing.CNIIfName)]))
		if span.Name() != "root" {
			require.Equal(t, root.SpanContext().SpanID(), span.Parent().SpanID())
			require.Equal(t, codes.Unset, span.Status().Code)
		}
	}
	require.Equal(t, []string{
		"podfsm.cni.add ADD first net eth0", "podfsm.cni.add ADD second net eth0",
		"podfsm.cni.del DEL second net eth0", "podfsm.cni.del DEL first net eth0", "root",
	}, names)
}

func recordSpans(t *testing.T) *tracetest.SpanRecorder {
	t.Helper()
	recorder := tracetest.NewSpanRecorder()
	before := otel.GetTracerProvider()
	otel.SetTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder)))
	t.Cleanup(func() { otel.SetTracerProvider(before) })
	return recorder
}

func loopbackIsUp(t *testing.T, netns string) bool {
	t.Helper()
	up := false
	inNetNS(t, netns, func() error {
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			up = lo.Attrs().RawFlags&unix.IFF_UP != 0
		}
		return err
	})
	return up
}

func TestAddFails(t *testing.T) {
	const jsonError = `[ $CNI_COMMAND = ADD ] || exit 0
echo '{"cniVersion":"1.0.0","code":7,"msg":"no more tunnels","details":"ask the operator"}'; echo noise >&2; exit 1`

	for name, test := range map[string]struct {
		second string // body of the second plugin; "-" for none
		text   string
		class  func(error) bool
		notes  []string // after those of the first plugin
		calls  []string // of DEL
	}{
		"plugin's own error": {
			second: jsonError,
			text:   `plugin type="second" name="net" failed (add): no more tunnels; ask the operator`,
			class:  func(err error) bool { e, ok := errors.AsType[*types.Error](err); return ok && e.Code == 7 },
			notes:  []string{"0.1 adding", "0.1 adding!"},
			calls:  []string{"DEL second eth0", "DEL first eth0"},
		},
		"missing": {
			second: "-",
			text:   `plugin type="second" name="net" failed (add): failed to find plugin "second" in path [/nonexistent `,
			class:  errdefs.IsFailedPrecondition,
			notes:  nil, // never started, so no DEL
			calls:  []string{"DEL first eth0"},
		},
		"stderr only": {
			second: "[ $CNI_COMMAND = ADD ] || exit 0\necho first; echo why >&2; exit 3",
			text: `netplugin failed but error parsing its diagnostic message: invalid character 'i' in literal false (expecting 'a')` +
				`; stdout: "first\n"; stderr: "why\n": exit status 3`,
			notes: []string{"0.1 adding", "0.1 adding!"},
			calls: []string{"DEL second eth0", "DEL first eth0"},
		},
		"no word": {
			second: "[ $CNI_COMMAND = ADD ] || exit 0\nexit 3",
			text:   `netplugin failed with no error message: exit status 3`,
			notes:  []string{"0.1 adding", "0.1 adding!"},
			calls:  []string{"DEL second eth0", "DEL first eth0"},
		},
		"stderr": {
			second: "[ $CNI_COMMAND = ADD ] || exit 0\necho why >&2; exit 3",
			text:   `netplugin failed: "why\n": exit status 3`,
			notes:  []string{"0.1 adding", "0.1 adding!"},
			calls:  []string{"DEL second eth0", "DEL first eth0"},
		},
		"result and a failure": {
			second: "[ $CNI_COMMAND = ADD ] || exit 0\necho '{\"cniVersion\":\"1.0.0\"}'; echo why >&2; exit 3",
			text:   `netplugin failed with no error message; stdout: "{\"cniVersion\":\"1.0.0\"}\n"; stderr: "why\n": exit status 3`,
			notes:  []string{"0.1 adding", "0.1 adding!"},
			calls:  []string{"DEL second eth0", "DEL first eth0"},
		},
		"null and a failure": {
			second: "[ $CNI_COMMAND = ADD ] || exit 0\necho null; exit 3",
			text:   `netplugin failed with no error message; stdout: "null\n": exit status 3`,
			notes:  []string{"0.1 adding", "0.1 adding!"},
			calls:  []string{"DEL second eth0", "DEL first eth0"},
		},
		"log line before the error": {
			second: "[ $CNI_COMMAND = ADD ] || exit 0\necho 'W1129 leader lost'; echo '{\"code\":7,\"msg\":\"no more tunnels\"}'; exit 1",
			text:   `; stdout: "W1129 leader lost\n{\"code\":7,\"msg\":\"no more tunnels\"}\n": exit status 1`,
			notes:  []string{"0.1 adding", "0.1 adding!"},
			calls:  []string{"DEL second eth0", "DEL first eth0"},
		},
		"log line before the result": {
			second: "[ $CNI_COMMAND = ADD ] || exit 0\necho 'W1129 leader lost'; echo why >&2; echo '{\"cniVersion\":\"1.0.0\"}'",
			text:   `; stdout: "W1129 leader lost\n{\"cniVersion\":\"1.0.0\"}\n"; stderr: "why\n"`,
			notes:  []string{"0.1 adding", "0.1 adding!"},
			calls:  []string{"DEL second eth0", "DEL first eth0"},
		},
		"very much instead of a result": {
			second: "[ $CNI_COMMAND = ADD ] || exit 0\nhead -c 100000 /dev/zero; head -c 100000 /dev/zero | tr '\\0' e >&2",
			text:   `failed to unmarshal raw result`,
			notes:  []string{"0.1 adding", "0.1 adding!"},
			calls:  []string{"DEL second eth0", "DEL first eth0"},
		},
		"garbage for a result": {
			second: "echo garbage",
			text:   `failed (add): the plugin exited with status 0, but its output is invalid: failed to unmarshal raw result: invalid character 'g' looking for beginning of value; stdout: "garbage\n"`,
			notes:  []string{"0.1 adding", "0.1 adding!"},
			calls:  []string{"DEL second eth0", "DEL first eth0"},
		},
		"no result": {
			second: "exit 0",
			text:   `failed to unmarshal raw result`,
			notes:  []string{"0.1 adding", "0.1 adding!"},
			calls:  []string{"DEL second eth0", "DEL first eth0"},
		},
		"result of an unknown version": {
			second: `echo '{"cniVersion":"9.0.0"}'`,
			text:   `unsupported CNI result version "9.0.0"`,
			notes:  []string{"0.1 adding", "0.1 adding!"},
			calls:  []string{"DEL second eth0", "DEL first eth0"},
		},
		"result without an address": {
			second: `echo '{"cniVersion":"1.0.0","interfaces":[{"name":"eth0"}]}'`,
			text:   `gave eth0 no address`,
			class:  errdefs.IsFailedPrecondition,
			notes:  []string{"0.1 adding", "0.1 added"},
			calls:  []string{"DEL second eth0", "DEL first eth0"},
		},
		"endless result": {
			second: "[ $CNI_COMMAND = ADD ] || exit 0\nhead -c 3000000 /dev/zero",
			text:   `failed (add): the plugin printed more than 1048576 bytes`,
			class:  errdefs.IsResourceExhausted,
			notes:  []string{"0.1 adding", "0.1 adding!"},
			calls:  []string{"DEL second eth0", "DEL first eth0"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			spans := recordSpans(t)
			p := newPlugins(t)
			p.script("first", good("10.1.2.3"))
			if test.second != "-" {
				p.script("second", test.second)
			}
			p.script("third", `echo '{}'`)
			confs := []string{`{"type":"first"}`, `{"type":"second"}`, `{"type":"third"}`}
			if name == "result without an address" {
				confs = confs[:2]
			}
			r := newRig(t, p, Config{}, network(t, "net", "1.0.0", confs...))

			err := r.add(t.Context())
			require.ErrorContains(t, err, test.text)
			if test.class != nil {
				require.True(t, test.class(err), "%v", err)
			}
			require.Less(t, len(err.Error()), 24<<10)
			require.NotContains(t, r.calls(), "ADD third eth0")
			require.Equal(t, append([]string{"0.0 adding", "0.0 added"}, test.notes...), r.phases())
			for _, note := range r.announced() {
				require.NotContains(t, note, "!")
			}
			require.False(t, r.attachment.Settled())
			r.requireReplay(t)
			if !strings.HasPrefix(name, "result without") {
				span := spans.Ended()[len(spans.Ended())-1]
				require.Equal(t, codes.Error, span.Status().Code)
			}

			require.NoError(t, r.del(t.Context()))
			require.Equal(t, test.calls, r.calls())
			require.True(t, r.attachment.Settled())
			r.requireReplay(t)
			require.NotNil(t, r.stdin("first", "DEL")["prevResult"], "the last result of the failed chain")
		})
	}
}

func TestHugeError(t *testing.T) {
	p := newPlugins(t)
	text := strings.Repeat("ä", 50<<10)
	p.script("loud", `echo '{"msg":"`+text+`","details":"`+text+`"}'; exit 1`)
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"loud"}`))
	err := r.add(t.Context())
	require.ErrorContains(t, err, "ää…; ää")
	require.Less(t, len(err.Error()), 9<<10)
	require.True(t, utf8.ValidString(err.Error()))
}

func TestHugeStderr(t *testing.T) {
	p := newPlugins(t)
	p.script("loud", "head -c 3000000 /dev/zero | tr '\\0' x >&2; echo reason >&2; exit 1")
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"loud"}`))
	err := r.add(t.Context())
	require.ErrorContains(t, err, `reason\n": exit status 1`)
	require.ErrorContains(t, err, `bytes)…xxx`)
	require.Less(t, len(err.Error()), 24<<10)
}

// What a plugin writes to stderr is logged, also when the plugin succeeds.
func TestStderrIsLogged(t *testing.T) {
	for name, end := range map[string]string{"success": good("10.1.0.2"), "failure": "exit 1"} {
		t.Run(name, func(t *testing.T) {
			p := newPlugins(t)
			p.script("talker", "echo 'the pool is nearly full' >&2\n"+end)
			r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"talker"}`))
			var out bytes.Buffer
			logger := logrus.New()
			logger.SetOutput(&out)
			err := r.add(log.WithLogger(t.Context(), logrus.NewEntry(logger)))
			require.Equal(t, name == "success", err == nil, "%v", err)
			require.Equal(t, 1, strings.Count(out.String(), "the pool is nearly full"), out.String())
			require.Contains(t, out.String(), "level=info")
			require.Contains(t, out.String(), "/talker")
		})
	}
}

// A plugin that the kernel refuses to execute has done nothing: no DEL is pending, which would fail, too.
func TestAddNotExecutable(t *testing.T) {
	p := newPlugins(t)
	p.script("first", good("10.1.2.3"))
	require.NoError(t, os.WriteFile(filepath.Join(p.dir, "second"), []byte("\x00"), 0o644))
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"first"}`, `{"type":"second"}`))

	require.ErrorIs(t, r.add(t.Context()), unix.EACCES)
	require.Equal(t, []string{"0.0 adding", "0.0 added", "0.1 adding", "0.1 !"}, r.phases())
	r.requireReplay(t)
	require.NoError(t, r.del(t.Context()))
	require.True(t, r.attachment.Settled())
}

// The plugin's file is being written: the driver tries again until its caller gives up.
func TestAddWhilePluginIsInstalled(t *testing.T) {
	p := newPlugins(t)
	p.script("busy", good("10.1.2.3"))
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"busy"}`))
	writer, err := os.OpenFile(filepath.Join(p.dir, "busy"), os.O_WRONLY, 0)
	require.NoError(t, err)
	defer writer.Close()

	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	err = r.add(ctx)
	require.ErrorIs(t, err, unix.ETXTBSY)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.True(t, r.attachment.Settled(), "the plugin never ran")
	require.NoError(t, r.del(t.Context()))
	r.requireForgotten(t)
}

func TestAddTwice(t *testing.T) {
	p := newPlugins(t)
	p.script("first", good("10.1.2.3"))
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"first"}`))
	require.NoError(t, r.add(t.Context()))
	require.True(t, errdefs.IsFailedPrecondition(r.add(t.Context())))
	require.NoError(t, r.del(t.Context()))
	require.True(t, errdefs.IsFailedPrecondition(r.add(t.Context())))
	require.Equal(t, []string{"ADD first eth0", "DEL first eth0"}, r.calls())
}

func TestAddWithoutNetNS(t *testing.T) {
	p := newPlugins(t)
	p.script("first", good("10.1.2.3"))
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"first"}`))
	r.attachment.NetNSPath += "x"
	require.ErrorContains(t, r.add(t.Context()), "loopback")
	require.Empty(t, r.calls())
	require.Empty(t, r.notes)
}

func TestRecordFails(t *testing.T) {
	broken := errors.New("disk full")
	for name, test := range map[string]struct {
		phase   Phase
		calls   []string // of ADD
		pending []string // of DEL
	}{
		"before ADD": {Adding, nil, nil},
		"after ADD":  {Added, []string{"ADD first eth0"}, []string{"DEL first eth0"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlugins(t)
			p.script("first", good("10.1.2.3"))
			r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"first"}`))
			r.fail = func(p Progress) error {
				if p.Phase == test.phase {
					return broken
				}
				return nil
			}
			require.ErrorIs(t, r.add(t.Context()), broken)
			require.Equal(t, test.calls, r.calls())
			r.requireReplay(t)

			r.fail = nil
			require.NoError(t, r.del(t.Context()))
			require.Equal(t, test.pending, r.calls())
			r.requireForgotten(t)
		})
	}
	t.Run("with a panic", func(t *testing.T) {
		p := newPlugins(t)
		p.script("first", good("10.1.2.3"))
		r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"first"}`))
		r.fail = func(Progress) error { panic("a bug") }
		err := r.add(t.Context())
		require.True(t, errdefs.IsInternal(err), "%v", err)
	})
	t.Run("after DEL", func(t *testing.T) {
		p := newPlugins(t)
		p.script("first", good("10.1.2.3"))
		r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"first"}`))
		require.NoError(t, r.add(t.Context()))
		r.fail = func(Progress) error { return broken }
		require.ErrorIs(t, r.del(t.Context()), broken)
		require.False(t, r.attachment.Settled(), "a DEL without a record is pending")
		r.fail = nil
		require.NoError(t, r.del(t.Context()))
		require.True(t, r.attachment.Settled())
	})
}

// A failed DEL is pending whatever its error says, and the plugins before it in the chain get their
// DEL.
func TestDelFailsOnce(t *testing.T) {
	p := newPlugins(t)
	p.script("first", good("10.1.2.3"))
	p.script("second", `[ $CNI_COMMAND = DEL ] && [ ! -e $dir/healed ] && { touch $dir/healed; echo '{"code":100,"msg":"ippool not found: no such file or directory"}'; exit 1; }
`+good("10.1.2.3"))
	p.script("third", good("10.1.2.3"))
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"first"}`, `{"type":"second"}`, `{"type":"third"}`))
	require.NoError(t, r.add(t.Context()))
	r.calls()
	r.notes = nil

	err := r.del(t.Context())
	require.EqualError(t, err, `plugin type="second" name="net" failed (delete): ippool not found: no such file or directory`)
	require.Equal(t, []string{"DEL third eth0", "DEL second eth0", "DEL first eth0"}, r.calls())
	require.Equal(t, []string{"0.2 deleted", "0.1 added!", "0.0 deleted"}, r.phases())
	require.Empty(t, r.announced())
	require.False(t, r.attachment.Settled())

	require.NoError(t, r.del(t.Context()))
	require.Equal(t, []string{"DEL second eth0"}, r.calls())
	require.NotNil(t, r.stdin("second", "DEL")["prevResult"])
	require.True(t, r.attachment.Settled())
}

func TestDelWithoutPlugin(t *testing.T) {
	p := newPlugins(t)
	p.script("first", good("10.1.2.3"))
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"first"}`))
	require.NoError(t, r.add(t.Context()))
	require.NoError(t, os.Rename(filepath.Join(p.dir, "first"), filepath.Join(p.dir, "moved")))
	err := r.del(t.Context())
	require.ErrorContains(t, err, "failed to find plugin")
	require.True(t, errdefs.IsFailedPrecondition(err))
	require.False(t, r.attachment.Settled())
	require.NoError(t, os.Rename(filepath.Join(p.dir, "moved"), filepath.Join(p.dir, "first")))
	require.NoError(t, r.del(t.Context()))
}

// A plugin that has moved to a configured directory is found there, with the plugins that it
// delegates to.
func TestDelFindsMovedPlugin(t *testing.T) {
	p := newPlugins(t)
	p.script("first", good("10.1.2.3"))
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"first"}`))
	require.NoError(t, r.add(t.Context()))
	today := t.TempDir()
	require.NoError(t, os.Rename(filepath.Join(p.dir, "first"), filepath.Join(today, "first")))
	require.ErrorContains(t, r.del(t.Context()), "failed to find plugin")
	r.attachment.LookIn([]string{p.dir, today})
	require.NoError(t, r.del(t.Context()))
	require.Contains(t, r.read("first.DEL.env"), "CNI_PATH=/nonexistent:"+p.dir+":"+today+"\n")
}

// If the DEL of one plugin is written off, the other DELs run. A second write-off finds nothing.
func TestWriteOff(t *testing.T) {
	p := newPlugins(t)
	p.script("first", good("10.1.2.3"))
	p.script("second", good("10.1.2.3"))
	r := newRig(t, p, Config{}, network(t, "one", "1.0.0", `{"type":"first"}`, `{"type":"second"}`), network(t, "two", "1.0.0", `{"type":"second"}`))
	_, err := r.attachment.WriteOff(t.Context(), "second", "gone", r.record)
	require.True(t, errdefs.IsNotFound(err), "nothing was added")
	require.NoError(t, r.add(t.Context()))
	_, err = r.attachment.WriteOff(t.Context(), "second", "gone", r.record)
	require.True(t, errdefs.IsNotFound(err), "no DEL was tried")
	r.calls()
	require.NoError(t, os.Remove(filepath.Join(p.dir, "second")))
	require.Error(t, r.del(t.Context()))
	require.Equal(t, []string{"DEL first eth0"}, r.calls())

	_, err = r.attachment.WriteOff(t.Context(), "first", "gone", r.record)
	require.True(t, errdefs.IsNotFound(err))
	require.ErrorContains(t, err, `those that have one: ["one/second" "two/second"]`)
	r.ledger.fail = func(Progress) error { return errors.New("disk full") }
	_, err = r.attachment.WriteOff(t.Context(), "second", "gone", r.record)
	require.ErrorContains(t, err, "disk full")
	r.ledger.fail = nil

	written, err := r.attachment.WriteOff(t.Context(), "two/second", "gone", r.record)
	require.NoError(t, err)
	require.Equal(t, []string{"two/second"}, written)
	require.False(t, r.attachment.Settled())
	written, err = r.attachment.WriteOff(t.Context(), "second", "gone, too", r.record)
	require.NoError(t, err)
	require.Equal(t, []string{"one/second"}, written)
	require.True(t, r.attachment.Settled())
	require.NoError(t, r.del(t.Context()))
	require.Empty(t, r.calls())
	r.requireReplay(t)
	last := r.notes[len(r.notes)-1]
	require.Equal(t, Progress{Network: 0, Plugin: 1, Phase: Deleted, Command: WriteOff, Began: last.Began, Reason: "gone, too"}, last)
}

// A plugin that doesn't know the network's CNI version refuses ADD before it does anything, and
// refuses DEL, too: no DEL stays pending forever.
func TestPluginSpeaksAnotherVersion(t *testing.T) {
	p := newPlugins(t)
	const refusal = `echo '{"cniVersion":"0.4.0","code":1,"msg":"incompatible CNI versions"}'; exit 1`
	p.script("first", good("10.1.2.3"))
	p.script("second", refusal)
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"first"}`, `{"type":"second"}`))
	require.ErrorContains(t, r.add(t.Context()), `plugin type="second" name="net" failed (add): incompatible CNI versions`)
	require.NoError(t, r.del(t.Context()))
	require.True(t, r.attachment.Settled())
	require.Equal(t, []string{"ADD first eth0", "ADD second eth0", "DEL second eth0", "DEL first eth0"}, r.calls())

	p.script("second", "[ $CNI_COMMAND = ADD ] && echo '{\"cniVersion\":\"1.0.0\"}' && exit; "+refusal)
	r = newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"first"}`, `{"type":"second"}`))
	_ = r.add(t.Context())
	require.ErrorContains(t, r.del(t.Context()), "incompatible CNI versions", "it has done something")
	require.False(t, r.attachment.Settled())
}

func TestDelWithoutNetNS(t *testing.T) {
	for name, remove := range map[string]func(*testing.T, string){
		"gone": func(t *testing.T, path string) {
			require.NoError(t, unix.Unmount(path, unix.MNT_DETACH))
			require.NoError(t, os.Remove(path))
		},
		"mount point without a mount": func(t *testing.T, path string) { require.NoError(t, unix.Unmount(path, unix.MNT_DETACH)) },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlugins(t)
			p.script("first", good("10.1.2.3"))
			r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"first"}`))
			require.NoError(t, r.add(t.Context()))
			remove(t, r.attachment.NetNSPath)
			require.NoError(t, r.del(t.Context()))
			require.Contains(t, r.read("first.DEL.env"), fmt.Sprintf("CNI_NETNS=/proc/%d/fd/", os.Getpid()))
			require.True(t, r.attachment.Settled())
		})
	}
}

// The process's first thread never ends, and /proc/self/net is its network.
func TestEmptyNetNS(t *testing.T) {
	roottest.Require(t)
	before, err := os.Readlink("/proc/self/ns/net")
	require.NoError(t, err)
	for range 200 { // on the first thread, too, if it were up to the scheduler
		empty, err := emptyNetNS()
		require.NoError(t, err)
		made, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", empty.Fd()))
		require.NoError(t, err)
		require.NotEqual(t, before, made)
		require.NoError(t, empty.Close())
		now, err := os.Readlink("/proc/self/ns/net")
		require.NoError(t, err)
		require.Equal(t, before, now)
	}
}

// The DEL of a plugin that fails because the namespace is missing counts as done. Any other failure
// does not.
func TestDelWantsNetNS(t *testing.T) {
	fail := func(text string) string { return fmt.Sprintf("echo '{\"code\":7,\"msg\":%q}'; exit 1\n", text) }
	for name, test := range map[string]struct {
		empty, none string // what DEL does with an empty namespace, and without any
		runs        int
		text        string // of the error; "" for none
	}{
		"knows an empty one":         {"ip link show lo >/dev/null || exit 1; exit 0", "exit 1", 1, ""},
		"wants what was in there":    {fail("Link not found"), "exit 0", 2, ""},
		"wants a namespace":          {fail("lstat /run/netns/x: no such file or directory"), fail("failed to open netns: no such file or directory"), 2, ""},
		"wants its agent":            {fail("dial unix /x.sock: connection refused"), "exit 0", 1, "connection refused"},
		"wants its agent without it": {fail("Link not found"), fail("connection refused"), 2, "connection refused"},
		"its agent has no socket yet": {
			fail("Multus: failed to dial unix /run/multus/multus.sock: connect: no such file or directory"), "exit 0", 1, "multus.sock",
		},
		"its agent has written no file yet": {fail("stat /var/lib/calico/nodename: no such file or directory"), "exit 0", 1, "nodename"},
		"its file is missing, quoted":       {fail(`failed to open "/run/agent.json": no such file or directory`), "exit 0", 1, "agent.json"},
		"wants a link by its name":          {fail(`failed to find "eth0" in containerNS: Link eth0 not found`), fail("interface with name eth0 not found"), 2, ""},
		"wants its path":                    {fail(`namespace "/run/netns/x" not found`), fail("network namespace not found"), 2, ""},
		"wants a pool":                      {fail("ippool not found"), "exit 0", 1, "ippool"},
		"wants a page":                      {fail("unable to release the IP of interface eth0: 404 page not found"), "exit 0", 1, "404"},
		"wants a namespace of Kubernetes":   {fail(`namespaces "x" not found`), "exit 0", 1, "namespaces"},
		"wants a pod":                       {fail(`Multus: [default/x/]: error getting pod: pods "x" not found`), "exit 0", 1, "pods"},
		"wants a pool without it":           {fail("Link not found"), fail("ippool not found"), 2, "ippool"},
		"wants a sysctl of the namespace":   {fail("open /proc/sys/net/ipv4/conf/eth0/forwarding: no such file or directory"), "exit 0", 2, ""},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlugins(t)
			p.script("first", good("10.1.2.3"))
			r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"first"}`))
			require.NoError(t, r.add(t.Context()))
			require.NoError(t, unix.Unmount(r.attachment.NetNSPath, unix.MNT_DETACH))
			r.calls()
			p.script("first", "if [ -n \"$CNI_NETNS\" ]; then\n"+test.empty+"\nfi\n"+test.none)
			err := r.del(t.Context())
			require.Len(t, r.calls(), test.runs)
			require.Equal(t, test.text == "", r.attachment.Settled())
			r.requireReplay(t)
			if test.text != "" {
				require.ErrorContains(t, err, test.text)
				return
			}
			require.NoError(t, err)
		})
	}
}

// The error of a missing plugin or interpreter says nothing about the namespace: DEL stays pending.
func TestDelWithoutPluginAndNetNS(t *testing.T) {
	p := newPlugins(t)
	p.script("first", good("10.1.2.3"))
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"first"}`))
	require.NoError(t, r.add(t.Context()))
	require.NoError(t, unix.Unmount(r.attachment.NetNSPath, unix.MNT_DETACH))
	for _, spoil := range []func(file string) error{
		os.Remove,
		func(file string) error { return os.WriteFile(file, []byte("#!/no/such/interpreter\n"), 0o755) },
	} {
		require.NoError(t, spoil(filepath.Join(p.dir, "first")))
		require.Error(t, r.del(t.Context()))
		require.False(t, r.attachment.Settled())
	}
}

// All pods of a node are deleted at once: a bounded number of DELs runs at a time, in the order of
// arrival.
func TestDelsAreBounded(t *testing.T) {
	p := newPlugins(t)
	p.script("first", good("10.1.2.3"))
	rig := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"first"}`, `{"type":"first"}`))
	pods := make([]*Attachment, 2*maxDels)
	for i := range pods {
		a, err := NewAttachment(Config{BinDirs: []string{p.dir}}, rig.attachment.Networks, fmt.Sprintf("pod%d", i), rig.attachment.NetNSPath, nil, nil)
		require.NoError(t, err)
		a.Suspect()
		pods[i] = a
	}
	p.script("first", `mkdir $dir/running.$$; ls -d $dir/running.* | wc -l >> $dir/counts; sleep .2; rmdir $dir/running.$$; echo $CNI_CONTAINERID >> $dir/order`)
	var all sync.WaitGroup
	for _, a := range pods {
		all.Go(func() { assert.NoError(t, rig.driver.Del(t.Context(), a, rig.record)) })
	}
	all.Wait()
	most := 0
	for _, count := range strings.Fields(p.read("counts")) {
		n, err := strconv.Atoi(count)
		require.NoError(t, err)
		most = max(most, n)
	}
	require.LessOrEqual(t, most, maxDels)
	require.Greater(t, most, 1, "they run in parallel")
	first := map[string]bool{}
	for _, id := range strings.Fields(p.read("order"))[:len(pods)] {
		first[id] = true
	}
	require.Greater(t, len(first), len(pods)*3/4, "pods must not wait for the second DELs of other pods")
}

// A DEL that waits for other DELs ends with its caller.
func TestDelWaitsInVain(t *testing.T) {
	p := newPlugins(t)
	p.script("first", good("10.1.2.3"))
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"first"}`))
	require.NoError(t, r.add(t.Context()))
	for range maxDels {
		left, err := r.driver.dels.enter(t.Context(), "first")
		require.NoError(t, err)
		defer left()
	}
	other, err := r.driver.dels.enter(t.Context(), "second")
	require.NoError(t, err, "another plugin has a limit of its own")
	other()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	r.calls()
	err = r.del(ctx)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "waited for the DELs of other pods, of which 32 run at a time")
	require.Empty(t, r.calls())
}

func TestDelCanceled(t *testing.T) {
	p := newPlugins(t)
	p.script("first", good("10.1.2.3"))
	r := newRig(t, p, Config{}, network(t, "net", "1.0.0", `{"type":"first"}`))
	require.NoError(t, r.add(t.Context()))
	r.calls()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, r.del(ctx), context.Canceled)
	require.Empty(t, r.calls())
	require.Equal(t, "0.0 added!", r.phases()[2], "the outcome is recorded after the cancellation")
	require.False(t, r.attachment.Settled())
	require.NoError(t, r.del(t.Context()))
}

func TestVersions(t *testing.T) {
	p := newPlugins(t)
	// The plugin answers in another version, and without a version.
	p.script("first", `[ $CNI_COMMAND = ADD ] || exit 0
echo '{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","mtu":1}],"ips":[{"address":"10.1.2.3/24","interface":0}]}'`)
	p.script("second", `[ $CNI_COMMAND = ADD ] || exit 0
echo '{"interfaces":[{"name":"eth0"}],"ips":[{"version":"4","address":"10.1.2.4/24","interface":0}]}'`)
	for version, delHasResult := range map[string]bool{"0.3.1": false, "0.4.0": true, "1.0.0": true, "1.1.0": true} {
		t.Run(version, func(t *testing.T) {
			r := newRig(t, p, Config{}, network(t, "net", version, `{"type":"first"}`, `{"type":"second"}`))
			require.NoError(t, r.add(t.Context()))
			require.Equal(t, version, r.stdin("second", "ADD")["cniVersion"])
			require.Equal(t, version, r.stdin("second", "ADD")["prevResult"].(map[string]any)["cniVersion"])
			ip, _, err := r.attachment.IPs("")
			require.NoError(t, err)
			require.Equal(t, "10.1.2.4", ip)

			require.NoError(t, r.del(t.Context()))
			result, ok := r.stdin("first", "DEL")["prevResult"].(map[string]any)
			require.Equal(t, delHasResult, ok)
			if ok {
				require.Equal(t, version, result["cniVersion"])
			}
		})
	}
}

func TestNetworksInParallel(t *testing.T) {
	p := newPlugins(t)
	// Each plugin ends only when the other has started: opening a fifo waits for its other end.
	require.NoError(t, unix.Mkfifo(filepath.Join(p.dir, "meet"), 0o600))
	p.script("one", `[ $CNI_COMMAND = DEL ] || : > $dir/meet
`+good("10.1.2.3"))
	p.script("two", `[ $CNI_COMMAND = DEL ] || : < $dir/meet
`+good("10.9.9.9"))
	r := newRig(t, p, Config{}, network(t, "net1", "1.0.0", `{"type":"one"}`), network(t, "net2", "1.0.0", `{"type":"two"}`))
	require.NoError(t, r.add(t.Context()))
	require.ElementsMatch(t, []string{"ADD one eth0", "ADD two eth1"}, r.calls())

	result, err := r.attachment.GoCNIResult()
	require.NoError(t, err)
	require.Equal(t, "10.1.2.3", result.Interfaces["eth0"].IPConfigs[0].IP.String())
	require.Equal(t, "10.9.9.9", result.Interfaces["eth1"].IPConfigs[0].IP.String())
	ip, additional, err := r.attachment.IPs("")
	require.NoError(t, err)
	require.Equal(t, "10.1.2.3", ip)
	require.Empty(t, additional, "other networks' addresses aren't the pod's")

	require.NoError(t, r.del(t.Context()))
	require.Equal(t, []string{"DEL two eth1", "DEL one eth0"}, r.calls())
	r.requireReplay(t)
}

func TestNetworksFail(t *testing.T) {
	const fails = `[ $CNI_COMMAND = DEL ] || { echo "{\"msg\":\"$name is broken\"}"; exit 1; }`
	for name, test := range map[string]struct {
		serial bool
		added  []string
		texts  []string
	}{
		"serial":   {true, []string{"ADD one eth0"}, []string{"one is broken"}},
		"parallel": {false, []string{"ADD one eth0", "ADD two eth1"}, []string{"one is broken", "two is broken"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlugins(t)
			p.script("one", fails)
			p.script("two", fails)
			r := newRig(t, p, Config{Serial: test.serial}, network(t, "net1", "1.0.0", `{"type":"one"}`), network(t, "net2", "1.0.0", `{"type":"two"}`))
			err := r.add(t.Context())
			for _, text := range test.texts {
				require.ErrorContains(t, err, text)
			}
			require.ElementsMatch(t, test.added, r.calls())
			require.NoError(t, r.del(t.Context()))
			require.Len(t, r.calls(), len(test.added))
			require.True(t, r.attachment.Settled())
		})
	}
}

func TestDelGoesOnAfterNetwork(t *testing.T) {
	p := newPlugins(t)
	p.script("one", good("10.1.2.3"))
	p.script("two", `[ $CNI_COMMAND = DEL ] && exit 1
`+good("10.9.9.9"))
	r := newRig(t, p, Config{}, network(t, "net1", "1.0.0", `{"type":"one"}`), network(t, "net2", "1.0.0", `{"type":"two"}`))
	require.NoError(t, r.add(t.Context()))
	r.calls()
	require.Error(t, r.del(t.Context()))
	require.Equal(t, []string{"DEL two eth1", "DEL one eth0"}, r.calls())
	require.False(t, r.attachment.Settled())
	require.Equal(t, []Phase{Deleted, Added}, []Phase{r.attachment.Plugins[0].Phase, r.attachment.Plugins[1].Phase})
}

func TestBringUpLoopback(t *testing.T) {
	netns := newNetNS(t)
	require.False(t, loopbackIsUp(t, netns))
	for range 2 {
		require.NoError(t, BringUpLoopback(netns))
		require.True(t, loopbackIsUp(t, netns))
	}
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	require.ErrorContains(t, BringUpLoopback(file), file)
}

func TestAttachmentDataLoss(t *testing.T) {
	a, err := NewAttachment(Config{}, []Network{network(t, "net", "1.0.0", `{"type":"one"}`)}, "id", "/netns", nil, nil)
	require.NoError(t, err)
	for _, p := range []Progress{
		{Network: 1, Phase: Adding}, {Plugin: 1, Phase: Adding}, {Network: -1, Phase: Adding},
		{Phase: Added}, {Phase: Deleted}, {Phase: "unheard of"},
	} {
		require.True(t, errdefs.IsDataLoss(a.Apply(p)), "%v", p)
	}
	require.True(t, a.Settled())
	for _, phase := range []Phase{Adding, Added, Deleted} {
		require.NoError(t, a.Apply(Progress{Phase: phase}))
	}
	for _, phase := range []Phase{Pending, Adding, Added} {
		require.True(t, errdefs.IsDataLoss(a.Apply(Progress{Phase: phase})))
	}

	a.Plugins[0].Phase = Added
	broken := *a
	broken.Plugins = slices.Clone(a.Plugins)
	broken.Plugins[0].Result = []byte(`{"cniVersion":"x"}`)
	driver := newDriver(t, Options{})
	require.True(t, errdefs.IsDataLoss(driver.Del(t.Context(), &broken, nil)))
	broken.Networks = []Network{network(t, "net", "1.0.0", `{"type":"one"}`, `{"type":"two"}`)}
	require.True(t, errdefs.IsDataLoss(driver.Del(t.Context(), &broken, nil)))
	broken.Networks = []Network{{Conflist: []byte(`{`)}}
	require.True(t, errdefs.IsDataLoss(driver.Del(t.Context(), &broken, nil)))
}

func TestNewAttachmentInvalid(t *testing.T) {
	networks := []Network{network(t, "net", "1.0.0", `{"type":"one"}`)}
	for _, test := range []struct {
		id, netns string
		networks  []Network
		class     func(error) bool
	}{
		{"", "/netns", networks, errdefs.IsInvalidArgument},
		{"../id", "/netns", networks, errdefs.IsInvalidArgument},
		{"id", "", networks, errdefs.IsInvalidArgument},
		{"id", "/netns", nil, errdefs.IsInvalidArgument},
		{"id", "/netns", []Network{{Name: "x", Conflist: []byte(`{}`)}}, errdefs.IsFailedPrecondition},
	} {
		_, err := NewAttachment(Config{}, test.networks, test.id, test.netns, nil, nil)
		require.True(t, test.class(err), "%v", err)
	}
}
