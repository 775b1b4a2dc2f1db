package cni

import (
	"encoding/json"
	"fmt"
	"math"
	"strings"

	"github.com/containerd/errdefs"
	gocni "github.com/containerd/go-cni"
	"k8s.io/apimachinery/pkg/api/resource"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Args are the pairs of CNI_ARGS. Every plugin gets all of them.
type Args [][2]string

// Capabilities are the capability arguments by name (CONVENTIONS.md of the CNI project). A plugin gets those that its
// configuration declares.
type Capabilities map[string]json.RawMessage

// The capabilities that containerd's CRI knows.
const (
	capPodAnnotations = "io.kubernetes.cri.pod-annotations"
	capPortMappings   = "portMappings"
	capBandwidth      = "bandwidth"
	capDNS            = "dns"
	capCgroupPath     = "cgroupPath"
)

const (
	ingressAnnotation = "kubernetes.io/ingress-bandwidth"
	egressAnnotation  = "kubernetes.io/egress-bandwidth"
)

// The bandwidths that Kubernetes accepts, in bit/s.
var (
	minBandwidth = resource.MustParse("1k")
	maxBandwidth = resource.MustParse("1P")
)

// PodArgs returns the arguments and capabilities of a pod for CNI plugins: those of containerd's
// CRI, in a stable order. config and any message in it may be nil.
//
// Errors: InvalidArgument for a bandwidth that is invalid or out of range, and for metadata that
// would forge CNI_ARGS.
func PodArgs(id string, config *runtime.PodSandboxConfig) (Args, Capabilities, error) {
	args, err := podArgs(id, config.GetMetadata())
	if err != nil {
		return nil, nil, err
	}
	// The types are go-cni's: plugins read the keys that go-cni writes.
	values := map[string]any{capPodAnnotations: config.GetAnnotations()}
	if ports := portMappings(config.GetPortMappings()); len(ports) > 0 {
		values[capPortMappings] = ports
	}
	limits, err := bandwidth(config.GetAnnotations())
	if err != nil {
		return nil, nil, err
	}
	if limits != nil {
		values[capBandwidth] = limits
	}
	if dns := config.GetDnsConfig(); dns != nil {
		values[capDNS] = gocni.DNS{Servers: dns.GetServers(), Searches: dns.GetSearches(), Options: dns.GetOptions()}
	}
	if parent := config.GetLinux().GetCgroupParent(); parent != "" {
		values[capCgroupPath] = parent
	}

	capabilities := Capabilities{}
	for name, value := range values {
		data, err := json.Marshal(value)
		if err != nil {
			return nil, nil, fmt.Errorf("failed to encode CNI capability %q: %w", name, err)
		}
		capabilities[name] = data
	}
	return args, capabilities, nil
}

func podArgs(id string, metadata *runtime.PodSandboxMetadata) (Args, error) {
	args := Args{
		{"IgnoreUnknown", "1"},
		{"K8S_POD_NAMESPACE", metadata.GetNamespace()},
		{"K8S_POD_NAME", metadata.GetName()},
		{"K8S_POD_INFRA_CONTAINER_ID", id},
		{"K8S_POD_UID", metadata.GetUid()},
	}
	for _, arg := range args {
		// The pairs are joined as "K=V;K=V" in one environment variable.
		if strings.ContainsAny(arg[1], ";=\x00") {
			return nil, fmt.Errorf("invalid %s %q: CNI_ARGS can't hold a semicolon, an equals sign or a NUL: %w", arg[0], arg[1], errdefs.ErrInvalidArgument)
		}
	}
	return args, nil
}

func portMappings(mappings []*runtime.PortMapping) []gocni.PortMapping {
	var ports []gocni.PortMapping
	for _, m := range mappings {
		if m.GetHostPort() <= 0 {
			continue // a container port that isn't published
		}
		ports = append(ports, gocni.PortMapping{
			HostPort:      m.GetHostPort(),
			ContainerPort: m.GetContainerPort(),
			Protocol:      strings.ToLower(m.GetProtocol().String()),
			HostIP:        m.GetHostIp(),
		})
	}
	return ports
}

// bandwidth reads the pod's limits from its annotations. It is nil without a limit.
func bandwidth(annotations map[string]string) (*gocni.BandWidth, error) {
	ingress, err := bitRate(annotations, ingressAnnotation)
	if err != nil {
		return nil, err
	}
	egress, err := bitRate(annotations, egressAnnotation)
	if err != nil {
		return nil, err
	}
	if ingress == 0 && egress == 0 {
		return nil, nil
	}
	limits := &gocni.BandWidth{IngressRate: ingress, EgressRate: egress}
	if ingress != 0 {
		limits.IngressBurst = math.MaxUint32
	}
	if egress != 0 {
		limits.EgressBurst = math.MaxUint32
	}
	return limits, nil
}

// bitRate reads a rate in bit/s. It is 0 without the annotation; a rate of 0 is out of range.
func bitRate(annotations map[string]string, key string) (uint64, error) {
	text, ok := annotations[key]
	if !ok {
		return 0, nil
	}
	rate, err := parseQuantity(text)
	if err != nil {
		return 0, fmt.Errorf("annotation %s is not a bandwidth such as 10M: %w: %w", key, err, errdefs.ErrInvalidArgument)
	}
	if rate.Cmp(minBandwidth) < 0 || rate.Cmp(maxBandwidth) > 0 {
		return 0, fmt.Errorf("annotation %s must be from %v to %v bit/s: %w", key, &minBandwidth, &maxBandwidth, errdefs.ErrInvalidArgument)
	}
	return uint64(rate.Value()), nil
}

// parseQuantity is resource.ParseQuantity for untrusted texts. That computes powers of ten of any
// exponent, so that "1e999999999" would keep a CPU busy for hours.
func parseQuantity(text string) (resource.Quantity, error) {
	const maxLen, maxExponentLen = 32, len("e+15")
	if e := strings.IndexAny(text, "eE"); len(text) > maxLen || e >= 0 && len(text)-e > maxExponentLen {
		return resource.Quantity{}, resource.ErrFormatWrong
	}
	return resource.ParseQuantity(text)
}
