package main

import (
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

var (
	begin = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	now   = begin.Add(5*time.Minute + 12*time.Second)
)

func at(offset time.Duration) *timestamppb.Timestamp {
	return timestamppb.New(begin.Add(offset))
}

func took(d time.Duration) *durationpb.Duration {
	return durationpb.New(d)
}

func mapping(hostID uint32) []*podfsmv1.IDMapping {
	return []*podfsmv1.IDMapping{{ContainerId: 0, HostId: hostID, Length: 65536}}
}

var ready = &podfsmv1.Sandbox{
	Id:                  "3b1f0c9a7e5d4c2b8a6f0e1d2c3b4a5968778695a4b3c2d1e0f9a8b7c6d5e4f3",
	ContainerdNamespace: "k8s.io",
	PodName:             "web",
	PodNamespace:        "default",
	PodUid:              "0c6f6d0e-9a52-4c1c-8a5e-0f6f3a0f7b11",
	RuntimeHandler:      "podfsm",
	State:               "Ready",
	CreatedAt:           at(0),
	Since:               at(120 * time.Millisecond),
	Ip:                  "10.88.0.5",
	AdditionalIps:       []string{"fd00:88::5"},
	Pid:                 4711,
	NetnsPath:           "/var/run/netns/podfsm-3b1f0c9a7e5d",
	NetnsInode:          4026532345,
	Userns:              &podfsmv1.UserNamespace{Uids: mapping(65536), Gids: mapping(65536)},
	TraceId:             "4bf92f3577b34da6a3ce929d0e0e4736",
}

var starting = &podfsmv1.Sandbox{
	Id:                  "9d",
	ContainerdNamespace: "k8s.io",
	PodName:             "slow",
	PodNamespace:        "default",
	PodUid:              "5f0c1c52-6b8e-4d3f-9a55-2f8f5e0a7c22",
	Attempt:             2,
	RuntimeHandler:      "podfsm",
	State:               "NetNSCaptured",
	CreatedAt:           at(5 * time.Minute),
	Since:               at(5*time.Minute + 2*time.Second),
	Pid:                 4712,
	NetnsPath:           "/var/run/netns/podfsm-9d",
	NetnsInode:          4026532346,
	Userns:              &podfsmv1.UserNamespace{Uids: mapping(131072), Gids: mapping(131072)},
	Step:                "attach_network",
}

// pending was not made over the CRI, has a pending cleanup, and its texts are hostile.
var pending = &podfsmv1.Sandbox{
	Id:                  "ff00ff00ff00ff00",
	ContainerdNamespace: "example",
	State:               "CleanupOwed",
	Goal:                "RolledBack",
	CreatedAt:           at(0),
	Since:               at(time.Second),
	Error:               "failed to undo \"attach_network\": \x1b[2Jplugin\nsaid \u202eno",
	PendingCleanups: []*podfsmv1.PendingCleanup{
		{Step: "attach_network", Error: "plugin\tsaid no", Tries: 3, Since: at(time.Second), NextTry: timestamppb.New(now.Add(4 * time.Second))},
		{Step: "start_pause", Error: "waits for attach_network", Tries: 1, Since: at(time.Second), NextTry: timestamppb.New(now.Add(-time.Second))},
	},
}

var readyInspection = &podfsmv1.InspectResponse{
	Sandbox: ready,
	Steps: []*podfsmv1.Step{
		{Name: "allocate_ids", Status: "done", StartedAt: at(0), Duration: took(300 * time.Microsecond), Detail: map[string]string{"uids": "0:65536:65536", "gids": "0:65536:65536"}},
		{Name: "remap_snapshot", Status: "done", StartedAt: at(time.Millisecond), Duration: took(11 * time.Millisecond), Detail: map[string]string{"strategy": "idmap"}},
		{Name: "start_pause", Status: "done", StartedAt: at(12 * time.Millisecond), Duration: took(50 * time.Millisecond), Detail: map[string]string{"pid": "4711"}},
		{Name: "capture_netns", Status: "done", StartedAt: at(62 * time.Millisecond), Duration: took(2 * time.Millisecond)},
		{Name: "attach_network", Status: "done", StartedAt: at(64 * time.Millisecond), Duration: took(55 * time.Millisecond)},
		{Name: "declare_ready", Status: "skipped", StartedAt: at(120 * time.Millisecond), Duration: took(0)},
	},
	Transitions: []*podfsmv1.Transition{
		{Seq: 1, At: at(300 * time.Microsecond), Event: "allocate_ids", From: "New", To: "IDsAllocated"},
		{Seq: 2, At: at(12 * time.Millisecond), Event: "remap_snapshot", From: "IDsAllocated", To: "SnapshotRemapped"},
		{Seq: 3, At: at(62 * time.Millisecond), Event: "start_pause", From: "SnapshotRemapped", To: "PauseStarted"},
		{Seq: 4, At: at(64 * time.Millisecond), Event: "capture_netns", From: "PauseStarted", To: "NetNSCaptured"},
		{Seq: 5, At: at(119 * time.Millisecond), Event: "attach_network", From: "NetNSCaptured", To: "NetworkReady"},
		{Seq: 6, At: at(120 * time.Millisecond), Event: "declare_ready", From: "NetworkReady", To: "Ready"},
	},
	CniResult: `{"cniVersion":"1.1.0","ips":[{"address":"10.88.0.5/16"}]}`,
}

var startingInspection = &podfsmv1.InspectResponse{
	Sandbox: starting,
	Steps: []*podfsmv1.Step{
		{Name: "allocate_ids", Status: "done", StartedAt: at(5 * time.Minute), Duration: took(time.Second)},
		{Name: "capture_netns", Status: "done", StartedAt: at(5*time.Minute + time.Second), Duration: took(time.Second)},
		{Name: "attach_network", Status: "running", StartedAt: at(5*time.Minute + 2*time.Second)},
		{Name: "declare_ready", Status: "pending"},
	},
}

var pendingInspection = &podfsmv1.InspectResponse{
	Sandbox: pending,
	Steps: []*podfsmv1.Step{
		{Name: "attach_network", Status: "cleanup_pending", StartedAt: at(0), Duration: took(time.Second), Error: "plugin \"bad\"\nsaid no", Detail: map[string]string{"network": "net\x1b[31m"}},
	},
	Transitions: []*podfsmv1.Transition{
		{Seq: 8, At: at(time.Second), Event: "leave_cleanup_pending", From: "RollingBack", To: "CleanupOwed", Error: "plugin said no"},
	},
	CniResult: "not JSON\x1b[2J",
}
