package states

import "testing"

// BenchmarkMachine is the machine of one sandbox, and its way to Ready as the engine goes it.
func BenchmarkMachine(b *testing.B) {
	b.Run("new", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := NewMachine(New); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("creation", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			m, err := NewMachine(New)
			if err != nil {
				b.Fatal(err)
			}
			for _, event := range CreationPath() {
				if _, err := m.Fire(b.Context(), event); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
	b.Run("can", func(b *testing.B) {
		m, err := NewMachine(Ready)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportAllocs()
		for b.Loop() {
			m.Can(Stop)
		}
	})
}
