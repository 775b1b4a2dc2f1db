package pause

import (
	"path"
	"strconv"
)

// The annotations by which containerd's CRI service tells runtimes and tools
// what a container is.
const (
	annotationContainerType    = "io.kubernetes.cri.container-type"
	annotationSandboxID        = "io.kubernetes.cri.sandbox-id"
	annotationSandboxName      = "io.kubernetes.cri.sandbox-name"
	annotationSandboxNamespace = "io.kubernetes.cri.sandbox-namespace"
	annotationSandboxUID       = "io.kubernetes.cri.sandbox-uid"
	annotationSandboxLogDir    = "io.kubernetes.cri.sandbox-log-directory"
	annotationSandboxImage     = "io.kubernetes.cri.podsandbox.image-name"
	annotationSandboxCPUPeriod = "io.kubernetes.cri.sandbox-cpu-period"
	annotationSandboxCPUQuota  = "io.kubernetes.cri.sandbox-cpu-quota"
	annotationSandboxCPUShares = "io.kubernetes.cri.sandbox-cpu-shares"
	annotationSandboxMemory    = "io.kubernetes.cri.sandbox-memory"

	containerTypeSandbox = "sandbox"

	// annotationShimGroup makes runc's shim join another shim, of any pod.
	annotationShimGroup = "io.containerd.runc.v2.group"
)

// annotations returns the pod's annotations that its runtime handler passes on, and
// our own, which win.
func annotations(pod Pod) map[string]string {
	all := passedOn(pod.Config.GetAnnotations(), pod.PodAnnotations)
	delete(all, annotationShimGroup)
	if res := pod.Config.GetLinux().GetResources(); res != nil {
		all[annotationSandboxCPUPeriod] = strconv.FormatInt(res.GetCpuPeriod(), 10)
		all[annotationSandboxCPUQuota] = strconv.FormatInt(res.GetCpuQuota(), 10)
		all[annotationSandboxCPUShares] = strconv.FormatInt(res.GetCpuShares(), 10)
		all[annotationSandboxMemory] = strconv.FormatInt(res.GetMemoryLimitInBytes(), 10)
	}
	metadata := pod.Config.GetMetadata()
	all[annotationContainerType] = containerTypeSandbox
	all[annotationSandboxID] = pod.ID
	all[annotationSandboxName] = metadata.GetName()
	all[annotationSandboxNamespace] = metadata.GetNamespace()
	all[annotationSandboxUID] = metadata.GetUid()
	all[annotationSandboxLogDir] = pod.Config.GetLogDirectory()
	all[annotationSandboxImage] = pod.ImageRef
	return all
}

// passedOn returns the annotations whose key matches one of the patterns. A
// malformed pattern matches nothing.
func passedOn(annotations map[string]string, patterns []string) map[string]string {
	matching := map[string]string{}
	for key, value := range annotations {
		for _, pattern := range patterns {
			if ok, _ := path.Match(pattern, key); ok {
				matching[key] = value
				break
			}
		}
	}
	return matching
}
