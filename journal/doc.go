// Package journal is podfsm's ledger: the record of what was begun, is about to be done, was done and is still owed
// for every pod sandbox, kept so that recovery after kill -9 or a reboot is a set difference and not a guess.
//
// # Two files
//
//   - ROOT/ledger.db (bbolt) holds the records that must outlive a reboot. Append returns once they are fsynced.
//     Concurrent durable writes share a transaction, and take along what of their sandboxes has waited for one (Record.CanWait).
//   - STATE/ledger.log holds every record, the durable ones too. It is append-only, never fsynced, and on a real node
//     on tmpfs: one write(2) a record. It is rewritten with only the live sandboxes at Open and when it has outgrown them.
//
// In memory a record is only where its frame stands in the log, and what it is sorted by. The log is read when it is rewritten and for
// Sandboxes. What it doesn't have yet, because it was damaged or missing or an append failed, stays in memory until it is rewritten, and
// what can wait for ledger.db until it is there.
//
// Both hold the same frames: magic, length, CRC32C, JSON. The magic holds bytes that never occur in JSON, so nothing that
// a pod puts into a record can be mistaken for a frame when a damaged file is searched for the next one.
//
// # Write order
//
// A durable record is committed to ledger.db before it is appended to ledger.log. Forget deletes from ledger.db before it
// appends a tombstone to ledger.log. So ledger.db alone decides which sandboxes exist, and each crash has one reading. A record that
// can wait is appended to ledger.log at once, and committed to ledger.db with the next of its sandbox that can't.
//
//	crash                                          what replay finds
//	before the bbolt commit of a durable record    the record in neither file: it was never acknowledged
//	between the commit and the log append          the record, from ledger.db
//	before the commit that a record waits for      the record, from ledger.log: it waits on; after a reboot, nothing of it
//	inside the log append (torn tail)              Damage with Torn set; the record is there if it is durable
//	before the bbolt commit of Forget              the whole sandbox
//	between the commit and the tombstone           log records of a sandbox that ledger.db does not know: dropped
//	inside a rewrite of the log                    the old log: the new one is renamed over it when complete
//	reboot, tmpfs emptied                          the durable records
//
// Replay is the union of both files by sequence number. When ledger.db is damaged or missing while the log has records,
// the log and its tombstones decide alone, together with what could still be read of ledger.db.
//
// # Damage
//
// bbolt panics, loops or faults on a file that was cut or altered. So it never gets one: ledger.db is first read
// page by page with bounds checks (see boltWalk). Whatever cannot be read is reported by Damage, a copy of the damaged file
// is kept beside it as *.damaged-N, and a new file is written from what could be read. Damage is never an error of Open.
//
// The log can be damaged while it is open, too. A rewrite that would lose a record because of that leaves the log as it is, growing,
// until the record's sandbox is forgotten, or the next Open reports what is lost. Sandboxes has an Unreadable record in the place of each.
package journal
