package cri

import (
	"errors"
	"regexp"
	"strings"
)

// failure is an error of a sandbox that has an id.
type failure struct {
	error
	id string
}

func (f *failure) Unwrap() error { return f.error }

// varying are the parts of errors that differ from try to try, with what stands for them.
var varying = []struct {
	pattern *regexp.Regexp
	fixed   string
}{
	{regexp.MustCompile(`\bveth[0-9a-f]{8}\b`), "veth"},
}

// constant is err with a text that is the same for each try at the same thing: the kubelet aggregates events by their texts. Its class
// stays.
func constant(err error) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	if f := (*failure)(nil); errors.As(err, &f) && f.id != "" {
		text = strings.ReplaceAll(text, f.id, "ID")
	}
	for _, v := range varying {
		text = v.pattern.ReplaceAllString(text, v.fixed)
	}
	if text == err.Error() {
		return err
	}
	return &redacted{err, text}
}
