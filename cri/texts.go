package cri

import (
	"regexp"
	"strings"
)

// varying are the parts of error texts that differ from try to try, and what replaces them. They derive from the
// sandbox's id, or the kernel counts them up.
var varying = []struct {
	pattern *regexp.Regexp
	fixed   string
}{
	{regexp.MustCompile(`\bCNI-(?:[A-Z]+-)?[0-9a-f]{20,}`), "CNI-CHAIN"}, // iptables: a hash of network and sandbox
	{regexp.MustCompile(`\bveth[0-9a-f]{8}\b`), "VETH"},
	{regexp.MustCompile(`\bbwp[0-9a-f]{12}\b`), "IFB"}, // the bandwidth plugin's interface: likewise
	{regexp.MustCompile(`\b(process|pid|shim) \d+`), "$1 PID"},
	{regexp.MustCompile(`/proc/\d+`), "/proc/PID"},
	{regexp.MustCompile(`\b402\d{7}\b`), "INODE"}, // of a namespace: they begin at 0xF0000000
	{regexp.MustCompile(`/snapshots/\d+`), "/snapshots/N"},
	{regexp.MustCompile(`\bcontainerd-mount\d+`), "containerd-mount"},
}

// The error of a failed iptables command has all its arguments, the pod's address among them. Addresses elsewhere
// are the network's, which help to find the cause.
var (
	command = regexp.MustCompile(`running \[.*?\]: exit status`)
	address = regexp.MustCompile(`\b\d+\.\d+\.\d+\.\d+\b|\b[0-9a-f]{1,4}:[0-9a-f:]*:[0-9a-f:]*[0-9a-f]\b`)
)

// sandboxError is an error about one sandbox. Its text is that of the error itself, which may have the sandbox's id.
type sandboxError struct {
	error
	id string
}

func (e *sandboxError) Unwrap() error { return e.error }

// aboutSandbox marks err as an error about a sandbox, from the front to [retries]. Without an id, it returns err.
func aboutSandbox(id string, err error) error {
	if id == "" {
		return err
	}
	return &sandboxError{err, id}
}

// unmark returns the error that aboutSandbox marked, and the sandbox's id; "" for an error without a mark. Spans show
// the type of the error itself.
func unmark(err error) (id string, _ error) {
	if about, ok := err.(*sandboxError); ok {
		return about.id, about.error
	}
	return "", err
}

// constant returns err with a text that is the same from try to try, because the kubelet aggregates events by
// text. The class stays. The log and the span have the original text. id is that of the sandbox that err is about;
// "" for none.
func constant(err error, id string) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	if id != "" {
		text = strings.ReplaceAll(text, id, "ID")
	}
	for _, v := range varying {
		text = v.pattern.ReplaceAllString(text, v.fixed)
	}
	text = command.ReplaceAllStringFunc(text, func(run string) string { return address.ReplaceAllString(run, "IP") })
	if text == err.Error() {
		return err
	}
	return &reworded{err, text}
}

// reworded is an error with another text.
type reworded struct {
	error
	text string
}

func (r *reworded) Error() string { return r.text }

func (r *reworded) Unwrap() error { return r.error }
