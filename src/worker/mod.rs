//! The background processes: they store events, send notifications, and delete what is older than the settings say.
//!
//! `store_worker` has the launcher and the workers, `batch` stores what a worker took from the queue. The launcher sends a
//! `pruner` to one database after another, where `prune` deletes; `prune_schedule` (pure) says which database is next.
//!
//! What comes in is the queue in shared memory, laid out in `event`. What goes out are rows of `writeguard.event`,
//! notifications, and fewer old rows. Not promised: that an event is stored while a lock, a full disk or a missing worker slot
//! prevents it; it waits in the queue until then. None of these processes runs on a standby.

pub mod batch;
pub mod prune;
pub mod prune_schedule;
pub mod pruner;
pub mod store_worker;
