// Package ledger is podfsm's ledger. For every pod sandbox, it records what begins, what is about
// to be done, what is done, and what is pending. So recovery after kill -9 or a reboot is a set
// difference and not a guess.
//
// # Two logs
//
// Both are append-only files of the same format, ledger.log:
//
//   - The durable log, in the root directory, holds the records that must outlive a reboot. Append
//     returns once they are synced. A transaction is one write(2) and one fdatasync(2). Concurrent
//     durable writes share a transaction. It includes the waiting records of their sandboxes
//     (Record.CanWait).
//   - The log in the state directory holds every record, the durable ones too. It is never synced.
//     On a real node it is on a tmpfs. A record is one write(2).
//
// Open rewrites both logs with the live records alone. The ledger also rewrites a log that has
// grown too large. It writes another file and renames that over the old one. The durable log is
// rewritten between transactions, and the new file and its directory are synced.
//
// In memory, a record is only its sort keys and the place of its frame in the state directory's
// log. The ledger reads that log for a rewrite and for Sandboxes. A frame that the log lacks,
// because it was damaged or missing or an append failed, stays in memory until the log is
// rewritten. A record that waits for the durable log stays in memory until it is there.
//
// A frame is magic, length, CRC32C, JSON. The magic has bytes that never occur in JSON. So in a
// damaged file, the search for the next frame never takes a pod's data for a frame. The JSON is a
// header, a record, or a tombstone, which ends all earlier records of its sandbox.
//
// Only one daemon at a time has the ledger open: it holds a lock on the root directory, see
// flock(2). OpenReadOnly needs no lock.
//
// # Write order
//
// Durable records and tombstones go to the durable log first, and then to the state directory's
// log. So the durable log decides which sandboxes exist, and each crash has one reading. A record
// that can wait goes to the state directory's log at once. It goes to the durable log with the next
// record of its sandbox that can't wait.
//
//	crash                                            what replay finds
//	before a durable record is synced                the record or not: it was never acknowledged
//	between the sync and the other log               the record, from the durable log
//	before the transaction that a record waits for   the record, from the other log; after a reboot, nothing of it
//	inside an append (torn end)                      Damage with Torn set, the end is cut; the record was never acknowledged, or is durable
//	before the tombstone is synced                   the whole sandbox, or nothing of it
//	between the sync and the other log's tombstone   nothing of it: the durable log has the tombstone
//	inside a rewrite                                 the old log: the new one is renamed over it when complete
//	reboot, tmpfs emptied                            the durable records
//
// Replay is the union of both logs by sequence number, without the sandboxes that have a tombstone
// in either. If only the state directory's log has a sandbox, there are two cases. Its records may
// be older than the durable log's last rewrite: then the sandbox was forgotten, and the rewrite has
// dropped its tombstone. Otherwise the durable log has lost its end: that is damage, and the
// sandbox is kept.
//
// # Disks that fail
//
// A failed append is truncated. After a failed sync, the kernel counts the unwritten pages as
// clean, so the ledger rewrites the durable log before the next append. Each write tries again:
// writes succeed as soon as the disk works.
//
// Forget does not depend on a disk. If the durable log can't be written, the tombstone is in the
// state directory's log, or in memory if that fails, too. It goes to the durable log with the next
// transaction. Without one, the ledger retries with backoff until Close. Rewrites of the state
// directory's log keep such tombstones.
//
// # Damage
//
// The ledger skips what it can't read, and Damage reports it. A copy of the damaged file is kept
// beside it as *.damaged-N, and the ledger writes a new file from what it could read. A torn end is
// reported and truncated, without a copy. A log in a later format is set aside as a whole. Damage
// is never an error of Open.
//
// A log can also be damaged while it is open. If a rewrite would lose a record because of that, the
// log stays as it is and grows. That ends when the record's sandbox is forgotten, or with the next
// Open, which reports the loss. Sandboxes returns an Unreadable record for each.
package ledger
