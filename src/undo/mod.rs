//! Undo: a write that was let through keeps its rows as they were, and one call puts them back.
//!
//! `capture` keeps rows while a statement runs and stores them with its commit. `change_record` is such a change as
//! our own tables have it. `restore` puts its rows back, and `in_progress` says what that may change meanwhile,
//! when `user_triggers` keeps user triggers from firing.
//!
//! What comes in are the versions of changed rows. What goes out are rows of `writeguard.image`, and later the rows
//! of the table itself. What is promised: an overridden write whose policy has `undo` keeps all its rows, or is
//! refused. Not promised: rows of tables without a primary key, whose override is refused, and rows that were
//! changed again since, which are conflicts.

pub mod capture;
pub mod change_record;
pub mod in_progress;
pub mod restore;
pub mod user_triggers;
