//! Which policies there are, and which of them cover a table for an acting role.
//!
//! `model`, `pattern` and `resolve` are pure: a policy as a document, the names it covers, and the rule that decides
//! which of several policies apply. `table` reads the policies, `relation` what the system catalogs say of names, `catalog` keeps them and the answers in this backend
//! until a change is committed; `api` is what a DBA calls. Nothing here knows of rows or limits being reached: that is
//! the guard's work.

pub mod api;
pub mod catalog;
pub mod model;
pub mod pattern;
pub mod relation;
pub mod resolve;
pub mod table;
