package feed

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestWaitForReturnsWhatArrivesLater(t *testing.T) {
	var f Feed[int]
	f.Add(1)

	waiting := make(chan struct{})
	go func() {
		<-waiting
		f.Add(2)
		f.Add(3, 4)
	}()

	items, err := f.WaitFor(t.Context(), func(items []int) bool {
		if len(items) == 1 {
			close(waiting)
		}
		return len(items) == 4
	})
	require.NoError(t, err)
	require.Equal(t, []int{1, 2, 3, 4}, items)
}

func TestWaitForEndsWithItsContext(t *testing.T) {
	var f Feed[string]
	f.Add("early")
	ctx, cancel := context.WithCancel(t.Context())

	items, err := f.WaitFor(ctx, func([]string) bool {
		cancel()
		return false
	})
	require.ErrorIs(t, err, context.Canceled)
	require.Equal(t, []string{"early"}, items)
}

func TestItemsIsACopy(t *testing.T) {
	var f Feed[int]
	f.Add(1, 2)
	f.Items()[0] = 9
	require.Equal(t, []int{1, 2}, f.Items())
}
