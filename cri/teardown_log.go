package cri

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

// holdTornDown returns ctx with a logger that holds back one line. containerd's service takes the pod for one on the
// node's network. So it logs that the pod is off its network before podfsm runs DEL. say logs that line, if the
// service logged it.
//
// A context's logger keeps the context that it was made with. So hooks see the span of ctx, not the spans that
// containerd's service starts below it.
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

// holding passes all entries except those of one text to a logger, with its lock, hooks and format.
type holding struct {
	to   *logrus.Logger
	text string
	back atomic.Bool // the text was logged
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
