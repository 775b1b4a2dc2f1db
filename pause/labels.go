package pause

import (
	"maps"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/labels"
)

const (
	// labelKind tells containerd's CRI service and cAdvisor what a container
	// is. The CRI service deletes at its start the directories of sandboxes that
	// have no container of kind "sandbox".
	labelKind        = labels.CRIContainerdPrefix + ".kind"
	labelKindSandbox = "sandbox"

	// extensionStock marks a pause container of containerd's own controller.
	extensionStock = labels.CRIContainerdPrefix + ".sandbox.metadata"

	// The CRI service takes these two from a sandbox's instance labels.
	labelRuntimeType  = "oci_runtime_type"
	labelSELinuxLabel = "selinux_label"
)

// Labels returns the labels of a pause container: those of its image, the pod's
// over them, and the CRI service's kind.
//
// Labels of the namespaces that containerd reserves are left out because they
// steer it (containerd.io/restart.status starts and stops tasks), and labels of
// the image that are too long for containerd.
func Labels(pod, image map[string]string) map[string]string {
	all := map[string]string{}
	for key, value := range image {
		if labels.Validate(key, value) == nil {
			all[key] = value
		}
	}
	maps.Copy(all, pod)
	maps.DeleteFunc(all, func(key, _ string) bool { return labels.IsReserved(key) })
	all[labelKind] = labelKindSandbox
	return all
}

// IsPause tells whether a container's record is of a pause container that this
// package makes: containerd's own have the same kind, and an extension.
func IsPause(record containers.Container) bool {
	_, stock := record.Extensions[extensionStock]
	return record.Labels[labelKind] == labelKindSandbox && !stock
}

// InstanceLabels returns the labels of a sandbox's instance, as the CRI service
// expects them from a sandbox controller: those of the container, the runtime's
// type and the SELinux label of the pod's processes.
func InstanceLabels(container map[string]string, runtimeType, processLabel string) map[string]string {
	all := maps.Clone(container)
	if all == nil {
		all = map[string]string{}
	}
	all[labelRuntimeType] = runtimeType
	all[labelSELinuxLabel] = processLabel
	return all
}
