package plugin

import (
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// criPlugin stands for the instance of containerd's CRI plugin.
type criPlugin struct {
	runtime.RuntimeServiceServer
	runtime.ImageServiceServer
	io.Closer
}

func (*criPlugin) IsInitialized() bool { return true }

// stockCRI stands for containerd's CRI service.
type stockCRI struct {
	runtime.UnimplementedRuntimeServiceServer
	runtime.UnimplementedImageServiceServer
	closed bool
}

func (s *stockCRI) Close() error {
	s.closed = true
	return nil
}

func uris(graph []plugin.Registration) []string {
	var all []string
	for _, r := range graph {
		all = append(all, r.URI())
	}
	return all
}

// requireOrder checks that containerd can load the plugins one after the other.
func requireOrder(t *testing.T, graph []plugin.Registration) {
	for i, r := range graph {
		for _, required := range r.Requires {
			for _, later := range graph[i+1:] {
				require.NotEqual(t, required, later.Type, "%s comes before %s, which it requires", r.URI(), later.URI())
			}
		}
	}
}

func TestRegistryAfterInit(t *testing.T) {
	graph := registry.Graph(nil)
	requireOrder(t, graph)
	all := uris(graph)
	require.Len(t, slices.Compact(slices.Sorted(slices.Values(all))), len(all), "every plugin is there once")
	for _, want := range []string{
		"io.containerd.grpc.v1.cri",
		"io.containerd.cri.v1.runtime",
		"io.containerd.cri.v1.images",
		"io.containerd.podsandbox.controller.v1.podfsm",
		"io.containerd.grpc.v1.podfsm",
	} {
		require.Contains(t, all, want)
	}
	for _, r := range graph {
		require.NotNil(t, r.InitFn, r.URI())
		switch r.URI() {
		case "io.containerd.grpc.v1.cri":
			require.NotNil(t, r.Config, "the CRI keeps its configuration")
			require.NotNil(t, r.ConfigMigration)
			require.Contains(t, r.Requires, plugins.PodSandboxPlugin, "our controller is there before the front")
			// Without its dependencies containerd's own init function fails, and the front's fails in the same way.
			ic := plugin.NewContext(t.Context(), plugin.NewPluginSet(), nil)
			ic.Config = r.Config
			_, err := r.InitFn(ic)
			require.ErrorIs(t, err, plugin.ErrPluginNotFound)
			require.ErrorContains(t, err, "CRI runtime service")
		case "io.containerd.podsandbox.controller.v1.podfsm":
			require.Equal(t, sectionOf(defaultConfig()), r.Config)
			require.Equal(t, URI, r.URI())
		}
	}
}

// The front is put on whatever is registered, and nothing else is changed.
func TestPutFrontOnCRI(t *testing.T) {
	before := registry.Graph(nil)
	t.Cleanup(func() {
		registry.Reset()
		for _, r := range before {
			registry.Register(&r)
		}
	})
	registry.Reset()
	answer := func(id string) func(*plugin.InitContext) (any, error) {
		return func(*plugin.InitContext) (any, error) { return id, nil }
	}
	for _, r := range []plugin.Registration{
		{Type: plugins.GRPCPlugin, ID: "cri", Requires: []plugin.Type{"late"}, Config: &Config{}, InitFn: answer("cri")},
		{Type: "another", ID: "cri", InitFn: answer("another cri")},
		{Type: plugins.GRPCPlugin, ID: "other", InitFn: answer("other")},
		{Type: plugins.DiffPlugin, ID: "walking", InitFn: answer("walking")},
		{Type: "late", ID: "x", InitFn: answer("x")},
		{Type: "all", ID: "y", Requires: []plugin.Type{"*"}, InitFn: answer("y")},
	} {
		registry.Register(&r)
	}
	want := registry.Graph(nil)
	wrapStock()
	got := registry.Graph(nil)
	require.Equal(t, uris(want), uris(got))
	requireOrder(t, got[:len(got)-1])

	empty := plugin.NewContext(t.Context(), plugin.NewPluginSet(), nil)
	for i, r := range got {
		require.Equal(t, want[i].Requires, r.Requires)
		require.Equal(t, want[i].Config, r.Config)
		instance, err := r.InitFn(empty)
		require.NoError(t, err)
		wanted, err := want[i].InitFn(empty)
		require.NoError(t, err)
		require.Equal(t, wanted, instance, "without podfsm's controller the CRI is containerd's own, and without its metadata the differ")
	}
	require.NotPanics(t, wrapStock)
	require.Equal(t, uris(want), uris(registry.Graph(nil)))
}

// loaded is a context in which the controller's init function has returned instance and err; nil, nil is none.
func loaded(t *testing.T, instance any, err error) *plugin.InitContext {
	set := plugin.NewPluginSet()
	if instance != nil || err != nil {
		registration := plugin.Registration{Type: plugins.PodSandboxPlugin, ID: Name, InitFn: func(*plugin.InitContext) (any, error) { return instance, err }}
		require.NoError(t, set.Add(registration.Init(plugin.NewContext(t.Context(), set, nil))))
	}
	return plugin.NewContext(t.Context(), set, nil)
}

func TestFronted(t *testing.T) {
	healthy := func() *Controller { return &Controller{stock: stockWith()} }

	t.Run("containerd's error passes", func(t *testing.T) {
		instance, err := fronted(func(*plugin.InitContext) (any, error) { return "half", errNoLuck })(loaded(t, healthy(), nil))
		require.Equal(t, errNoLuck, err)
		require.Equal(t, "half", instance)
	})
	t.Run("no controller", func(t *testing.T) {
		for _, ic := range []*plugin.InitContext{loaded(t, nil, nil), loaded(t, nil, plugin.ErrSkipPlugin), loaded(t, nil, errNoLuck)} {
			s := &stockCRI{}
			instance, err := fronted(func(*plugin.InitContext) (any, error) { return s, nil })(ic)
			require.NoError(t, err)
			require.Same(t, s, instance)
		}
	})
	t.Run("an instance of another kind", func(t *testing.T) {
		c := healthy()
		instance, err := fronted(func(*plugin.InitContext) (any, error) { return "cri", nil })(loaded(t, c, nil))
		require.NoError(t, err, "the node's CRI goes on")
		require.Equal(t, "cri", instance)
		require.True(t, errdefs.IsUnavailable(c.degradedError()))
		require.ErrorContains(t, c.degradedError(), "string", "the reason names what it has found")
		require.True(t, errdefs.IsUnavailable(c.Admit(t.Context(), "podfsm", podConfig())))
	})
	t.Run("the front", func(t *testing.T) {
		c, s := healthy(), &stockCRI{}
		stock := &criPlugin{RuntimeServiceServer: s, ImageServiceServer: s, Closer: s}
		instance, err := fronted(func(ic *plugin.InitContext) (any, error) {
			require.NotNil(t, ic)
			return stock, nil
		})(loaded(t, c, nil))
		require.NoError(t, err)
		require.Same(t, stock, instance)
		require.NotSame(t, s, stock.RuntimeServiceServer)
		require.NoError(t, stock.Close())
		require.True(t, s.closed)
		require.NoError(t, c.degradedError())
	})
	t.Run("a controller that refuses", func(t *testing.T) {
		c := healthy()
		c.refuse(errNoLuck)
		s := &stockCRI{}
		stock := &criPlugin{RuntimeServiceServer: s, ImageServiceServer: s, Closer: s}
		_, err := fronted(func(*plugin.InitContext) (any, error) { return stock, nil })(loaded(t, c, nil))
		require.NoError(t, err)
		require.NotSame(t, s, stock.RuntimeServiceServer, "pods of its handlers must come to the refusal")
	})
}

func TestRegistered(t *testing.T) {
	c := &Controller{}
	got, err := registered(loaded(t, c, nil))
	require.NoError(t, err)
	require.Same(t, c, got)
	_, err = registered(loaded(t, nil, errNoLuck))
	require.ErrorIs(t, err, errNoLuck)
	_, err = registered(loaded(t, nil, nil))
	require.ErrorIs(t, err, plugin.ErrPluginNotFound)
}

func TestInitControllerNeverFails(t *testing.T) {
	runtimes := good{map[string]any{"containerd": map[string]any{
		"defaultRuntimeName": "runc",
		"runtimes":           map[string]any{"runc": map[string]any{}, "podfsm": map[string]any{"sandboxer": Name}},
	}}}
	stock := map[string]any{"runtime": runtimes, "images": good{map[string]any{}}}
	for name, tc := range map[string]struct {
		config any
		cri    map[string]any
		reason string
		reads  bool // containerd's configuration
	}{
		"nothing is loaded":     {config: sectionOf(defaultConfig()), reason: "io.containerd.cri.v1"},
		"no configuration":      {config: nil, cri: stock, reason: "<nil>", reads: true},
		"another configuration": {config: "x", cri: stock, reason: "string", reads: true},
		"a bad option": {
			config: sectionOf(&Config{CNIAddTimeout: "soon", CNIDelTimeout: "1s", RuntimeTimeout: "1s"}),
			cri:    stock, reason: "cni_add_timeout", reads: true,
		},
		"an option of another type": {config: &section{"cni_gc": 7}, cri: stock, reason: "option cni_gc", reads: true},
		"an unknown option":         {config: &section{"cni": "off"}, cri: stock, reason: "unknown option cni", reads: true},
		"no services": {
			config: sectionOf(defaultConfig()), cri: stock, reason: "containerd's services", reads: true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			ic := initContext(t, tc.cri)
			ic.Config = tc.config
			instance, err := initController(ic)
			require.NoError(t, err)
			c := instance.(*Controller)
			require.True(t, errdefs.IsUnavailable(c.degradedError()), "%v", c.degradedError())
			require.ErrorContains(t, c.degradedError(), tc.reason)
			require.NoError(t, c.Close())

			require.NotPanics(t, func() { _, _ = c.Ours("podfsm") })
			ours, err := c.Ours("podfsm")
			require.NoError(t, err)
			require.Equal(t, tc.reads, ours, "a pod of ours must come to the refusal before containerd's service makes its network")
			require.True(t, errdefs.IsUnavailable(c.Admit(t.Context(), "podfsm", podConfig())))
			_, ok := c.Sandbox("s1")
			require.False(t, ok)
		})
	}
}

func TestAPIWithoutController(t *testing.T) {
	for _, r := range registry.Graph(nil) {
		if r.URI() != "io.containerd.grpc.v1.podfsm" {
			continue
		}
		_, err := r.InitFn(loaded(t, nil, errors.New("disabled")))
		require.ErrorContains(t, err, "disabled")
		c := &Controller{}
		c.startBackground()
		instance, err := r.InitFn(loaded(t, c, nil))
		require.NoError(t, err)
		require.NoError(t, instance.(*api).Register(grpc.NewServer()))
		require.NoError(t, c.Close())
		return
	}
	t.Fatal("the service isn't registered")
}
