//! Puts kept rows back: `apply` is `undo` itself, `conflicts` shows which rows were changed again since.
//!
//! `images` reads the kept rows of a change; `rules::net_change` says what one row's images come to.
//! `table_definition` is a table as it is now, `column_names` which of its columns an image means, `text` and
//! `compare` are about a column's values. `current_state` compares the images with the rows as they are and sets
//! aside what is to be written (`plan`), `write` writes it, `settle` as far as constraints allow, and `verify` says
//! which rows are as they were. `conflict_row` describes a row that is left alone.
//! `as_caller` runs SQL with the caller's rights, with `rows` that only it can read.
//!
//! What comes in is the number of a change. What goes out are rows as they were, with the number of those that were
//! restored. Not promised: rows and columns that were changed again since. They are left as they are, and are
//! conflicts.

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
pub mod settle;
pub mod table_definition;
pub mod text;
pub mod verify;
pub mod write;
