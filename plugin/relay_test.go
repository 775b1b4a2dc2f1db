package plugin

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestRelayGoesOnAfterAPanic(t *testing.T) {
	var passed []int
	r := &relay[int]{bound: 10, pass: func(n int) {
		if n == 2 {
			panic("no luck")
		}
		passed = append(passed, n)
	}}
	for n := range 4 {
		r.send(n)
	}
	r.flush(t.Context())
	require.Equal(t, []int{0, 1, 3}, passed)
}
