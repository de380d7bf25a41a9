//! Undo: a write that was let through keeps its rows as they were, and one call puts them back.
//!
//! `capture` keeps rows while a statement runs and stores them with its commit; `change_record` is such a change as our own
//! tables have it; `restore` puts its rows back, and `in_progress` says what that may change meanwhile.

pub mod capture;
pub mod change_record;
pub mod in_progress;
pub mod restore;
