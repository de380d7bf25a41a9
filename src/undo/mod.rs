//! Rows as they were: kept when a limit is passed on purpose, and put back when that was wrong all the same.
//!
//! `keep` takes each changed row of a statement that may be overridden, before anybody knows whether it will be, as text
//! that `print` makes; the commit stores those of statements that were (`store`).

pub mod keep;
pub mod print;
pub mod store;
