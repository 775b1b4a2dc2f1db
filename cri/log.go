package cri

import (
	"context"
	"fmt"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

// tornDown is the line by which containerd's service says that a pod is off its network.
func tornDown(id string) string {
	return fmt.Sprintf("TearDown network for sandbox %q successfully", id)
}

// untornDown is ctx with a logger that leaves that line out. containerd's service takes a pod of ours for one on the node's network,
// and would say so before DEL has run.
func untornDown(ctx context.Context, id string) context.Context {
	entry := log.G(ctx).Dup()
	all := entry.Logger
	entry.Logger = &logrus.Logger{
		Out:          all.Out,
		Hooks:        all.Hooks,
		Formatter:    &omitting{all.Formatter, tornDown(id)},
		ReportCaller: all.ReportCaller,
		Level:        all.GetLevel(),
		ExitFunc:     all.ExitFunc,
	}
	return log.WithLogger(ctx, entry)
}

// omitting formats all entries but those of one text.
type omitting struct {
	logrus.Formatter
	text string
}

// Format implements logrus.Formatter.
func (o *omitting) Format(entry *logrus.Entry) ([]byte, error) {
	if entry.Message == o.text {
		return nil, nil
	}
	return o.Formatter.Format(entry)
}
