//! Commands that make rows vanish, rewrite them, or take tables out of a policy's names, without changing them one by one.
//!
//! `command` follows what PostgreSQL announces of a utility command, `leaving_coverage` compares which policies name a table
//! before and after it, `live_rows` counts and charges the rows that a table has, `own_tables` tells who made the rows of
//! the extension's own tables vanish.

pub mod command;
pub mod leaving_coverage;
pub mod live_rows;
pub mod own_tables;
