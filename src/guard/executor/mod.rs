//! What a plan writes, and each row as it is changed.
//!
//! `plan_writes` reads a plan when the executor starts: which nodes write, to which tables. `modify_node` follows each of these
//! nodes, `count` is what runs per row, between the change of one row and the fetch of the next. `upsert` and `moved_row` tell what
//! became of a row where the node's own counters do not; `charge_row` charges it, and `capture` shows it to who wants to see
//! it.
//!
//! What is promised: a row that the command tag counts is counted once, before the next one is fetched.

pub mod capture;
pub mod charge_row;
pub mod count;
pub mod modify_node;
pub mod moved_row;
pub mod plan_writes;
pub mod upsert;
