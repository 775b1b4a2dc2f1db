package main

import (
	"fmt"
	"strings"
)

// The names of rows that several files use.
const (
	withFirst          = "pod and first container"
	withFirstPerSecond = "pods with first container started per second"
	startedPerSecond   = "pods started per second"
	stoppedPerSecond   = "pods stopped per second"

	perPod     = " per pod"
	cpuTotal   = "CPU time" + perPod
	cpuDaemon  = "… of the daemon"
	cpuPlugins = "… of programs that the daemon waits for"
	cpuRest    = "… of all other processes"

	residentMemory   = "resident memory"
	residentOfDaemon = "… resident memory of the daemon"

	stockHandlers = "a pod of containerd's own handler"

	syncsPerPod = "syncs" + perPod
	bytesPerPod = "bytes written" + perPod
)

// aim is the target for the ratios of podfsm to the other columns in a row: an upper bound, or a
// lower bound if more is better. 0 is no aim.
type aim struct{ crio, unmodified, floor float64 }

// aims were set before podfsm cloned pause itself. Those against an unmodified containerd apply to
// both kinds of pods, the others to pods with user namespaces.
var aims = map[string]aim{
	withFirst + ", alone":                              {crio: 0.90, unmodified: 0.60},
	withFirstPerSecond + ", 8 at a time":               {crio: 1.10, unmodified: 1.5},
	"RunPodSandbox, alone":                             {crio: 0.70, unmodified: 0.42, floor: 1.20},
	"StopPodSandbox, alone":                            {crio: 0.95, unmodified: 0.72, floor: 1.10},
	"RemovePodSandbox, alone":                          {crio: 0.90, unmodified: 0.18},
	startedPerSecond + ", 8 at a time":                 {crio: 1.30, unmodified: 2.0, floor: 0.80},
	startedPerSecond + ", 32 at a time":                {crio: 1.30, unmodified: 2.0, floor: 0.80},
	"RunPodSandbox, " + stockHandlers:                  {unmodified: 1.05},
	"StopPodSandbox, " + stockHandlers:                 {unmodified: 1.05},
	"RemovePodSandbox, " + stockHandlers:               {unmodified: 1.05},
	"CreateContainer, " + stockHandlers:                {unmodified: 1.05},
	cpuTotal:                                           {crio: 0.90, unmodified: 0.55, floor: 1.25},
	"RunPodSandbox, alone" + withPods(100):             {crio: 0.75, unmodified: 0.50},
	startedPerSecond + ", 8 at a time" + withPods(100): {crio: 1.25, unmodified: 1.8},
	residentMemory + perPod:                            {crio: 0.80, unmodified: 0.15},
	"restart with 300 pods":                            {unmodified: 0.60},
	syncsPerPod:                                        {unmodified: 1},
	bytesPerPod:                                        {unmodified: 1},
}

// aimTo returns the aim of a row against another column, 0 without one.
func (m measure) aimTo(side string) float64 {
	a := aims[m.name]
	switch {
	case side == unmodifiedSide:
		return a.unmodified
	case m.kind != userNS.name:
		return 0
	case side == crioSide:
		return a.crio
	default:
		return a.floor
	}
}

// aimed reports whether a row has any aim.
func (m measure) aimed() bool {
	return m.aimTo(crioSide) > 0 || m.aimTo(unmodifiedSide) > 0 || m.aimTo(floorSide) > 0
}

// moreIsBetter reports whether higher numbers of a row are better.
func (m measure) moreIsBetter() bool { return strings.Contains(m.name, " per second") }

// judge returns a ratio with its aim.
func (m measure) judge(ratio, aim float64) string {
	if aim == 0 {
		return fmt.Sprintf("%.2f", ratio)
	}
	sign, met := "≤", ratio <= aim
	if m.moreIsBetter() {
		sign, met = "≥", ratio >= aim
	}
	result := "met"
	if !met {
		result = "missed"
	}
	return fmt.Sprintf("**%.2f** (%s %.2f: %s)", ratio, sign, aim, result)
}
