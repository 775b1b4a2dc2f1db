package cri

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

// holdTornDown is ctx with a logger that holds back the line by which containerd's service says that a pod is off its network: it takes
// a pod of ours for one on the node's network, and says so before DEL has run. say logs that line, if there was one.
//
// The logger of a context keeps the context that it was given with, so hooks see the span of ctx, and not those that containerd's service
// starts below that.
func holdTornDown(ctx context.Context, id string) (_ context.Context, say func()) {
	entry := log.G(ctx).Dup()
	held := &holding{to: entry.Logger, text: fmt.Sprintf("TearDown network for sandbox %q successfully", id)}
	entry.Logger = &logrus.Logger{
		Out:       io.Discard,
		Formatter: held,
		Level:     held.to.GetLevel(),
		ExitFunc:  held.to.ExitFunc,
	}
	return log.WithLogger(ctx, entry), func() {
		if held.back.Load() {
			log.G(ctx).Info(held.text)
		}
	}
}

// holding passes all entries but those of one text to a logger, whose lock, hooks and format these are for.
type holding struct {
	to   *logrus.Logger
	text string
	back atomic.Bool // there was one
}

// Format implements logrus.Formatter, and leaves nothing to write.
func (h *holding) Format(entry *logrus.Entry) ([]byte, error) {
	if entry.Message == h.text {
		h.back.Store(true)
		return nil, nil
	}
	passed := &logrus.Entry{Logger: h.to, Data: entry.Data, Time: entry.Time, Context: entry.Context}
	passed.Log(entry.Level, entry.Message)
	return nil, nil
}
