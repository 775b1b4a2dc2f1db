package owners

// The tests of the strategies use the snapshotter, which uses this package: they are of a package of their own.

type (
	Forest = forest
	File   = file
)

var (
	Look       = look
	LookInside = lookInside
	PodMap     = podMap
)
