package integration

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/integration/harness"
	"github.com/podfsm/podfsm/integration/traces"
)

// remapNode starts a node whose handler has podfsm's snapshotter with a strategy, and returns the
// census after the images of the tests were unpacked.
func remapNode(t *testing.T, strategy string, config harness.Config) (*harness.Node, harness.Census) {
	t.Helper()
	config.Handlers = []string{remapped}
	config.TOML += fmt.Sprintf(`
		[plugins.'io.containerd.snapshotter.v1.podfsm']
			strategy = %q
		[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.remapped]
			snapshotter = "podfsm"
	`, strategy)
	n := harness.StartNode(t, config)
	_, err := n.WarmUp(t.Context(), remapped)
	require.NoError(t, err)
	pod, err := n.RunPod(t.Context(), remapped, n.PodConfig("unpack", harness.HostUsers()))
	require.NoError(t, err)
	startContainer(t, pod, "owners", harness.Image(harness.OwnersImage))
	require.NoError(t, pod.StopAndRemove(t.Context()))
	before, err := n.Settle(t.Context())
	require.NoError(t, err)
	return n, before
}

// layersMade returns how many remapped layers the daemon has made, by its log.
func layersMade(n *harness.Node) int {
	return strings.Count(n.Log(), "remapped the owners of an image")
}

// requireOwners requires the owners of the files of the image within a container of a pod in a user
// namespace.
func requireOwners(t *testing.T, c *harness.Container) {
	t.Helper()
	require.Equal(t, "0 0 755\n33 33 4755\n1000 1000 640\n1000 1000 640\n999 999 600\n",
		exec(t, c, "stat", "-c", "%u %g %a", "/", "/owners/suid", "/owners/a", "/owners/b", "/owners/many/999"))
	same := strings.Fields(exec(t, c, "stat", "-c", "%i %h", "/owners/a", "/owners/b"))
	require.Equal(t, same[:2], same[2:], "a hard linked file")
	require.Equal(t, "2", same[1], "with two paths")
	// The program's capability counts in the pod's user namespace.
	status := exec(t, c, "su", "-s", "/bin/sh", "nobody", "-c", "/owners/cat /proc/self/status")
	require.Contains(t, status, "Uid:\t65534\t65534")
	require.Contains(t, status, "CapEff:\t0000000000002000")
	require.Equal(t, "one file\n", exec(t, c, "cat", "/owners/b"))
	require.NotContains(t, exec(t, c, "sh", "-c", "stat -c '%u %g' /owners/many/*"), "65534")
}

// rootOf returns the line of a container's root filesystem in its mountinfo, without what differs
// from snapshot to snapshot.
func rootOf(t *testing.T, c *harness.Container) string {
	t.Helper()
	pid, err := c.Pid(t.Context())
	require.NoError(t, err)
	info, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	require.NoError(t, err)
	line, _, _ := strings.Cut(string(info), "\n")
	_, options, ok := strings.Cut(line, " - ")
	require.True(t, ok)
	options = regexp.MustCompile(`v1\.(overlayfs|podfsm)/snapshots`).ReplaceAllString(options, "snapshots")
	return regexp.MustCompile(`snapshots/\d+`).ReplaceAllString(options, "snapshots/N")
}

// changed returns the files that a commit of the container would add to its image.
func changed(t *testing.T, n *harness.Node, snapshotter, key string) (files []string) {
	t.Helper()
	ctx, done, err := n.Containerd.WithLease(namespaces.WithNamespace(t.Context(), "k8s.io"))
	require.NoError(t, err)
	defer func() { require.NoError(t, done(ctx)) }()
	layer, err := rootfs.CreateDiff(ctx, key, n.Containerd.SnapshotService(snapshotter), n.Containerd.DiffService())
	require.NoError(t, err)
	blob, err := content.ReadBlob(ctx, n.Containerd.ContentStore(), layer)
	require.NoError(t, err)
	unzipped, err := gzip.NewReader(strings.NewReader(string(blob)))
	require.NoError(t, err)
	for r := tar.NewReader(unzipped); ; {
		h, err := r.Next()
		if err == io.EOF {
			slices.Sort(files)
			return files
		}
		require.NoError(t, err)
		line := fmt.Sprintf("%s %d:%d %o", h.Name, h.Uid, h.Gid, h.Mode)
		if caps := h.PAXRecords["SCHILY.xattr.security.capability"]; caps != "" {
			line += fmt.Sprintf(" caps v%d", caps[3])
		}
		if strings.HasPrefix(h.Name, "owners/") || strings.HasPrefix(h.Name, "tmp/") {
			files = append(files, line)
		}
	}
}

func TestRemap(t *testing.T) {
	t.Parallel()
	for _, strategy := range []string{"idmap", "metacopy", "chown"} {
		t.Run(strategy, func(t *testing.T) {
			n, before := remapNode(t, strategy, harness.Config{Traces: true})
			made := layersMade(n)

			t.Run("pods", func(t *testing.T) {
				ctx, trace := traces.NewContext(t.Context())
				pod, err := n.RunPod(ctx, remapped, n.PodConfig("web"))
				require.NoError(t, err)
				t.Cleanup(func() { require.NoError(t, pod.StopAndRemove(context.WithoutCancel(t.Context()))) })
				step := stepOf(t, n, pod.ID, "remap_snapshot")
				require.Equal(t, "podfsm", step["snapshotter"])
				require.Equal(t, strategy, step["strategy"])
				spans, err := n.Traces.WaitFor(t.Context(), trace, traces.Finished("podfsm.sandbox.run"))
				require.NoError(t, err)
				requireRemapSpans(t, spans, strategy)
				if strategy != "idmap" {
					require.Regexp(t, `^\d+ inodes, \d+ bytes, in `, step["remapped"])
				}

				var containers [3]*harness.Container
				var group errgroup.Group
				for i := range containers {
					group.Go(func() (err error) {
						containers[i], err = pod.StartContainer(t.Context(), fmt.Sprint("owners-", i), harness.Image(harness.OwnersImage))
						return err
					})
				}
				require.NoError(t, group.Wait())
				for _, c := range containers {
					requireOwners(t, c)
				}
				layers := 2 // pause's and the containers', once
				if strategy == "idmap" {
					layers = 0
				}
				require.Equal(t, layers, layersMade(n)-made)
				require.EqualValues(t, layersMade(n), scrape(t, n)[`podfsm_remap_layers_total{strategy="`+strategy+`"}`])

				exec(t, containers[0], "sh", "-c", "echo x >/tmp/new && chown 1000:7 /tmp/new && chmod 700 /owners/cat && rm /owners/many/5")
				require.Equal(t, []string{
					"owners/ 0:0 755", "owners/cat 0:0 700 caps v2", "owners/many/ 0:0 755", "owners/many/.wh.5 0:0 0", "tmp/ 0:0 1777", "tmp/new 1000:7 644",
				}, changed(t, n, "podfsm", containers[0].ID))

				host := startContainer(t, startPod(t, n, remapped, n.PodConfig("host", harness.HostUsers())), "owners", harness.Image(harness.OwnersImage))
				stock := startContainer(t, startPod(t, n, harness.StockHandler, n.PodConfig("stock", harness.HostUsers())), "owners", harness.Image(harness.OwnersImage))
				require.Equal(t, rootOf(t, stock), rootOf(t, host))
				require.Equal(t, strategy == "metacopy", strings.Contains(rootOf(t, containers[0]), "metacopy=on"))
				requireOwners(t, host)
			})

			n.RequireClean(t, overlayfsUnpacked(t, n, before))
			removeImages(t, n)
			require.Eventually(t, func() bool {
				census, err := n.TidyCensus(t.Context())
				require.NoError(t, err)
				return !slices.ContainsFunc(append(census[harness.Snapshots], census[harness.Files]...), func(item string) bool {
					return regexp.MustCompile(`podfsm/snapshots/\d|/podfsm `).MatchString(item)
				})
			}, waitFor, tick, "no snapshot and no directory of podfsm's snapshotter")
		})
	}
}

// overlayfsUnpacked adds the layers to a census that the stock pod has unpacked since.
func overlayfsUnpacked(t *testing.T, n *harness.Node, before harness.Census) harness.Census {
	t.Helper()
	now, err := n.Settle(t.Context())
	require.NoError(t, err)
	for _, category := range []string{harness.Snapshots, harness.Files} {
		for _, item := range now[category] {
			if strings.Contains(item, "overlayfs") && !slices.Contains(before[category], item) {
				before[category] = append(before[category], item)
			}
		}
	}
	return before
}

func removeImages(t *testing.T, n *harness.Node) {
	t.Helper()
	for _, image := range []string{harness.OwnersImage, harness.BusyboxImage, harness.PauseImage} {
		_, err := n.Images.RemoveImage(t.Context(), &runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: image}})
		require.NoError(t, err)
	}
}

// stepOf returns podfsm's view of a step of a sandbox.
func stepOf(t *testing.T, n *harness.Node, id, step string) map[string]string {
	t.Helper()
	for _, s := range inspect(t, n, id).GetSteps() {
		if s.GetName() == step {
			return s.GetDetail()
		}
	}
	t.Fatalf("no step %q", step)
	return nil
}

// requireRemapSpans requires the spans of a pod's snapshot in a trace.
func requireRemapSpans(t *testing.T, spans []traces.Span, strategy string) {
	t.Helper()
	step := slices.IndexFunc(spans, func(s traces.Span) bool { return s.Name == "podfsm.sandbox.remap_snapshot" })
	require.Equal(t, strategy, spans[step].Attributes["podfsm.snapshot.strategy"])
	remap := slices.IndexFunc(spans, func(s traces.Span) bool { return s.Name == "podfsm.snapshot.remap" })
	require.Equal(t, strategy != "idmap", remap >= 0)
	if remap >= 0 {
		require.Equal(t, spans[step].SpanID, spans[remap].ParentID)
		require.Equal(t, strategy, spans[remap].Attributes["podfsm.snapshot.strategy"])
		require.Equal(t, "2", spans[remap].Attributes["podfsm.snapshot.inodes"], "the root and pause")
	}
}

// TestRemapOnce starts pods that share their ids in parallel: each layer is remapped once.
func TestRemapOnce(t *testing.T) {
	n, before := remapNode(t, "metacopy", harness.Config{TOML: `
		[plugins.'io.containerd.podsandbox.controller.v1.podfsm'.userns.remapped]
			mode = "node"
			node_wide_uid_mapping = {container_id=0, host_id=1000000, size=65536}
			node_wide_gid_mapping = {container_id=0, host_id=2000000, size=65536}
	`})
	made := layersMade(n)
	var group errgroup.Group
	pods := make([]*harness.Pod, 4)
	for i := range pods {
		group.Go(func() (err error) {
			pods[i], err = n.RunPod(t.Context(), remapped, n.PodConfig(fmt.Sprint("pod-", i), harness.HostUsers()))
			if err != nil {
				return err
			}
			_, err = pods[i].StartContainer(t.Context(), "owners", harness.Image(harness.OwnersImage))
			return err
		})
	}
	require.NoError(t, group.Wait())
	require.Equal(t, 2, layersMade(n)-made, "pause's and the containers'")
	for _, pod := range pods {
		require.NoError(t, pod.StopAndRemove(t.Context()))
	}
	n.RequireClean(t, before)
}

// TestRemapHoldsUpNobody runs pods and collects garbage while an image is remapped, for a pause and
// for a container.
func TestRemapHoldsUpNobody(t *testing.T) {
	n, before := remapNode(t, "chown", harness.Config{Daemon: harness.TestDaemon})
	const point = "remap.mounted"
	meanwhile := func(t *testing.T, name string) {
		defer func() { require.NoError(t, n.Faults.Release(point)) }()
		require.NoError(t, n.Faults.WaitReached(t.Context(), point, 1))
		collected := make(chan error, 1)
		go func() {
			_, err := n.TidyCensus(t.Context()) // waits for the collection, which needs containerd's lock
			collected <- err
		}()
		select {
		case err := <-collected:
			require.NoError(t, err)
		case <-time.After(waitFor):
			require.Fail(t, "the garbage isn't collected meanwhile")
		}
		pod, err := n.RunPod(t.Context(), remapped, n.PodConfig(name, harness.HostUsers()))
		require.NoError(t, err)
		startContainer(t, pod, "busybox")
		require.NoError(t, pod.StopAndRemove(t.Context()))
	}

	var pod *harness.Pod
	var group errgroup.Group
	require.NoError(t, n.Fault(point, "1*block"))
	group.Go(func() (err error) {
		pod, err = n.RunPod(t.Context(), remapped, n.PodConfig("slow"))
		return err
	})
	meanwhile(t, "beside-pause")
	require.NoError(t, group.Wait())

	var c *harness.Container
	require.NoError(t, n.Fault(point, "1*block"))
	group.Go(func() (err error) {
		c, err = pod.StartContainer(t.Context(), "owners", harness.Image(harness.OwnersImage))
		return err
	})
	meanwhile(t, "beside-container")
	require.NoError(t, group.Wait())
	requireOwners(t, c)
	require.NoError(t, pod.StopAndRemove(t.Context()))
	n.RequireClean(t, before)
}

// TestRemapByDefault uses podfsm's snapshotter for all pods of a node, including those of
// containerd's own handler.
func TestRemapByDefault(t *testing.T) {
	n, _ := remapNode(t, "metacopy", harness.Config{TOML: `
		[plugins.'io.containerd.cri.v1.images']
			snapshotter = "podfsm"
	`})
	for _, handler := range []string{harness.StockHandler, harness.PodfsmHandler} {
		pod := startPod(t, n, handler, n.PodConfig("pod-"+handler))
		c := startContainer(t, pod, "owners", harness.Image(harness.OwnersImage))
		requireOwners(t, c)
		require.Contains(t, rootOf(t, c), "metacopy=on")
		exec(t, c, "touch", "/tmp/new")
		require.Equal(t, []string{"tmp/ 0:0 1777", "tmp/new 0:0 644"}, changed(t, n, "podfsm", c.ID))
	}
	census, err := n.TidyCensus(t.Context())
	require.NoError(t, err)
	unpacked := slices.DeleteFunc(census[harness.Snapshots], func(item string) bool { return !strings.Contains(item, "overlayfs") })
	require.Len(t, unpacked, 2, "only what the harness has unpacked: pause and busybox")
}

// TestRemapKilled kills containerd while it remaps an image, at each phase and at random moments.
// Afterwards the pod or its container runs, and nothing of the interrupted work is left.
func TestRemapKilled(t *testing.T) {
	phases := []string{"prepared", "mounted", "shifted", "committed"}
	moments := 2
	strategies := []string{"metacopy"}
	if full() {
		moments, strategies = 10, append(strategies, "chown")
	}
	for _, strategy := range strategies {
		n, before := remapNode(t, strategy, harness.Config{Daemon: harness.TestDaemon})
		for i, phase := range phases {
			if full() || i%2 == 0 {
				t.Run(strategy+" pause "+phase, func(t *testing.T) { killPause(t, n, before, "remap."+phase) })
			}
			if full() || i%2 == 1 {
				t.Run(strategy+" container "+phase, func(t *testing.T) { killContainer(t, n, before, "remap."+phase, 0) })
			}
		}
		for range moments {
			after := time.Duration(rand.Int64N(int64(60 * time.Millisecond)))
			t.Run(fmt.Sprintf("%s container, %v after the first owner", strategy, after), func(t *testing.T) {
				killContainer(t, n, before, "remap.mounted", after)
			})
		}
	}
}

func killPause(t *testing.T, n *harness.Node, before harness.Census, point string) {
	config := n.PodConfig("pod")
	require.NoError(t, n.Fault(point, "1*block"))
	killDuring(t, n, point, 0, func(ctx context.Context) { _, _ = n.RunPod(ctx, remapped, config) })
	require.Empty(t, listed(t, n))
	settled(t, n)
	pod, err := n.RunPod(t.Context(), remapped, config)
	require.NoError(t, err)
	c := startContainer(t, pod, "owners", harness.Image(harness.OwnersImage))
	requireOwners(t, c)
	require.NoError(t, pod.StopAndRemove(t.Context()))
	n.RequireClean(t, before)
}

func killContainer(t *testing.T, n *harness.Node, before harness.Census, point string, after time.Duration) {
	pod, err := n.RunPod(t.Context(), remapped, n.PodConfig("pod"))
	require.NoError(t, err)
	require.NoError(t, n.Fault(point, "1*block"))
	killDuring(t, n, point, after, func(ctx context.Context) {
		_, _ = pod.StartContainer(ctx, "owners", harness.Image(harness.OwnersImage))
	})
	c := startContainer(t, pod, "again", harness.Image(harness.OwnersImage))
	requireOwners(t, c)
	require.NoError(t, pod.StopAndRemove(t.Context()))
	n.RequireClean(t, before)
}

// killDuring kills containerd when a call reaches a point, or some time after the point was
// released, and starts it again.
func killDuring(t *testing.T, n *harness.Node, point string, after time.Duration, call func(ctx context.Context)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitFor)
	var calls sync.WaitGroup
	defer func() { // it ends with the daemon
		cancel()
		calls.Wait()
	}()
	calls.Go(func() { call(ctx) })
	require.NoError(t, n.Faults.WaitReached(ctx, point, 1))
	if after > 0 {
		require.NoError(t, n.Faults.Release(point))
		time.Sleep(after) // a moment like any other
	}
	require.NoError(t, n.Kill(t.Context()))
	require.NoError(t, n.Heal())
	require.NoError(t, n.Start(t.Context()))
}
