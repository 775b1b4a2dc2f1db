package journal

import (
	"errors"
	"fmt"
	"reflect"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
)

// Key names one sandbox: containerd namespace and sandbox id, both valid by containerd's pkg/identifiers.
type Key struct {
	Namespace string `json:"namespace"`
	ID        string `json:"id"`
}

func (k Key) String() string { return k.Namespace + "/" + k.ID }

// Kind says what a Record states. Kinds that this version does not know survive replay.
type Kind string

const (
	Begun      Kind = "begun"       // a sandbox was accepted; Data is its specification. Always durable.
	Intent     Kind = "intent"      // a step is about to act; Data holds the handles it may create
	Noted      Kind = "noted"       // progress inside a step; Data is the step's own record
	Done       Kind = "done"        // a step acted; Data is its result
	UndoIntent Kind = "undo-intent" // a step is about to be undone
	UndoFailed Kind = "undo-failed" // an undo, or the end of pause, has failed: Error says why
	Undone     Kind = "undone"      // a step was undone, or is never going to be: WrittenOff says why
	Moved      Kind = "moved"       // the state changed though no step was done; Goal is what a stop is for
	Exited     Kind = "exited"      // pause exited; Data is the exit status
	Claimed    Kind = "claimed"     // somebody has seen the sandbox, or has it, or it is discarded: Claim says which
	Owed       Kind = "owed"        // the state changed because an undo failed; Error says why, Goal what the undo was for. Always durable.

	// Unreadable stands in the place of a record whose bytes were damaged while the ledger was open; Error says how. It is never written.
	Unreadable Kind = "unreadable"
)

// Record is one line of the ledger.
type Record struct {
	// Seq is assigned by Append. It grows over the life of the ledger, restarts and reboots included, with gaps.
	// It orders everything; clocks don't.
	Seq  uint64 `json:"seq"`
	Key  Key    `json:"key"`
	Kind Kind   `json:"kind"`

	Step  string `json:"step,omitempty"`
	Goal  string `json:"goal,omitempty"`
	Claim string `json:"claim,omitempty"`

	// From, Event and State are of a record that stands for a transition, whatever its kind: Event led from the state From to State.
	From  string `json:"from,omitempty"`
	Event string `json:"event,omitempty"`
	State string `json:"state,omitempty"`
	// Nth, After, Cause and Class are of such a record, too: the transition's number in the sandbox's history, how long the sandbox was in
	// From by the monotonic clock, and, where an error led to it, the step that failed and the error's class.
	Nth   uint64        `json:"nth,omitempty"`
	After time.Duration `json:"after,omitempty"`
	Cause string        `json:"cause,omitempty"`
	Class string        `json:"class,omitempty"`

	// Holds and AtStop are of an Intent: the steps whose resources the step's own use, and whether the step is undone at a stop. A
	// release that doesn't know the step goes by them.
	Holds  []string `json:"holds,omitempty"`
	AtStop bool     `json:"at_stop,omitempty"`

	// WrittenOff is of an Undone whose undo was given up: the reason. Error is then that of the last try. A release that doesn't know the
	// field doesn't try again either.
	WrittenOff string `json:"written_off,omitempty"`

	// Interrupted is of an UndoIntent: an earlier undo of the step was interrupted by a kill, and may have succeeded.
	Interrupted bool `json:"interrupted,omitempty"`

	// Release is the release of podfsm that wrote the record.
	Release string `json:"release,omitempty"`
	// TraceParent is the W3C trace context (https://www.w3.org/TR/trace-context/#traceparent-header).
	TraceParent string `json:"traceparent,omitempty"`
	// At is for people to read, never for ordering. Append sets it when it is zero.
	At time.Time `json:"at"`
	// Error is stored as valid UTF-8: other bytes become U+FFFD.
	Error string `json:"error,omitempty"`
	Data  *Data  `json:"data,omitempty"`

	// Durable records outlive a reboot: they are fsynced before Append returns. Append sets it for Begun and Owed.
	Durable bool `json:"durable,omitempty"`
	// CanWait is for a durable record that nothing which outlives a reboot depends on yet. A kill doesn't lose it once Append has
	// returned, but a reboot may, until the sandbox's next durable record that can't wait: they become durable together, by one
	// fsync. A sandbox can't begin with such a record.
	CanWait bool `json:"-"`
}

// Data is a value with its type. It is kept as it is, also when this binary does not know the type.
type Data struct {
	TypeURL string `json:"type"`
	Value   []byte `json:"value"`
}

var _ typeurl.Any = (*Data)(nil)

// GetTypeUrl implements typeurl.Any.
func (d *Data) GetTypeUrl() string {
	if d == nil {
		return ""
	}
	return d.TypeURL
}

// GetValue implements typeurl.Any.
func (d *Data) GetValue() []byte {
	if d == nil {
		return nil
	}
	return d.Value
}

// Marshal encodes v, a protobuf message, a typeurl.Any, or a pointer to a type registered with typeurl.Register.
// It returns InvalidArgument for anything else.
func Marshal(v any) (*Data, error) {
	if err := checkPointer(v); err != nil {
		return nil, fmt.Errorf("failed to marshal journal data: %w", err)
	}
	encoded, err := typeurl.MarshalAny(v)
	if err != nil {
		return nil, fmt.Errorf("failed to marshal journal data %T: %w: %w", v, errdefs.ErrInvalidArgument, err)
	}
	return &Data{TypeURL: encoded.GetTypeUrl(), Value: encoded.GetValue()}, nil
}

// Unmarshal decodes the record's data into a pointer of the type that was marshalled. It returns NotFound when the record
// has no data or its type is not registered in this binary, InvalidArgument when into is not a pointer, and DataLoss when
// the data is of another type or does not decode.
func (r *Record) Unmarshal(into any) error {
	if r.Data == nil {
		return fmt.Errorf("record %d (%s %s) of sandbox %q has no data: %w", r.Seq, r.Kind, r.Step, r.Key, errdefs.ErrNotFound)
	}
	if err := checkPointer(into); err != nil {
		return fmt.Errorf("failed to unmarshal journal data: %w", err)
	}
	if err := typeurl.UnmarshalTo(r.Data, into); err != nil {
		class := error(errdefs.ErrDataLoss)
		if errors.Is(err, typeurl.ErrNotFound) {
			class = errdefs.ErrNotFound
		}
		return fmt.Errorf("failed to unmarshal record %d (%s %s) of sandbox %q: %w: %w", r.Seq, r.Kind, r.Step, r.Key, class, err)
	}
	return nil
}

// checkPointer refuses what makes typeurl panic: it dereferences every value that it is given.
func checkPointer(v any) error {
	if rv := reflect.ValueOf(v); rv.Kind() != reflect.Pointer || rv.IsNil() {
		return fmt.Errorf("%T is not a pointer to a value: %w", v, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Sandbox is what the ledger holds of one sandbox.
type Sandbox struct {
	Key Key
	// Records are in Seq order. Of records that say the same again and again (a debt that is retried for months) the first
	// and the newest are kept: equal are those that differ only in Seq, Nth, After, At, TraceParent, Release, Cause, Class and Error.
	// So read a step's condition from its newest record.
	Records []Record
}

// Damage is something that could not be read. None of it keeps the ledger from working.
type Damage struct {
	File   string // the ledger's file, absolute if the ledger's directories are
	Kept   string // where its bytes as they were found are kept for the operator; empty if they are still in File, or were cut as torn
	Key    Key    // the sandbox concerned; zero if not known
	Reason string
	// Torn is set when all that is lost is the unfinished end of a log: a record whose Append has never returned.
	Torn bool
}
