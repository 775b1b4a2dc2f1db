package ledger

import (
	"errors"
	"fmt"
	"reflect"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
)

// Key names one sandbox by containerd namespace and sandbox id. Both are valid identifiers of
// containerd.
type Key struct {
	Namespace string `json:"namespace"`
	ID        string `json:"id"`
}

func (k Key) String() string { return k.Namespace + "/" + k.ID }

// Kind is the kind of a Record. Replay keeps records of an unknown kind.
type Kind string

const (
	Begun      Kind = "begun"       // a sandbox was accepted; Data is its specification; always durable
	Intent     Kind = "intent"      // a step is about to act; Data is its plan
	Noted      Kind = "noted"       // progress inside a step; Data is the step's own
	Done       Kind = "done"        // a step is done; Data is its result
	UndoIntent Kind = "undo-intent" // a step is about to be undone
	UndoFailed Kind = "undo-failed" // an undo, or the end of pause, failed with Error
	Undone     Kind = "undone"      // a step was undone, or its undo was written off for the reason WrittenOff
	Moved      Kind = "moved"       // the state changed without a step; Goal is the goal of a stop
	Exited     Kind = "exited"      // pause exited; Data is the exit status
	Claimed    Kind = "claimed"     // the claim on the sandbox is Claim now
	// CleanupPending says that a cleanup that leads to Goal is pending because of Error. It is
	// always durable. Its stored name is the first format's: the release before reads only that.
	CleanupPending Kind = "owed"

	// Unreadable replaces a record whose bytes were damaged while the ledger was open. Error is the
	// reason. It is never written.
	Unreadable Kind = "unreadable"
)

// Record is one line of the ledger.
type Record struct {
	// Seq is assigned by Append. It grows, with gaps, also across restarts and reboots. Only Seq
	// orders records, never a clock.
	Seq  uint64 `json:"seq"`
	Key  Key    `json:"key"`
	Kind Kind   `json:"kind"`

	Step  string `json:"step,omitempty"`
	Goal  string `json:"goal,omitempty"`
	Claim string `json:"claim,omitempty"`

	// From, Event and State are set if the record stands for a transition: Event led from the state
	// From to State.
	From  string `json:"from,omitempty"`
	Event string `json:"event,omitempty"`
	State string `json:"state,omitempty"`
	// Nth is the number of the transition in the sandbox's history. After is how long the sandbox
	// was in From, by the monotonic clock. If an error led to the transition, Cause is the failed
	// step, and Class is the error's class.
	Nth   uint64        `json:"nth,omitempty"`
	After time.Duration `json:"after,omitempty"`
	Cause string        `json:"cause,omitempty"`
	Class string        `json:"class,omitempty"`

	// Holds and AtStop are of an Intent: the steps whose resources this step's resources use, and
	// whether a stop undoes the step. A release that doesn't know the step depends on them.
	Holds  []string `json:"holds,omitempty"`
	AtStop bool     `json:"at_stop,omitempty"`

	// WrittenOff is of an Undone: the reason why the undo was written off. Error is then the error
	// of the last try. A release that doesn't know the field doesn't retry the undo either.
	WrittenOff string `json:"written_off,omitempty"`

	// Interrupted is of an UndoIntent: a kill interrupted an earlier undo of the step, which may
	// have succeeded.
	Interrupted bool `json:"interrupted,omitempty"`

	// Release is the release of podfsm that wrote the record.
	Release string `json:"release,omitempty"`
	// TraceParent is the W3C trace context (https://www.w3.org/TR/trace-context/#traceparent-header).
	TraceParent string `json:"traceparent,omitempty"`
	// At is for display, never for ordering. Append sets it if it is zero.
	At time.Time `json:"at"`
	// Error is stored as valid UTF-8: invalid bytes become U+FFFD.
	Error string `json:"error,omitempty"`
	Data  *Data  `json:"data,omitempty"`

	// Durable says that the record outlives a reboot: it is synced before Append returns. Append
	// sets it for Begun and CleanupPending.
	Durable bool `json:"durable,omitempty"`
	// CanWait is for a durable record on which nothing that outlives a reboot depends yet. It
	// outlives a kill once Append has returned. It outlives a reboot with the sandbox's next
	// durable record that can't wait: one sync makes both durable. Begun can't wait.
	CanWait bool `json:"-"`
}

// Data is a value with its type. It is kept unchanged, also if this binary does not know the type.
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
		return nil, fmt.Errorf("failed to marshal ledger data: %w", err)
	}
	encoded, err := typeurl.MarshalAny(v)
	if err != nil {
		return nil, fmt.Errorf("failed to marshal ledger data %T: %w: %w", v, errdefs.ErrInvalidArgument, err)
	}
	return &Data{TypeURL: encoded.GetTypeUrl(), Value: encoded.GetValue()}, nil
}

// Unmarshal decodes the record's data into a pointer of the type that was marshalled. It returns
// NotFound if the record has no data, or if this binary doesn't know its type; InvalidArgument if
// into is not a pointer; DataLoss if the data is of another type or can't be decoded.
func (r *Record) Unmarshal(into any) error {
	if r.Data == nil {
		return fmt.Errorf("record %d (%s %s) of sandbox %q has no data: %w", r.Seq, r.Kind, r.Step, r.Key, errdefs.ErrNotFound)
	}
	if err := checkPointer(into); err != nil {
		return fmt.Errorf("failed to unmarshal ledger data: %w", err)
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

// checkPointer refuses a value that is not a pointer: typeurl would panic.
func checkPointer(v any) error {
	if rv := reflect.ValueOf(v); rv.Kind() != reflect.Pointer || rv.IsNil() {
		return fmt.Errorf("%T is not a pointer to a value: %w", v, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Sandbox has the records of one sandbox.
type Sandbox struct {
	Key Key
	// Records are in Seq order. If many records say the same, as those of a cleanup that is retried
	// for months do, the ledger keeps the first and the newest. Two records say the same if they
	// differ only in Seq, Nth, After, At, TraceParent, Release, Cause, Class and Error. So read a
	// step's condition from its newest record.
	Records []Record
}

// Damage is a part of a file that could not be read. The ledger works without it.
type Damage struct {
	File   string // the ledger's file, absolute if the ledger's directories are
	Kept   string // the copy for the operator; "" if the bytes are still in File, or were truncated as torn
	Key    Key    // of the sandbox; zero if unknown
	Reason string
	// Torn says that only the unfinished end of a log is lost: a record whose Append never
	// returned.
	Torn bool
}
