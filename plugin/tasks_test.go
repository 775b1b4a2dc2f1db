package plugin

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// Filters that name tasks cost no look at all pauses; any other does.
func TestFiltersThatNameTasks(t *testing.T) {
	w := newWorld(t)
	w.run(t, "s1", named("s1"))
	w.run(t, "s2", named("s2"))
	service := &taskService{}
	service.of.Store(w.Controller)
	all := []string{"s1", "s2"}
	for _, tc := range []struct {
		filters, want []string
	}{
		{nil, all},
		{[]string{"id==c1"}, []string{"c1"}},
		{[]string{"id==c2", "id==c1", "id==c2"}, []string{"c1", "c2"}},
		{[]string{"id==c1", "namespace==k8s.io"}, all},
		{[]string{"id~=c1"}, all},
		{[]string{"id==c1,namespace==k8s.io"}, all},
		{[]string{`id=="c1"`}, all},
	} {
		require.ElementsMatch(t, tc.want, service.named(inCRI(t), tc.filters), "%q", tc.filters)
	}
}
