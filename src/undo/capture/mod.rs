//! Keeps the rows of a statement that may be overridden as they were, before it is known whether it will be.
//!
//! `row_capture` takes each changed row. `kept_table` knows how the rows of a table are kept, `statement_tables`
//! under which names one statement keeps them. `row_format` turns a row's columns into text and back, always under
//! the settings in `format_settings`, so that what one session wrote another one reads. `store` stores the rows of
//! overridden statements, when they commit.
//!
//! What comes in are row versions from the guard. What goes out is a change in our own tables, or nothing where the
//! statement was not overridden. What is promised: a row that cannot be kept is remembered, and the override is
//! refused for it. Memory stays within `work_mem`; the rest is in temporary files.

pub mod format_settings;
pub mod kept_table;
pub mod row_capture;
pub mod row_format;
pub mod statement_tables;
pub mod store;
