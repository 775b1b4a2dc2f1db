package records

import (
	"fmt"
	"sync"

	"github.com/podfsm/podfsm/states"
)

// Table returns the table of states with this release's steps, for programs that don't link
// containerd.
var Table = sync.OnceValue(func() *states.Table {
	table, err := states.NewTable(steps)
	if err != nil {
		panic(fmt.Sprintf("generated declarations: %v", err)) // never happens: the generator makes a table of them
	}
	return table
})
