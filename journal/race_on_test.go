//go:build race

package journal

// flipStep makes the tests that flip each byte of a file flip every 13th: the race detector slows them down tenfold, and
// they have one goroutine.
const flipStep = 13
