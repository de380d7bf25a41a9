//! Commands that make rows vanish, rewrite them, or take tables out of a policy's names, without changing them one
//! by one.
//!
//! `command` follows what PostgreSQL announces of a utility command, `leaving_coverage` compares which policies
//! name a table before and after it, `live_rows` counts and charges the rows that a table has, `own_tables` records
//! who made the rows of the extension's own tables vanish, or altered these.
//!
//! What comes in are utility commands and accesses to objects. What goes out are charges, errors and `uncovered`
//! events. Not promised: the rows of foreign tables, and commands in another database, such as DROP DATABASE.

pub mod command;
pub mod leaving_coverage;
pub mod live_rows;
pub mod own_tables;
