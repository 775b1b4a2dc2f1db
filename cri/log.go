package cri

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

// holdTornDown is ctx with a logger that holds back the line by which containerd's service says that a pod is off its network: it takes
// a pod of ours for one on the node's network, and says so before DEL has run. say logs that line, if there was one.
func holdTornDown(ctx context.Context, id string) (_ context.Context, say func()) {
	entry := log.G(ctx).Dup()
	all := entry.Logger
	held := &holding{Formatter: all.Formatter, text: fmt.Sprintf("TearDown network for sandbox %q successfully", id)}
	entry.Logger = &logrus.Logger{
		Out:          all.Out,
		Hooks:        all.Hooks,
		Formatter:    held,
		ReportCaller: all.ReportCaller,
		Level:        all.GetLevel(),
		ExitFunc:     all.ExitFunc,
	}
	return log.WithLogger(ctx, entry), func() {
		if held.back.Load() {
			log.G(ctx).Info(held.text)
		}
	}
}

// holding formats all entries but those of one text.
type holding struct {
	logrus.Formatter
	text string
	back atomic.Bool // there was one
}

// Format implements logrus.Formatter.
func (h *holding) Format(entry *logrus.Entry) ([]byte, error) {
	if entry.Message == h.text {
		h.back.Store(true)
		return nil, nil
	}
	return h.Formatter.Format(entry)
}
