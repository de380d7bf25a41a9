//! What a plan writes, and each row as it is changed.
//!
//! `plan_writes` reads a plan when the executor starts: which nodes write, to which tables. `modify_node` has the
//! state of each of these nodes, `count` is what runs per row, between the change of one row and the fetch of the
//! next. `upsert` and `moved_row` find out what became of a row where the node's own counters do not say it.
//! `assigned_columns` asks what an update assigns. `charge_row` charges rows, and `capture` hands them to a rehearsal and to undo.
//!
//! What comes in are the executor's own structures. What goes out are charges, and errors to be raised between two
//! rows. What is promised: a row that the command tag counts is counted once, before the next one is fetched. Not
//! promised: rows one by one where a plan has no ModifyTable, or a foreign server changes rows by itself; their
//! number is checked when it is known.

pub mod assigned_columns;
pub mod capture;
pub mod charge_row;
pub mod count;
pub mod modify_node;
pub mod moved_row;
pub mod plan_writes;
pub mod upsert;
