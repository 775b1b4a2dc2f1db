package ledger

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/containerd/errdefs"
)

// A frame is magic, payload length (uint32, little endian), CRC32C of the payload (uint32, little endian), payload.
// 0xff and 0xfe never occur in UTF-8, so they never occur in the payload, which is JSON.
const (
	magic       = "\xffPJ\xfe"
	frameHeader = len(magic) + 4 + 4
	// maxPayload is the largest message that containerd's gRPC server accepts
	// (DefaultMaxRecvMsgSize). So no request can have more data.
	maxPayload = 16 << 20
)

// format is the version of both files. Raise it if an older reader would misread a newer file. A
// new JSON field needs no new version.
const format = 1

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)

	errShort = errors.New("frame is cut off")
)

// entry is the content of one frame: exactly one of the fields.
type entry struct {
	Header *header    `json:"header,omitempty"`
	Record *Record    `json:"record,omitempty"`
	Forgot *tombstone `json:"forgot,omitempty"`
}

// header describes the file that it is in.
type header struct {
	Format int `json:"format"`
	// BootID is the boot in which the file was written. BootSeq is the first sequence number of
	// that boot.
	BootID  string `json:"bootID"`
	BootSeq uint64 `json:"bootSeq"`
	// LastSeq is the last sequence number before the header was written.
	LastSeq uint64 `json:"lastSeq"`
	// Records is the number of records with which the file was written. Later appends don't count.
	Records int `json:"records,omitempty"`
}

// tombstone ends all records of Key up to Seq.
type tombstone struct {
	Seq uint64 `json:"seq"`
	Key Key    `json:"key"`
}

func (e entry) frame() ([]byte, error) {
	payload, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("failed to encode ledger record: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	if len(payload) > maxPayload {
		return nil, fmt.Errorf("ledger record of %d bytes exceeds the limit of %d: %w", len(payload), maxPayload, errdefs.ErrInvalidArgument)
	}
	b := make([]byte, 0, frameHeader+len(payload))
	b = append(b, magic...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(payload, castagnoli))
	return append(b, payload...), nil
}

// frameSum returns the checksum in a frame.
func frameSum(frame []byte) uint32 { return binary.LittleEndian.Uint32(frame[len(magic)+4:]) }

// cutFrame returns the payload and the length of the frame at the start of b. It returns errShort
// if b ends before the frame does.
func cutFrame(b []byte) (payload []byte, size int, err error) {
	if n := min(len(b), len(magic)); !bytes.Equal(b[:n], []byte(magic[:n])) {
		return nil, 0, errors.New("no frame begins here")
	}
	if len(b) < frameHeader {
		return nil, 0, errShort
	}
	length := binary.LittleEndian.Uint32(b[len(magic):])
	sum := binary.LittleEndian.Uint32(b[len(magic)+4:])
	if length > maxPayload {
		return nil, 0, fmt.Errorf("frame claims %d bytes", length)
	}
	size = frameHeader + int(length)
	if len(b) < size {
		return nil, 0, errShort
	}
	payload = b[frameHeader:size]
	if crc32.Checksum(payload, castagnoli) != sum {
		return nil, 0, errors.New("checksum mismatch")
	}
	return payload, size, nil
}

// decodeFrame decodes b, which must be exactly one frame.
func decodeFrame(b []byte) (entry, error) {
	payload, size, err := cutFrame(b)
	if err != nil {
		return entry{}, err
	}
	if size != len(b) {
		return entry{}, fmt.Errorf("%d bytes after the frame", len(b)-size)
	}
	var e entry
	if err := json.Unmarshal(payload, &e); err != nil {
		return entry{}, fmt.Errorf("undecodable frame: %w", err)
	}
	switch {
	case e.Header != nil && e.Record == nil && e.Forgot == nil:
		return e, nil
	case e.Record != nil && e.Header == nil && e.Forgot == nil:
		if r := e.Record; r.Seq == 0 || r.Kind == "" || r.Key.Namespace == "" || r.Key.ID == "" {
			return entry{}, errors.New("record without sequence number, kind or key")
		}
		return e, nil
	case e.Forgot != nil && e.Header == nil && e.Record == nil:
		return e, nil
	}
	return entry{}, errors.New("frame is neither a header nor a record nor a tombstone")
}
