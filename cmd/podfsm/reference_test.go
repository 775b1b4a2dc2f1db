package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cpuguy83/go-md2man/v2/md2man"
	"github.com/stretchr/testify/require"
	"github.com/urfave/cli/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

// The pages that are generated from the commands and the API definition.
const (
	referencePage = "../../docs/reference/cli.md"
	manPage       = "../../deploy/man/podfsm.8"
	completions   = "../../deploy/completion/"
)

// TestReference fails while the pages are stale. go generate writes them with -update.
func TestReference(t *testing.T) {
	t.Setenv("CONTAINERD_ADDRESS", "")
	manual := md2man.Render([]byte(manText(t)))
	for path, want := range map[string][]byte{
		referencePage: []byte(referenceText(t)), manPage: manual,
		completions + "podfsm.bash": completion(t, "bash"), completions + "podfsm.zsh": completion(t, "zsh"), completions + "podfsm.fish": completion(t, "fish"),
	} {
		if *update {
			require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
			require.NoError(t, os.WriteFile(path, want, 0o644))
		}
		got, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, string(want), string(got), "run go generate ./cmd/podfsm")
	}
}

// completion returns the completion script of a shell.
func completion(t *testing.T, shell string) []byte {
	out, err := podfsm(t, "completion", shell)
	require.NoError(t, err)
	require.NotEmpty(t, out)
	return []byte(out)
}

func TestCompletion(t *testing.T) {
	address := serve(t, fakeSandboxes{ended: []*podfsmv1.Sandbox{crashed.GetSandbox()}})
	for want, args := range map[string][]string{
		"default/slow\ndefault/web\nff00ff00ff00ff00\n": {"describe"},
		"retry:":       {"cleanups"},
		"--no-headers": {"ps", "--no"},
	} {
		out, err := podfsm(t, append(append([]string{"--address", address}, args...), "--generate-shell-completion")...)
		require.NoError(t, err)
		require.Contains(t, out, want, "%q", args)
	}
	out, _, code := runProgram(t, "--generate-shell-completion")
	require.Zero(t, code)
	require.Contains(t, out, "timeline:")
}

// Every command and flag has an explanation.
func TestEveryCommandIsExplained(t *testing.T) {
	for _, c := range commandsBelow(tree(t)) {
		require.NotEmpty(t, c.Usage, c.FullName())
		for _, flag := range c.VisibleFlags() {
			require.NotEmpty(t, flag.(cli.DocGenerationFlag).GetUsage(), "%s %s", c.FullName(), flag.Names()[0])
		}
		_, printsJSON := outputs[c.FullName()]
		writesJSON := slices.ContainsFunc(c.Flags, func(f cli.Flag) bool {
			return f.Names()[0] == "output" && strings.Contains(f.(cli.DocGenerationFlag).GetUsage(), "json")
		})
		require.Equal(t, writesJSON || c.Name == "inspect", printsJSON, "%s: the message of its JSON", c.FullName())
	}
}

// tree returns the program after its setup, which sets the parents of commands.
func tree(t *testing.T) *cli.Command {
	root := program(io.Discard, io.Discard)
	require.NoError(t, root.Run(t.Context(), []string{"podfsm", "--help"}))
	return root
}

// commandsBelow returns all commands in the help, each before its subcommands.
func commandsBelow(root *cli.Command) (all []*cli.Command) {
	for _, c := range root.Commands {
		if c.Hidden || c.Name == "help" || c.Name == "completion" {
			continue
		}
		all = append(append(all, c), commandsBelow(c)...)
	}
	return all
}

const (
	intro = `podfsm asks the daemon on containerd's socket. While the daemon is down, most commands read its ledger, and say so on
stderr.

**REF** is a pod's ` + "`namespace/name`" + ` or name, a sandbox id or its beginning. Of several sandboxes of one pod, the newest
counts. Sandboxes that have ended are found, too: the last 200, failed creations among them.

Every command finds the socket and containerd's directories by containerd's configuration. Flags before or after the
command, and CONTAINERD_ADDRESS, overrule the configuration.

On a terminal, rows of sandboxes in trouble are red or yellow. NO_COLOR turns colours off.

` + "`podfsm completion bash`" + `, ` + "`zsh`" + ` or ` + "`fish`" + ` prints a script for the shell's completion. The packages install these scripts.`
	generatedNote = "<!-- Written by go generate ./cmd/podfsm. Change the commands, or the API's definition. -->"
)

func referenceText(t *testing.T) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# podfsm: the command line\n\n%s\n\n", generatedNote)
	addText(&b, intro)
	root := tree(t)
	b.WriteString("| command | what it does |\n|---|---|\n")
	for _, c := range commandsBelow(root) {
		fmt.Fprintf(&b, "| [`%s`](#%s) | %s |\n", c.FullName(), strings.ReplaceAll(c.FullName(), " ", "-"), c.Usage)
	}
	b.WriteString("\n## Flags of all commands\n\n")
	addFlags(&b, root.VisibleFlags())
	b.WriteString("## Exit status\n\n")
	addExitStatuses(&b)
	for _, c := range commandsBelow(root) {
		addCommand(&b, c, "## ")
		if message, ok := outputs[c.FullName()]; ok {
			name := string(message.ProtoReflect().Descriptor().Name())
			fmt.Fprintf(&b, "JSON: [%s](#%s)%s.\n\n", name, strings.ToLower(name), map[bool]string{true: ", one per line"}[c.Name == "watch"])
		}
	}
	addJSON(t, &b)
	return strings.TrimRight(b.String(), "\n") + "\n"
}

func manText(t *testing.T) string {
	var b strings.Builder
	root := tree(t)
	fmt.Fprintf(&b, "podfsm 8 \"\" \"podfsm\" \"System administration\"\n===\n\n# NAME\n\npodfsm - %s\n\n# SYNOPSIS\n\n**podfsm** [flags] command [flags] [arguments]\n\n# DESCRIPTION\n\n", root.Usage)
	addText(&b, intro)
	b.WriteString("# FLAGS OF ALL COMMANDS\n\n")
	addFlags(&b, root.VisibleFlags())
	b.WriteString("# COMMANDS\n\n")
	for _, c := range commandsBelow(root) {
		addCommand(&b, c, "## ")
	}
	b.WriteString("# EXIT STATUS\n\n")
	for _, s := range exitStatuses {
		fmt.Fprintf(&b, "**%d**: %s\n\n", s.status, s.meaning)
	}
	b.WriteString("# SEE ALSO\n\n**containerd**(8), **ctr**(8), **journalctl**(1); the pages below /usr/share/doc/podfsm, which have the fields of all JSON\n")
	return b.String()
}

func addCommand(b *strings.Builder, c *cli.Command, heading string) {
	fmt.Fprintf(b, "%s%s\n\n", heading, c.FullName())
	if c.ArgsUsage != "" {
		fmt.Fprintf(b, "`%s [flags] %s`\n\n", c.FullName(), c.ArgsUsage)
	}
	addText(b, strings.ToUpper(c.Usage[:1])+c.Usage[1:]+".")
	addText(b, strings.TrimPrefix(c.Description, refDescription))
	var own []cli.Flag
	for _, flag := range c.VisibleFlags() {
		if flag.Names()[0] != "help" {
			own = append(own, flag)
		}
	}
	addFlags(b, own)
}

// addText adds paragraphs. Lines with commands become examples.
func addText(b *strings.Builder, text string) {
	for paragraph := range strings.SplitSeq(strings.TrimSpace(text), "\n\n") {
		switch {
		case paragraph == "":
		case strings.HasPrefix(paragraph, "podfsm "+strings.ToLower(paragraph[7:8])) && strings.Count(paragraph, "  ") > 0:
			fmt.Fprintf(b, "```\n%s\n```\n\n", paragraph)
		default:
			fmt.Fprintf(b, "%s\n\n", strings.Join(wrapped(paragraph, 100), "\n"))
		}
	}
}

func addFlags(b *strings.Builder, flags []cli.Flag) {
	for _, flag := range flags {
		names, usage, _ := strings.Cut(flag.String(), "\t")
		for i, line := range wrapped(fmt.Sprintf("- `%s`: %s", names, usage), 98) {
			if i > 0 {
				line = "  " + line
			}
			fmt.Fprintln(b, line)
		}
	}
	if len(flags) > 0 {
		fmt.Fprintln(b)
	}
}

func addExitStatuses(b *strings.Builder) {
	b.WriteString("| status | meaning |\n|---|---|\n")
	for _, s := range exitStatuses {
		fmt.Fprintf(b, "| %d | %s |\n", s.status, s.meaning)
	}
	b.WriteString("\n")
}

// outputs are the messages that commands write as JSON.
var outputs = map[string]proto.Message{
	"podfsm status":        &podfsmv1.StatusResponse{},
	"podfsm ps":            &podfsmv1.ListResponse{},
	"podfsm watch":         &podfsmv1.SandboxTransition{},
	"podfsm inspect":       &podfsmv1.InspectResponse{},
	"podfsm timeline":      &podfsmv1.TimelineOutput{},
	"podfsm cleanups":      &podfsmv1.ListResponse{},
	"podfsm cleanups list": &podfsmv1.ListResponse{},
	"podfsm leaks":         &podfsmv1.LeaksResponse{},
	"podfsm ids":           &podfsmv1.IDsResponse{},
	"podfsm doctor":        &podfsmv1.DoctorResponse{},
	"podfsm drain":         &podfsmv1.DrainOutput{},
	"podfsm version":       &podfsmv1.VersionOutput{},
}

// addJSON adds the fields of all messages that commands write.
func addJSON(t *testing.T, b *strings.Builder) {
	b.WriteString("## JSON\n\n")
	addText(b, `The messages are those of the API, in protobuf's JSON mapping: a field without a value has its zero value, and a message or
time that is absent is left out. Later releases add fields; see [Compatibility](../compatibility.md).`)
	comments := protoComments(t)
	var all []protoreflect.MessageDescriptor
	for _, message := range outputs {
		all = reachable(all, message.ProtoReflect().Descriptor())
	}
	slices.SortFunc(all, func(x, y protoreflect.MessageDescriptor) int {
		return strings.Compare(string(x.Name()), string(y.Name()))
	})
	for _, message := range all {
		fmt.Fprintf(b, "### %s\n\n| field | type | meaning |\n|---|---|---|\n", message.Name())
		for i := range message.Fields().Len() {
			field := message.Fields().Get(i)
			require.NotEmpty(t, comments[string(field.FullName())], field.FullName())
			fmt.Fprintf(b, "| `%s` | %s | %s |\n", field.JSONName(), typeOf(field), strings.ReplaceAll(comments[string(field.FullName())], "|", `\|`))
		}
		b.WriteString("\n")
	}
}

// reachable adds a message and the messages of its fields.
func reachable(all []protoreflect.MessageDescriptor, message protoreflect.MessageDescriptor) []protoreflect.MessageDescriptor {
	if slices.Contains(all, message) {
		return all
	}
	all = append(all, message)
	for i := range message.Fields().Len() {
		if field := message.Fields().Get(i); field.Message() != nil && !field.IsMap() && field.Message().ParentFile().Package() == message.ParentFile().Package() {
			all = reachable(all, field.Message())
		}
	}
	return all
}

// typeOf returns the type of a field in JSON.
func typeOf(field protoreflect.FieldDescriptor) string {
	switch {
	case field.IsMap():
		return "object of " + field.MapValue().Kind().String() + "s by name"
	case field.IsList():
		return "list of " + nameOfType(field)
	default:
		return nameOfType(field)
	}
}

func nameOfType(field protoreflect.FieldDescriptor) string {
	switch field.Kind() {
	case protoreflect.MessageKind:
		switch name := string(field.Message().Name()); name {
		case "Timestamp":
			return "time, RFC 3339"
		case "Duration":
			return "seconds, as `\"0.250s\"`"
		default:
			return fmt.Sprintf("[%s](#%s)", name, strings.ToLower(name))
		}
	case protoreflect.Uint64Kind:
		return "number, as a string"
	case protoreflect.Uint32Kind:
		return "number"
	case protoreflect.BoolKind:
		return "true or false"
	default:
		return field.Kind().String()
	}
}

// protoComments returns the comments of the API's fields by the full names of the fields.
func protoComments(t *testing.T) map[string]string {
	comments := map[string]string{}
	message, field := regexp.MustCompile(`^message (\w+) \{`), regexp.MustCompile(`^  (?:repeated )?\S.* (\w+) = \d+;`)
	for _, name := range []string{"podfsm", "output"} {
		text, err := os.ReadFile("../../api/podfsm/v1/" + name + ".proto")
		require.NoError(t, err)
		var in string
		var comment []string
		for line := range bytes.Lines(text) {
			line := strings.TrimRight(string(line), "\n")
			switch m := message.FindStringSubmatch(line); {
			case m != nil:
				in, comment = m[1], nil
			case strings.HasPrefix(line, "  // "):
				comment = append(comment, strings.TrimPrefix(line, "  // "))
			default:
				if m := field.FindStringSubmatch(line); m != nil {
					comments["podfsm.v1."+in+"."+m[1]] = strings.Join(comment, " ")
				}
				comment = nil
			}
		}
	}
	return comments
}
