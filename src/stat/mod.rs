//! Statistics of what covered statements change: by table, role and operation, how many statements there were and how many
//! rows each of them changed, as a histogram.
//!
//! `memory` keeps the counters of all databases in shared memory of a fixed size. `counters` is a backend's access to them, and
//! what the guard calls for each statement. `store` keeps them in a file, so that they are there after a restart. `rules::stat`
//! says which statement belongs into which bucket and makes limits of them, `api` is what SQL calls.
//!
//! What counts is the attempt: a statement that was rolled back or refused is in here with the rows that it came to. Not
//! promised: statements that changed no row, and exact numbers where the table of counters is too small, so that one
//! entry is given to another key.

pub mod api;
pub mod counters;
pub mod memory;
pub mod store;
