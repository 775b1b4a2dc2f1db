package states

import "testing"

// BenchmarkMachine makes the machine of one sandbox and fires the events up to Ready, as the engine
// does.
func BenchmarkMachine(b *testing.B) {
	b.Run("new", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			table.NewMachine()
		}
	})
	b.Run("creation", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			m := table.NewMachine()
			for _, event := range table.Path() {
				if _, err := m.Fire(b.Context(), event); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
	b.Run("can", func(b *testing.B) {
		m := in(b, Ready)
		b.ReportAllocs()
		for b.Loop() {
			m.Can(Stop)
		}
	})
}
