//! The background processes. `store_worker` has the launcher and the workers that store what waits in the queue of events
//! (`batch`) and send their notifications; `pruner` is sent to one database after another to delete what is older than the
//! settings say (`prune`), and `prune_schedule` (pure) says which one is next.
//!
//! What they take in is shared memory, laid out in `event`. None of them runs on a standby.

pub mod batch;
pub mod prune;
pub mod prune_schedule;
pub mod pruner;
pub mod store_worker;
