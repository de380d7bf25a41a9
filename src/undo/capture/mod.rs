//! Keeps the rows of a statement that may be overridden as they were, before anybody knows whether it will be.
//!
//! `row_capture` takes each changed row; `kept_table` knows how the rows of a table are kept, `statement_tables` under which
//! names one statement keeps them; `row_format` turns a row's columns into text and back, always under the settings in
//! `format_settings`, so that what one session wrote another one reads. The commit stores the rows of statements that were
//! overridden (`store`).

pub mod format_settings;
pub mod kept_table;
pub mod row_capture;
pub mod row_format;
pub mod statement_tables;
pub mod store;
