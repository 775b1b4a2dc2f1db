package cri

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// logged collects what is logged with the context.
func logged(ctx context.Context) (context.Context, *bytes.Buffer) {
	var out bytes.Buffer
	logger := logrus.New()
	logger.SetOutput(&out)
	logger.SetLevel(logrus.DebugLevel)
	return log.WithLogger(ctx, logrus.NewEntry(logger).WithField("caller", "kubelet")), &out
}

// hookedLines keeps what a hook is told.
type hookedLines struct{ lines []string }

func (*hookedLines) Levels() []logrus.Level { return logrus.AllLevels }

func (h *hookedLines) Fire(entry *logrus.Entry) error {
	h.lines = append(h.lines, entry.Message)
	return nil
}

func (h *hookedLines) count(line string) (n int) {
	for _, one := range h.lines {
		if one == line {
			n++
		}
	}
	return n
}

// containerd's service says that the network is gone before podfsm has taken it down. The log has that line when it is true.
func TestTornDownIsSaidAfterDEL(t *testing.T) {
	stop := func(s runtime.RuntimeServiceServer, ctx context.Context, id string) error {
		_, err := s.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: id})
		return err
	}
	remove := func(s runtime.RuntimeServiceServer, ctx context.Context, id string) error {
		_, err := s.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id})
		return err
	}
	failed := errors.New("DEL failed")
	for name, tc := range map[string]struct {
		id   string
		call func(runtime.RuntimeServiceServer, context.Context, string) error
		del  error
		want int
	}{
		"stop":                         {"s1", stop, nil, 1},
		"stop that fails":              {"s1", stop, failed, 0},
		"removal":                      {"s1", remove, nil, 1},
		"removal that fails":           {"s1", remove, failed, 0},
		"stop of one that is gone":     {"gone", stop, nil, 0},
		"removal of one that is gone":  {"gone", remove, nil, 0},
		"stop of another handler's":    {"theirs", stop, nil, 1},
		"removal of another handler's": {"theirs", remove, nil, 1},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, out := logged(t.Context())
			fired := &hookedLines{}
			log.G(ctx).Logger.AddHook(fired)
			line := `level=info msg="TearDown network for sandbox \"` + tc.id + `\" successfully" caller=kubelet`
			says := func(ctx context.Context, id string) {
				if id != "gone" {
					log.G(ctx).Infof("TearDown network for sandbox %q successfully", id)
				}
				log.G(ctx).WithField("of", "another matter").Debug("all else is said")
			}
			s := &stock{
				stop: func(ctx context.Context, r *runtime.StopPodSandboxRequest) (*runtime.StopPodSandboxResponse, error) {
					says(ctx, r.GetPodSandboxId())
					return &runtime.StopPodSandboxResponse{}, nil
				},
				remove: func(ctx context.Context, r *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error) {
					says(ctx, r.GetPodSandboxId())
					return &runtime.RemovePodSandboxResponse{}, nil
				},
			}
			del := func(context.Context, string) error {
				require.NotContains(t, out.String(), line, "before DEL")
				return tc.del
			}
			c := &controller{pods: map[string]Sandbox{"s1": {Config: podConfig()}, "gone": {Config: podConfig()}}, stop: del, remove: del}
			require.ErrorIs(t, tc.call(newFront(t, s, c), ctx, tc.id), tc.del)
			require.Equal(t, tc.want, strings.Count(out.String(), line), out.String())
			require.Equal(t, tc.want, fired.count(`TearDown network for sandbox "`+tc.id+`" successfully`))
			require.NotZero(t, fired.count("all else is said"))
			require.Contains(t, out.String(), `level=debug msg="all else is said" caller=kubelet of="another matter"`)
		})
	}
}
