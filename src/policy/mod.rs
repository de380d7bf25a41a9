//! Which policies there are, and which of them cover a table for an acting role.
//!
//! `model`, `pattern`, `schedule` and `resolve` are pure: a policy as a document, the names it covers, the times it is in
//! force, and the rule that decides which of several policies apply. `conditions` asks PostgreSQL whether a policy is in
//! force for this session now. `table` reads the policies, `span` translates intervals, `size` estimates tables, `relation` tells what the system catalogs say of names, `catalog` keeps them and the answers in this backend
//! until a change is committed; `api` is what a DBA calls for one policy, `document` and `import` for all of them at once, `install` what the install script calls. Nothing here knows of rows or limits being reached: that is
//! the guard's work.

pub mod api;
pub mod catalog;
pub mod conditions;
pub mod document;
pub mod import;
pub mod install;
pub mod model;
pub mod pattern;
pub mod relation;
pub mod resolve;
pub mod schedule;
pub mod size;
pub mod span;
pub mod table;
