// Package journal is podfsm's ledger: the record of what was begun, is about to be done, was done and is still owed
// for every pod sandbox, kept so that recovery after kill -9 or a reboot is a set difference and not a guess.
//
// # Two logs
//
// Both are append-only files of the same format, ledger.log:
//
//   - The durable log, in the root directory, holds the records that must outlive a reboot. Append returns once they are synced.
//     A transaction is one write(2) and one fdatasync(2). Concurrent durable writes share a transaction, and take along what of their
//     sandboxes has waited for one (Record.CanWait).
//   - The log in the state directory holds every record, the durable ones too. It is never synced, and on a real node
//     on tmpfs: one write(2) per record.
//
// Open writes both anew with only what is live, and so does the ledger when one has outgrown that: to another file, which is renamed over
// the old one. The durable log is rewritten between transactions, and the new file and its directory are synced.
//
// In memory a record is only where its frame stands in the state directory's log, and what it is sorted by. That log is read when one is
// rewritten and for Sandboxes. What it doesn't have yet, because it was damaged or missing or an append failed, stays in memory until it
// is rewritten, and what can wait for the durable log until it is there.
//
// A frame is magic, length, CRC32C, JSON. The magic holds bytes that never occur in JSON, so nothing that
// a pod puts into a record can be mistaken for a frame when a damaged file is searched for the next one. The JSON is a header, a record, or
// a tombstone, which ends all earlier records of its sandbox.
//
// One daemon at a time has the ledger open: it holds a lock on the root directory, see flock(2). OpenReadOnly needs none.
//
// # Write order
//
// Durable records and tombstones go to the durable log before they go to the other one. So the durable log decides which sandboxes exist,
// and each crash has one reading. A record that can wait is appended to the state directory's log at once, and to the durable one with the
// next of its sandbox that can't.
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
// Replay is the union of both logs by sequence number, without what either has a tombstone for. A sandbox that the durable log lacks and
// the other one has was forgotten if its records are older than the durable log's last rewrite, which has dropped the tombstone.
// Else it was not forgotten, and the durable log has lost its end: that is damage, and the sandbox is kept.
//
// # Disks that fail
//
// A failed append is cut off again. After a failed sync the kernel takes what it couldn't write for written, so the durable log is
// rewritten before anything else is appended. Each write tries anew: it works as soon as the disk does.
//
// Forget does not depend on a disk. Where the durable log can't be written to, the tombstone is in the other log, or in memory if that
// fails, too. It goes to the durable log with the next transaction, or by itself, tried with backoff until Close. Rewrites of
// the state directory's log keep such tombstones.
//
// # Damage
//
// Whatever cannot be read is skipped and reported by Damage, a copy of the damaged file is kept beside it as *.damaged-N, and a new file is
// written from what could be read. A torn end is reported, and cut without a copy. A log that was written in a later format is set aside as
// a whole. Damage is never an error of Open.
//
// A log can be damaged while it is open, too. A rewrite that would lose a record because of that leaves the log as it is, growing,
// until the record's sandbox is forgotten, or the next Open reports what is lost. Sandboxes has an Unreadable record in the place of each.
package journal
