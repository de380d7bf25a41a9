//! The record of everything that was not simply allowed.
//!
//! `record` is the event as a document, and `statement` says how much of a statement is
//! told. What belongs to a refusal must survive the rollback that follows: it goes through `queue`, in shared memory
//! (`memory`), to a background worker, and the refused client waits until it is on disk. What belongs to a write that happens
//! goes through `store` into the write's own transaction; what is worth knowing of a transaction, but must not hinder it,
//! waits in `at_commit` and is queued with the commit. `serve` is the worker's side of the queue, `outbox` has the
//! notifications that are still to be sent, `restored` keeps the numbers that a restore brings, `queue_file` carries the queue over a restart. `rate_limit` makes one event of
//! a loop's many, `counters` are for monitoring.
//!
//! What is promised: the server log has every event before anything else, and a refused client has its event on disk. Not
//! promised: an event that waits in the queue when the whole server crashes is in the log only.

pub mod at_commit;
pub mod counters;
pub mod memory;
pub mod outbox;
pub mod queue;
pub mod queue_file;
pub mod rate_limit;
pub mod record;
pub mod restored;
pub mod serve;
pub mod statement;
pub mod store;
