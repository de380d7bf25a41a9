//! What a plan writes, and each row as it is changed.
//!
//! `plan_writes` reads a plan when the executor starts: which nodes write, to which tables. `modify_node` follows each of these
//! nodes, `count` is what runs per row, between the change of one row and the fetch of the next, and `capture` shows changed
//! rows to who wants to see them.
//!
//! What is promised: a row that the command tag counts is counted once, before the next one is fetched.

pub mod capture;
pub mod count;
pub mod modify_node;
pub mod plan_writes;
