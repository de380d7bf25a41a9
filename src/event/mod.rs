//! The record of everything that was not simply allowed.
//!
//! `record` is the event as a document. What belongs to a refusal must survive the rollback that follows: it goes
//! through `queue`, in shared memory, to the background worker, and the refused client waits until it is on disk. What
//! belongs to a write that happens goes through `store` into the write's own transaction; what is worth knowing of a
//! transaction, but must not hinder it, waits in `at_commit` and is queued with the commit. `keep` carries the queue
//! over a restart. The worker takes from it with `serve`, stores with `batch` and notifies with `outbox`. `throttle` makes
//! one event of a loop's many. `prune` deletes what is older than the retention, `rounds` says which database is next.
//! `totals` counts, for monitoring. `statement` says how much of a statement is told. The server log has every event before
//! anything else. Not promised: an event that waits in the queue when the whole server crashes is in the log only.

pub mod at_commit;
pub mod batch;
pub mod keep;
pub mod line;
pub mod memory;
pub mod outbox;
pub mod prune;
pub mod queue;
pub mod record;
pub mod rounds;
pub mod serve;
pub mod statement;
pub mod store;
pub mod throttle;
pub mod totals;
