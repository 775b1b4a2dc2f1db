package cri

import (
	"regexp"
	"strings"
)

// varying are the parts of errors that differ from try to try, because they derive from the sandbox's id or are given out one after the
// other, with what stands for them.
var varying = []struct {
	pattern *regexp.Regexp
	fixed   string
}{
	{regexp.MustCompile(`\bCNI-(?:[A-Z]+-)?[0-9a-f]{20,}`), "CNI-CHAIN"}, // of iptables: a hash of network and sandbox
	{regexp.MustCompile(`\bveth[0-9a-f]{8}\b`), "VETH"},
	{regexp.MustCompile(`\bbwp[0-9a-f]{12}\b`), "IFB"}, // the bandwidth plugin's interface: likewise
	{regexp.MustCompile(`\b(process|pid|shim) \d+`), "$1 PID"},
	{regexp.MustCompile(`/proc/\d+`), "/proc/PID"},
	{regexp.MustCompile(`\b402\d{7}\b`), "INODE"}, // of a namespace: they begin at 0xF0000000
	{regexp.MustCompile(`/snapshots/\d+`), "/snapshots/N"},
	{regexp.MustCompile(`\bcontainerd-mount\d+`), "containerd-mount"},
}

// An iptables command that failed is in the error with all its arguments, the pod's address among them. Elsewhere addresses are the
// network's, and say something.
var (
	command = regexp.MustCompile(`running \[.*?\]: exit status`)
	address = regexp.MustCompile(`\b\d+\.\d+\.\d+\.\d+\b|\b[0-9a-f]{1,4}:[0-9a-f:]*:[0-9a-f:]*[0-9a-f]\b`)
)

// constant is err with a text that is the same for each try at the same thing: the kubelet aggregates events by their texts. Its class
// stays. The text as it was is in the log and on the span. id is that of the sandbox it is about; "" for none.
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
