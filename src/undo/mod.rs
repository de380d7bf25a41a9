//! Undo: a write that was let through keeps its rows as they were, and one call puts them back.
//!
//! `print` turns a row's columns into text and back, always under the settings in `modes`, so that what one session
//! wrote another one reads. `keep` takes each changed row of a statement that may be overridden, before anybody knows
//! whether it will be; `table` knows how a table's rows are kept; the commit stores those of statements that were
//! overridden (`store`).

pub mod keep;
pub mod modes;
pub mod print;
pub mod store;
mod table;
