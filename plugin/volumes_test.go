package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/pprof"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	imagestore "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podfsm/podfsm/userns"
)

// deaf mounts a filesystem that answers nothing until answers is called, and only fails then.
func deaf(t *testing.T) (dir string, answers func()) {
	server, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	require.NoError(t, err)
	dir = t.TempDir()
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", server.Fd())
	require.NoError(t, unix.Mount("deaf", dir, "fuse", 0, options))
	t.Cleanup(func() {
		_ = server.Close() // or the test has
		require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH))
	})
	return dir, func() { require.NoError(t, server.Close()) }
}

// imagesOf is a client whose node has images, by the names of their records, each with the user that it names.
func imagesOf(t *testing.T, users map[string]string) *containerd.Client {
	dir, ctx := t.TempDir(), inCRI(t)
	contents, err := local.NewStore(filepath.Join(dir, "content"))
	require.NoError(t, err)
	file, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, file.Close()) })
	db := metadata.NewDB(file, contents, nil)
	require.NoError(t, db.Init(ctx))
	store := metadata.NewImageStore(db)
	add := func(mediaType string, of any) imagespec.Descriptor {
		blob, err := json.Marshal(of)
		require.NoError(t, err)
		d := imagespec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
		require.NoError(t, content.WriteBlob(ctx, db.ContentStore(), d.Digest.String(), bytes.NewReader(blob), d))
		return d
	}
	for name, user := range users {
		config := imagespec.Image{Platform: platforms.DefaultSpec(), Config: imagespec.ImageConfig{User: user}}
		manifest := imagespec.Manifest{MediaType: imagespec.MediaTypeImageManifest, Config: add(imagespec.MediaTypeImageConfig, config)}
		_, err := store.Create(ctx, imagestore.Image{Name: name, Target: add(imagespec.MediaTypeImageManifest, manifest)})
		require.NoError(t, err)
	}
	client, err := containerd.New("", containerd.WithServices(containerd.WithImageStore(store), containerd.WithContentStore(db.ContentStore())))
	require.NoError(t, err)
	return client
}

// The image of a container is the one that containerd's service takes, however short its name is.
func TestImageUser(t *testing.T) {
	id := "sha256:" + strings.Repeat("ab", 32)
	n := &node{client: imagesOf(t, map[string]string{
		"docker.io/library/busybox:latest": "70000",
		"docker.io/rancher/tools:2":        "app:70000",
		"registry.example:5000/tools:2":    "",
		"tools:2":                          "1", // by ctr, which takes any name
		"docker.io/library/tools:2":        "2",
		"ctr-only":                         "3",
		id:                                 "4",
	})}
	type security = runtime.LinuxContainerSecurityContext
	for name, tc := range map[string]struct {
		image    string
		security *security
		want     string
	}{
		"short":               {image: "busybox", want: "70000"},
		"with a tag":          {image: "busybox:latest", want: "70000"},
		"with a folder":       {image: "library/busybox", want: "70000"},
		"full":                {image: "docker.io/library/busybox:latest", want: "70000"},
		"other tag":           {image: "busybox:1"},
		"group":               {image: "rancher/tools:2", want: "app:70000"},
		"no user":             {image: "registry.example:5000/tools:2"},
		"short and full":      {image: "tools:2", want: "2"},
		"no reference's":      {image: "ctr-only", want: "3"},
		"id":                  {image: id, want: "4"},
		"unknown":             {image: "unknown"},
		"none":                {},
		"no name at all":      {image: "Not A Name"},
		"container's user":    {image: "busybox", security: &security{RunAsUser: &runtime.Int64Value{Value: 7}}},
		"container's by name": {image: "busybox", security: &security{RunAsUsername: "app"}},
	} {
		t.Run(name, func(t *testing.T) {
			user, err := n.imageUser(inCRI(t), &runtime.ContainerConfig{
				Image: &runtime.ImageSpec{Image: tc.image},
				Linux: &runtime.LinuxContainerConfig{SecurityContext: tc.security},
			})
			require.NoError(t, err)
			require.Equal(t, tc.want, user)
		})
	}
}

// looking are the goroutines that look at a volume.
func looking(t *testing.T) int {
	var stacks bytes.Buffer
	require.NoError(t, pprof.Lookup("goroutine").WriteTo(&stacks, 2))
	return bytes.Count(stacks.Bytes(), []byte("userns.Reach("))
}

func TestLookAtAVolumeThatDoesNotAnswer(t *testing.T) {
	dir, answers := deaf(t)
	path, l := filepath.Join(dir, "volume"), looks{}
	for n := range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		err := l.at(ctx, path, os.Getpid()+n) // of other pods
		cancel()
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "does not respond")
		require.Equal(t, 1, looking(t), "retries join the first")
	}
	require.ErrorContains(t, l.at(t.Context(), "/proc", os.Getpid()), "proc", "others aren't kept")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	devices := []*runtime.Device{{HostPath: "/dev/nowhere"}, {HostPath: path}}
	require.ErrorContains(t, (&Controller{}).reachDevices(ctx, devices, os.Getpid()), fmt.Sprintf("device %q: the filesystem does not respond", path))
	answers()
	require.Eventually(t, func() bool { return looking(t) == 0 }, 10*time.Second, time.Millisecond)
	require.ErrorIs(t, l.at(t.Context(), path, os.Getpid()), unix.ENOTCONN, "the next one looks anew")
}

// A pod whose filesystems are dead doesn't keep other pods from their volumes, nor fill the node with threads.
func TestLooksAreBounded(t *testing.T) {
	dir, answers := deaf(t)
	var l looks
	pod, other := os.Getpid(), os.Getppid()
	for n := range maxLooksOfPod {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		require.ErrorIs(t, l.at(ctx, filepath.Join(dir, fmt.Sprint(n)), pod), context.DeadlineExceeded)
		cancel()
	}
	err := l.at(t.Context(), "/proc", pod)
	require.True(t, errdefs.IsUnavailable(err), "%v", err)
	require.ErrorContains(t, l.at(t.Context(), "/proc", other), "proc", "another pod's volume")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, l.at(ctx, filepath.Join(dir, "0"), other), context.DeadlineExceeded, "it joins the first")
	answers()
	require.Eventually(t, func() bool { return looking(t) == 0 }, 10*time.Second, time.Millisecond)
	require.ErrorContains(t, l.at(t.Context(), "/proc", pod), "proc")
	require.Empty(t, l.underWay)
	require.Empty(t, l.ofPod)
}

// Pods that come and go don't fill the node with threads either.
func TestLooksOfAllPodsAreBounded(t *testing.T) {
	var l looks
	answer, ended := make(chan struct{}), sync.WaitGroup{}
	join := func(n int) error {
		return l.join(t.Context(), n, fmt.Sprint(n), func() error { <-answer; return nil })
	}
	for n := range maxLooks {
		ended.Go(func() { assert.NoError(t, join(n)) })
	}
	require.Eventually(t, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.underWay) == maxLooks
	}, 10*time.Second, time.Millisecond)
	err := join(maxLooks)
	require.True(t, errdefs.IsUnavailable(err), "%v", err)
	close(answer)
	ended.Wait()
	require.NoError(t, join(maxLooks))
}

// The remedy is one that helps: where the kernel can't map tmpfs, no other tmpfs will do.
func TestVolumeRemedy(t *testing.T) {
	for _, test := range []struct {
		filesystem string
		err        error
		chosen     bool
		remedy     string
	}{
		{"ramfs", unix.EINVAL, false, "put the volume on a filesystem that can, such as ext4, xfs or btrfs, or run the pod with hostUsers: true"},
		{"tmpfs", unix.EINVAL, false, "upgrade the node to Linux 6.3 or later, which maps the ids of tmpfs, or run the pod with hostUsers: true"},
		{"tmpfs", unix.EINVAL, true, "upgrade the node to Linux 6.3 or later, which maps the ids of tmpfs, or run the pod by a runtime handler that leaves it on the node's users"},
		{"tmpfs", nil, false, "give the container volumes that have no mount below them, or run the pod with hostUsers: true"},
		{"tmpfs", nil, true, "give the container volumes that have no mount below them, or run the pod by a runtime handler that leaves it on the node's users"},
		{"tmpfs", unix.EPERM, true, "put the volume on a filesystem that can, such as ext4, xfs or btrfs, or run the pod by a runtime handler that leaves it on the node's users"},
	} {
		unmappable := &userns.UnmappableError{Filesystem: test.filesystem, Err: test.err}
		if test.err == nil {
			unmappable.Below = "/volume/below"
		}
		require.Equal(t, test.remedy, volumeRemedy(unmappable, test.chosen))
		require.True(t, errdefs.IsFailedPrecondition(unmappable))
	}
}

// What is mounted below a volume counts where podfsm has chosen the pod's ids. The error names the volume.
func TestCheckVolumesWithMountsBelow(t *testing.T) {
	users := exec.Command("sleep", "infinity")
	maps := []syscall.SysProcIDMap{{HostID: 1_500_000_000, Size: 100}}
	users.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: maps, GidMappings: maps}
	require.NoError(t, users.Start())
	t.Cleanup(func() {
		require.NoError(t, users.Process.Kill())
		_ = users.Wait() // it was killed
	})
	plain, above := t.TempDir(), t.TempDir()
	below := filepath.Join(above, "below")
	require.NoError(t, os.Mkdir(below, 0o755))
	require.NoError(t, unix.Mount("tmpfs", below, "tmpfs", 0, ""))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(below, 0)) })
	mapped := []*runtime.IDMapping{{HostId: 1_500_000_000, Length: 100}}
	mounts := []*runtime.Mount{
		nil,
		{ContainerPath: "/image", Image: &runtime.ImageSpec{Image: "image"}},
		{ContainerPath: "/plain", HostPath: plain, UidMappings: mapped},
		{ContainerPath: "/above", HostPath: above, UidMappings: mapped},
	}
	c := &Controller{}
	require.NoError(t, c.checkVolumes(t.Context(), mounts, users.Process.Pid, false))
	require.NoError(t, c.checkVolumes(t.Context(), mounts[:3], users.Process.Pid, true))
	err := c.checkVolumes(t.Context(), mounts, users.Process.Pid, true)
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	require.EqualError(t, err, fmt.Sprintf(`can't have its volume "/above" from %q: %q, of the filesystem tmpfs, is mounted below it, and the runtime maps no ids there; `+
		"give the container volumes that have no mount below them, or run the pod by a runtime handler that leaves it on the node's users", above, below))
}
