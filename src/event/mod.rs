//! The record of everything that was not simply allowed.
//!
//! `record` is the event as a document, and `statement` decides how much of a statement's text it has. What belongs
//! to a refusal must survive the rollback that follows: it goes through `queue`, in shared memory (`memory`), to a
//! background worker, and the refused client waits until it is on disk. What belongs to a write that happens goes
//! through `store` into the write's own transaction. What belongs to a transaction, but must not make it fail,
//! waits in `at_commit` and is queued with the commit. `serve` is the worker's side of the queue, `outbox` has the
//! notifications that are still to be sent, `queue_file` keeps the queue over a shutdown, `restored` the numbers of
//! events that a restore brings. `rate_limit` makes one event of a loop's many, `counters` are for monitoring.
//!
//! What comes in are events. What goes out are lines of the server log, rows of `writeguard.event` and
//! notifications. What is promised: an event that is recorded by itself has a line in the server log, before it is
//! stored; a refused client has its event on disk, or waited for it as long as `writeguard.event_timeout` says. Not
//! promised: an event that waits in the queue when the whole server crashes is in the log only, and a number that
//! `rate_limit` holds then is lost.

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
