package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/urfave/cli/v3"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

func bundleCommand() *cli.Command {
	return &cli.Command{
		Name:  "bundle",
		Usage: "write a tar.gz with what a bug report needs",
		Description: `The bundle has the output of status, version, doctor, ps, cleanups, ids, leaks and drain --dry-run. For each
sandbox that is in trouble or has failed, it also has the output of inspect and timeline. From the daemon's log, it has
podfsm's lines, and containerd's lines about requests for sandboxes. From containerd's configuration, it has the parts
that podfsm reads. It names the node's distribution, kernel, memory and load.

Environment variables, commands, labels and annotations of pods, credentials of registries and containers' output are
not in it. Names of pods, addresses, paths and error texts are: look through the bundle before you publish it.`,
		HideHelpCommand: true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "file", Usage: "write the bundle to this `FILE`; - is stdout; without it, podfsm-bundle-HOST-TIME.tar.gz", TakesFile: true},
			&cli.StringFlag{Name: "unit", Usage: "the systemd `UNIT` of the daemon, for its log", Value: "containerd.service"},
			&cli.DurationFlag{Name: "since", Usage: "how far back the log goes", Value: 24 * time.Hour},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := noArguments(cmd); err != nil {
				return err
			}
			now := time.Now()
			if cmd.String("file") == "-" {
				return writeBundle(ctx, cmd, cmd.Root().Writer, "podfsm-bundle", now)
			}
			return writeBundleFile(ctx, cmd, now)
		},
	}
}

func writeBundleFile(ctx context.Context, cmd *cli.Command, now time.Time) error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	name := fmt.Sprintf("podfsm-bundle-%s-%s", host, now.UTC().Format("20060102T150405Z"))
	path := cmd.String("file")
	if path == "" {
		path = name + ".tar.gz"
	}
	var b bytes.Buffer
	if err := writeBundle(ctx, cmd, &b, name, now); err != nil {
		return err
	}
	if err := replaceFile(path, b.Bytes(), 0o600); err != nil {
		return fmt.Errorf("failed to write bundle %q: %w", path, err)
	}
	_, err = fmt.Fprintln(cmd.Root().Writer, path)
	return err
}

// bundle is a bug report in the making.
type bundle struct {
	cmd   *cli.Command
	files *tar.Writer
	dir   string
	now   time.Time
}

// writeBundle writes the parts of the bundle below the directory dir. If a part is not available,
// the reason replaces it.
func writeBundle(ctx context.Context, cmd *cli.Command, w io.Writer, dir string, now time.Time) error {
	packed := gzip.NewWriter(w)
	b := &bundle{cmd: cmd, files: tar.NewWriter(packed), dir: dir, now: now}
	for _, name := range slices.Sorted(maps.Keys(bundled)) {
		if err := b.addCommand(ctx, name, bundled[name]...); err != nil {
			return err
		}
	}
	for _, add := range []func(context.Context) error{b.addSandboxes, b.addConfig, b.addNode, b.addLog} {
		if err := add(ctx); err != nil {
			return err
		}
	}
	return errors.Join(b.files.Close(), packed.Close())
}

// bundled are the commands whose output goes into a bundle.
var bundled = map[string][]string{
	"status.txt":     {"status"},
	"version.json":   {"version", "-o", "json"},
	"doctor.txt":     {"doctor"},
	"ps.txt":         {"ps", "--all", "-o", "wide"},
	"ps.json":        {"ps", "--all", "-o", "json"},
	"cleanups.txt":   {"cleanups", "list"},
	"ids.json":       {"ids", "-o", "json"},
	"leaks.txt":      {"leaks", "--timeout", "1m"},
	"drain-plan.txt": {"drain", "--dry-run"},
}

// addCommand adds the output of podfsm with these arguments, and its complaints below.
func (b *bundle) addCommand(ctx context.Context, name string, args ...string) error {
	p := locate(ctx, b.cmd)
	global := []string{"podfsm", "--config", b.cmd.String("config"), "--address", p.address, "--root-dir", p.root, "--state-dir", p.state,
		"--timeout", b.cmd.Duration("timeout").String()}
	// A context without values: those of ctx would make this command a subcommand of the running
	// one.
	fresh, cancel := context.WithCancel(context.Background())
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	var out, complaints bytes.Buffer
	if err := program(&out, &complaints).Run(fresh, append(global, args...)); err != nil {
		complain(&complaints, "%v\nexit status %d", err, exitStatus(err))
	}
	if err := b.add(name, out.Bytes()); err != nil || complaints.Len() == 0 {
		return err
	}
	return b.add(name+".stderr", complaints.Bytes())
}

// addSandboxes adds each sandbox that is in trouble or whose creation failed.
func (b *bundle) addSandboxes(ctx context.Context) error {
	response, err := list(ctx, b.cmd, true)
	if err != nil {
		return nil // ps.txt.stderr has the reason
	}
	for _, s := range response.GetSandboxes() {
		if !ofInterest(s) {
			continue
		}
		if err := b.addCommand(ctx, "sandboxes/"+s.GetId()+".json", "inspect", s.GetId()); err != nil {
			return err
		}
		if err := b.addCommand(ctx, "sandboxes/"+s.GetId()+".txt", "timeline", s.GetId()); err != nil {
			return err
		}
	}
	return nil
}

func ofInterest(s *podfsmv1.Sandbox) bool {
	c := conditionOf(s)
	return c == inTrouble || c == notReady || c == underway || s.GetFailedStep() != ""
}

// addConfig adds the sections of containerd's configuration that podfsm reads. They have no
// credentials.
func (b *bundle) addConfig(ctx context.Context) error {
	p := locate(ctx, b.cmd)
	if p.unread != nil {
		return b.add("config.toml.stderr", []byte(p.unread.Error()+"\n"))
	}
	read := map[string]any{"version": p.config.Version, "root": p.root, "state": p.state, "disabled_plugins": p.config.DisabledPlugins, "imports": p.config.Imports}
	sections := map[string]any{}
	for _, name := range []string{runtimeSection, podfsmSection} {
		if section, ok := p.config.Plugins[name]; ok {
			sections[name] = section
		}
	}
	read["plugins"] = sections
	text, err := toml.Marshal(read)
	if err != nil {
		return fmt.Errorf("failed to write containerd's configuration: %w", err)
	}
	return b.add("config.toml", text)
}

// nodeFiles are files that describe the node.
var nodeFiles = []string{"/etc/os-release", "/proc/version", "/proc/meminfo", "/proc/loadavg"}

func (b *bundle) addNode(context.Context) error {
	for _, path := range nodeFiles {
		text, err := os.ReadFile(path)
		if err != nil {
			text = []byte(err.Error() + "\n")
		}
		if err := b.add("node"+path, text); err != nil {
			return err
		}
	}
	return nil
}

// ownMessages are the formats of the messages that podfsm logs, one per line. TestMessagesOfTheBundle
// writes them from the code.
//
//go:embed messages.txt
var ownMessages string

var (
	formatted = regexp.MustCompile(`%[a-z]`) // a value in a format
	quotedMsg = regexp.MustCompile(` msg=("(?:[^"\\]|\\.)*")`)
)

// bundledMessage matches podfsm's messages, and those of containerd about a request for a sandbox. The
// other lines of containerd may hold secrets of pods, so no field of a line lets it into a bundle. Only
// a bundle needs it, so other commands don't compile it.
var bundledMessage = sync.OnceValue(func() *regexp.Regexp {
	var own []string
	for format := range strings.Lines(ownMessages) {
		own = append(own, formatted.ReplaceAllString(regexp.QuoteMeta(strings.TrimSpace(format)), ".*"))
	}
	return regexp.MustCompile(`(?s)^((` + strings.Join(own, "|") + `)$|(Run|Stop|Remove)PodSandbox for )`)
})

// messageOf returns the message of a line of the log, in either of containerd's formats. It is "" for
// other lines.
func messageOf(line string) string {
	var entry struct {
		Message string `json:"msg"`
	}
	if at := strings.Index(line, "{"); at >= 0 && json.Unmarshal([]byte(line[at:]), &entry) == nil {
		return entry.Message
	}
	if found := quotedMsg.FindStringSubmatch(line); found != nil {
		if message, err := strconv.Unquote(found[1]); err == nil {
			return message
		}
	}
	return ""
}

func (b *bundle) addLog(ctx context.Context) error {
	var log bytes.Buffer
	query := journalQuery{unit: b.cmd.String("unit"), since: b.now.Add(-b.cmd.Duration("since"))}
	if err := journalOf(ctx, query, func(lines io.Reader) error { return keepBundled(&log, lines) }); err != nil {
		return b.add("daemon.log.stderr", []byte(err.Error()+"\n"))
	}
	return b.add("daemon.log", log.Bytes())
}

// keepBundled writes the lines of a log that a bundle may contain.
func keepBundled(w io.Writer, log io.Reader) error {
	return eachLine(log, func(line string) error {
		if !bundledMessage().MatchString(messageOf(line)) {
			return nil
		}
		_, err := fmt.Fprintln(w, line)
		return err
	})
}

func (b *bundle) add(name string, text []byte) error {
	header := &tar.Header{Name: b.dir + "/" + strings.TrimPrefix(name, "/"), Mode: 0o600, Size: int64(len(text)), ModTime: b.now, Typeflag: tar.TypeReg}
	if err := b.files.WriteHeader(header); err != nil {
		return err
	}
	_, err := b.files.Write(text)
	return err
}
