//! What happens past a limit: pass, record, warn or refuse.
//!
//! `violation` takes rows that are past a limit to the decision, `decide` makes it and records it. `overrides` has
//! the limits that were lifted on purpose, and how many rows that covers; `reviewed_rows` knows which rows these are,
//! and `reviewed_objects` which relations and functions are met on the way. `expect` holds one command to the number
//! of rows that the client gave.
//!
//! What comes in is an attempt: relation, policy, limit and statement. What goes out is a lift, a note, or an error
//! whose event is on disk. Nothing is counted here. Not promised: that the event is on disk after
//! `writeguard.event_timeout`.

pub mod decide;
pub mod expect;
pub mod overrides;
pub mod reviewed_objects;
pub mod reviewed_rows;
pub mod violation;
