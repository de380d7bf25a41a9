//! Puts kept rows back: `apply` is `undo` itself, `conflicts` shows which rows were changed again since.
//!
//! `images` gives the kept rows of a change; `rules::net_change` says what one row's images come to. `table_definition` is a table as
//! it is now, `column_names` which of its columns an image means, `text` and `compare` a column's values.
//! `current_state` holds the images against the rows as they are and sets aside what is to be written (`plan`), `write` writes
//! it, `conflict_row` tells of a row that is left alone; `as_caller` runs SQL with the
//! caller's rights, with `rows` that only it can read.
//!
//! What is promised: a row that is told as restored is as it was. Rows that somebody changed since are left alone and told.

pub mod apply;
pub mod as_caller;
pub mod column_names;
pub mod compare;
pub mod conflict_row;
pub mod conflicts;
pub mod current_state;
pub mod images;
pub mod plan;
pub mod rows;
pub mod table_definition;
pub mod text;
pub mod write;
