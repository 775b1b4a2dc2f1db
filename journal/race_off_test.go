//go:build !race

package journal

const flipStep = 1
