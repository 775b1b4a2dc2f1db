package records

import (
	"fmt"
	"sync"

	"github.com/podfsm/podfsm/states"
)

// Table is the table of states with this release's steps, for programs without containerd in them.
var Table = sync.OnceValue(func() *states.Table {
	table, err := states.NewTable(steps)
	if err != nil {
		panic(fmt.Sprintf("generated declarations: %v", err)) // the generator makes a table of them first
	}
	return table
})
