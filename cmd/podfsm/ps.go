package main

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/records"
)

// shortID is how many characters of a sandbox id a table shows: as many as
// crictl, enough to be unique on a node.
const shortID = records.ShortID

func writeList(w io.Writer, sandboxes []*podfsmv1.Sandbox, all, wide bool, now time.Time) error {
	header := []string{"SANDBOX", "POD", "STATE", "SINCE", "STEP", "IP"}
	if all || wide {
		header = append(header, "ATTEMPT")
	}
	if all {
		header = append(header, "FAILED STEP")
	}
	if wide {
		header = append(header, "AGE", "NAMESPACE", "HANDLER", "PID", "UIDS", "OWED", "TRACE", "ERROR")
	}
	var b bytes.Buffer
	t := newTable(&b, header...)
	for _, s := range sandboxes {
		cells := []string{shorten(s.GetId()), podOf(s), stateOf(s), age(s.GetSince(), now), s.GetStep(), s.GetIp()}
		if all || wide {
			cells = append(cells, strconv.FormatUint(uint64(s.GetAttempt()), 10))
		}
		if all {
			cells = append(cells, s.GetFailedStep())
		}
		if wide {
			cells = append(cells,
				age(s.GetCreatedAt(), now),
				s.GetContainerdNamespace(),
				s.GetRuntimeHandler(),
				pidOf(s),
				mappings(s.GetUserns().GetUids()),
				strconv.Itoa(len(s.GetDebts())),
				s.GetTraceId(),
				s.GetError())
		}
		t.row(cells...)
	}
	t.flush()
	_, err := w.Write(b.Bytes())
	return err
}

func shorten(id string) string {
	if len(id) > shortID {
		return id[:shortID]
	}
	return id
}

// podOf is the pod's "namespace/name", empty for a sandbox made without the CRI.
func podOf(s *podfsmv1.Sandbox) string {
	if s.GetPodName() == "" {
		return ""
	}
	return s.GetPodNamespace() + "/" + s.GetPodName()
}

func stateOf(s *podfsmv1.Sandbox) string {
	if s.GetGoal() == "" {
		return s.GetState()
	}
	return fmt.Sprintf("%s->%s", s.GetState(), s.GetGoal())
}

func pidOf(s *podfsmv1.Sandbox) string {
	if s.GetPid() == 0 {
		return ""
	}
	return strconv.FormatUint(uint64(s.GetPid()), 10)
}

// mappings writes each mapping as container_id:host_id:length.
func mappings(ms []*podfsmv1.IDMapping) string {
	texts := make([]string, 0, len(ms))
	for _, m := range ms {
		texts = append(texts, fmt.Sprintf("%d:%d:%d", m.GetContainerId(), m.GetHostId(), m.GetLength()))
	}
	return strings.Join(texts, ",")
}
