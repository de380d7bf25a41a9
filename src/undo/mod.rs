//! Undo: a write that was let through keeps its rows as they were, and one call puts them back.
//!
//! `print` turns a row's columns into text and back, always under the settings in `modes`, so that what one session
//! wrote another one reads. `keep` takes each changed row of a statement that may be overridden, before anybody knows
//! whether it will be; `table` knows how a table's rows are kept, `filed` under which names one statement keeps them; the commit
//! stores those of statements that were overridden (`store`).
//!
//! Putting back: `apply` is `undo` itself, `kept` the change as our tables have it, `images` its rows, `net` (pure) what
//! one row's images come to. `shape` is a table as it is now, `naming` which of its columns an image means, `text` and
//! `compare` a column's values. `standing` holds the images against the rows as they are, `conflicts` shows what was
//! changed again since, `write` writes the rest; `session` runs SQL as the caller, with `rows` that only it can read.

pub mod apply;
pub mod compare;
pub mod conflicts;
pub mod filed;
pub mod images;
pub mod keep;
pub mod kept;
pub mod modes;
pub mod naming;
pub mod net;
pub mod print;
pub mod rows;
pub mod session;
pub mod shape;
pub mod standing;
pub mod store;
pub mod table;
pub mod text;
pub mod write;
