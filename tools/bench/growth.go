package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/tools/page"
)

// grown is the kind of the rows about calls on a node with many pods.
var grown = kind{name: "calls about one pod, by the number of pods on the node"}

// containersPerPod is the number of containers in each pod of the compared nodes.
const containersPerPod = 3

// autoHandler is podfsm's handler that gives user namespaces to pods without hostUsers: false. Such
// pods need the most work per call.
const autoHandler = "podfsm-auto"

const autoUsers = `
[plugins.'io.containerd.podsandbox.controller.v1.podfsm'.userns.podfsm-auto]
  mode = "auto"
[plugins.'io.containerd.podsandbox.controller.v1.podfsm'.userns_pool]
  ranges = [{host_id = 1000013824, size = 655360000}]
`

// visitor is the handler of a pod that is called about, and its row.
type visitor struct{ row, handler string }

// growth compares nodes with few and with many pods by the kubelet's calls about one pod. A call
// that gets slower with podfsm, and not with an unmodified containerd, has a cost per pod of the
// node. podfsm's node also has a pod of containerd's own handler.
func growth(ctx context.Context, b *bench) error {
	few, many := b.standing[0], b.standing[len(b.standing)-1]
	if few == many {
		return nil
	}
	b.results.compare(grown, holding(few), holding(many))
	for _, of := range []struct {
		config   harness.Config
		visitors []visitor
	}{
		{harness.Config{Daemon: harness.Stock}, []visitor{{unmodifiedSide, harness.StockHandler}}},
		{harness.Config{Daemon: harness.Podfsm, Handlers: []string{autoHandler}, TOML: autoUsers},
			[]visitor{{podfsmSide + ", mode auto", autoHandler}, {podfsmSide + ", " + stockHandlers, harness.StockHandler}}},
	} {
		if err := b.growthOf(ctx, of.config, of.visitors, few, many); err != nil {
			return fmt.Errorf("%s: %w", of.visitors[0].row, err)
		}
	}
	return nil
}

// holding returns the column of a node with this number of pods.
func holding(pods int) string { return fmt.Sprintf("%d pods", pods) }

// growthOf makes two equal nodes, fills them with pods of the first visitor's handler, and
// measures.
func (b *bench) growthOf(ctx context.Context, config harness.Config, visitors []visitor, numbers ...int) (err error) {
	var sides []*side
	defer func() {
		for _, s := range sides {
			err = errors.Join(err, s.node.Close(context.WithoutCancel(ctx)))
		}
	}()
	for _, pods := range numbers {
		s, err := newSide(ctx, holding(pods), visitors[0].handler, config)
		if err != nil {
			return err
		}
		sides = append(sides, s)
		c := &crowdOf{side: s, kind: onHost, containers: containersPerPod}
		if err := c.fill(ctx, pods); err != nil {
			return err
		}
		progress("  %s of %s, load %s", s.name, visitors[0].row, page.Load())
	}
	for _, v := range visitors {
		if err := b.visit(ctx, v, sides); err != nil {
			return err
		}
	}
	return nil
}

// visit measures calls about one more pod on each side, and the life of others without containers.
func (b *bench) visit(ctx context.Context, v visitor, sides []*side) error {
	pods := map[*side]*harness.Pod{}
	for _, s := range sides {
		pod, err := s.node.RunPod(ctx, v.handler, s.node.PodConfig("visitor-"+v.handler, onHost.options...))
		if err != nil {
			return err
		}
		if _, err := pod.StartContainer(ctx, "main"); err != nil { // the first one starts the pod's shim
			return err
		}
		pods[s] = pod
	}
	return inTurns(b.rounds*3, sides, func(round int, s *side) error {
		var pod *harness.Pod
		var c *harness.Container
		for _, call := range []struct {
			name string
			do   func() error
		}{
			{"RunPodSandbox", func() (err error) {
				pod, err = s.node.RunPod(ctx, v.handler, s.node.PodConfig(fmt.Sprintf("measured-%s-%d", v.handler, round), onHost.options...))
				return err
			}},
			{"CreateContainer", func() (err error) {
				c, err = pods[s].CreateContainer(ctx, "measured", harness.Volume(filepath.Join(s.node.Dir(), "logs"), "/logs"))
				return err
			}},
			{"ContainerStatus", func() error {
				_, err := c.Status(ctx)
				return err
			}},
			{"PortForward", func() error {
				_, err := s.node.Runtime.PortForward(ctx, &runtime.PortForwardRequest{PodSandboxId: pods[s].ID, Port: []int32{80}})
				return err
			}},
			{"StopPodSandbox", func() error { return pod.Stop(ctx) }},
			{"RemovePodSandbox", func() error { return pod.Remove(ctx) }},
		} {
			took, err := timed(call.do)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", call.name, s.name, err)
			}
			b.results.add(metric(call.name+", "+v.row, grown), s.name, round, took)
		}
		return c.Remove(ctx)
	})
}
