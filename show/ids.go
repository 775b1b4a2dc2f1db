package show

import (
	"strings"

	"google.golang.org/protobuf/types/known/timestamppb"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/userns"
)

// IDs returns the id ranges of all pods as the API shows them. failed is the error of the search on
// the host; nil if it succeeded.
func IDs(overview userns.Overview, failed error) *podfsmv1.IDsResponse {
	response := &podfsmv1.IDsResponse{SearchError: Text(failed), Pool: poolOf(overview.Pool)}
	for _, h := range overview.Holders {
		namespace, id, _ := strings.Cut(h.ID, "/")
		podNamespace, podName, _ := strings.Cut(h.Pod, "/")
		response.Holders = append(response.Holders, &podfsmv1.IDHolder{
			SandboxId: id, ContainerdNamespace: namespace, PodName: podName, PodNamespace: podNamespace,
			Origin: string(h.Origin), Userns: mappingOf(&h.Mappings), Since: timestamp(h.Since),
		})
	}
	for _, r := range overview.Refusals {
		podNamespace, podName, _ := strings.Cut(r.Pod, "/")
		response.Refusals = append(response.Refusals, &podfsmv1.IDRefusal{
			PodName: podName, PodNamespace: podNamespace, Reason: strings.ToValidUTF8(r.Reason, "\uFFFD"), At: timestamppb.New(r.At), Count: uint32(r.Count),
		})
	}
	return response
}

func poolOf(pool *userns.PoolOverview) *podfsmv1.IDPool {
	if pool == nil {
		return nil
	}
	p := &podfsmv1.IDPool{Source: pool.Source, Ranges: uint32(pool.Ranges), Held: uint32(pool.Held), Free: uint32(pool.Free)}
	for _, q := range pool.Quarantined {
		p.Quarantine = append(p.Quarantine, &podfsmv1.QuarantinedIDs{Userns: mappingOf(&q.Mappings), UsedBy: strings.ToValidUTF8(q.UsedBy, "\uFFFD")})
	}
	return p
}
