package integration

import (
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/stretchr/testify/require"

	"github.com/podfsm/podfsm/integration/harness"
)

// scraped is the result of a scrape: values by metric and labels as Prometheus writes them, sorted
// by label, such as podfsm_pending_cleanups{step="attach_network"}. A histogram has its _count and
// _sum.
type scraped map[string]float64

// scrape reads the daemon's metrics as Prometheus does: those of podfsm, and the start time of the
// process, which the dashboard uses.
func scrape(t *testing.T, n *harness.Node) scraped {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+harness.MetricsAddress+"/v1/metrics", nil)
	require.NoError(t, err)
	resp, err := n.HTTP().Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	require.Equal(t, http.StatusOK, resp.StatusCode)
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(resp.Body)
	require.NoError(t, err)

	found := scraped{}
	for name, family := range families {
		if !strings.HasPrefix(name, "podfsm_") && name != processStart {
			continue
		}
		for _, m := range family.GetMetric() {
			labels := labelsOf(m)
			switch family.GetType() {
			case dto.MetricType_HISTOGRAM:
				found[name+"_count"+labels] = float64(m.GetHistogram().GetSampleCount())
				found[name+"_sum"+labels] = m.GetHistogram().GetSampleSum()
			case dto.MetricType_COUNTER:
				found[name+labels] = m.GetCounter().GetValue()
			default:
				found[name+labels] = m.GetGauge().GetValue()
			}
		}
	}
	return found
}

// processStart is a metric of every process that uses Prometheus' library.
const processStart = "process_start_time_seconds"

func labelsOf(m *dto.Metric) string {
	var labels []string
	for _, l := range m.GetLabel() {
		labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
	}
	if len(labels) == 0 {
		return ""
	}
	slices.Sort(labels)
	return "{" + strings.Join(labels, ",") + "}"
}

// increase returns what has grown since an earlier scrape of the same daemon, without times.
func (s scraped) increase(before scraped, prefixes ...string) map[string]float64 {
	grown := map[string]float64{}
	for name, value := range s {
		wanted := slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(name, "podfsm_"+p) })
		if wanted && !strings.Contains(name, "_sum") && value != before[name] {
			grown[name] = value - before[name]
		}
	}
	return grown
}

// nonzero returns the values of a metric that are not 0.
func (s scraped) nonzero(name string) map[string]float64 {
	return s.increase(scraped{}, name)
}

// value is a value of a scrape in its parts.
var value = regexp.MustCompile(`^(\w+?)(_count|_sum)?(?:\{(.*)\})?$`)

// known returns the labels and their values of each metric in a scrape.
func (s scraped) known() map[string]map[string]map[string]bool {
	known := map[string]map[string]map[string]bool{}
	add := func(metric string, labels map[string]string) {
		if known[metric] == nil {
			known[metric] = map[string]map[string]bool{}
		}
		for label, is := range labels {
			if known[metric][label] == nil {
				known[metric][label] = map[string]bool{}
			}
			known[metric][label][is] = true
		}
	}
	for name := range s {
		parts := value.FindStringSubmatch(name)
		labels := map[string]string{}
		for _, pair := range regexp.MustCompile(`(\w+)="([^"]*)"`).FindAllStringSubmatch(parts[3], -1) {
			labels[pair[1]] = pair[2]
		}
		add(parts[1]+parts[2], labels)
		if parts[2] != "" {
			labels["le"] = "+Inf"
			add(parts[1]+"_bucket", labels)
		}
	}
	return known
}
