//! Which policies there are, and which of them cover a table for an acting role.
//!
//! `model`, `pattern`, `schedule`, `resolve` and `document` are pure: a policy as a document, the names it covers, the
//! times it is in force, the rule that decides which of several policies apply, and many policies in one document.
//! `conditions` asks PostgreSQL whether a policy is in force for this session now, `interval` translates intervals, `size`
//! estimates tables, `key` looks for primary keys. `table` reads the policies, `relation` what the system catalogs say of
//! names, `target` the names by which one relation can be covered; `catalog` keeps policies and answers in this backend until
//! a change is committed, and `steady` (pure) says what of it is good where changes come in between. `schema_compat` knows
//! what the tables of an older version of the extension have no place for. `api` is what a DBA calls for one policy, `import`
//! for all of them at once, `setup` what `check_setup` asks, `install` what the install and upgrade scripts call.
//!
//! Nothing here knows of rows or limits being reached: that is the guard's work.

pub mod api;
pub mod catalog;
pub mod conditions;
pub mod document;
pub mod import;
pub mod install;
pub mod interval;
pub mod key;
pub mod model;
pub mod pattern;
pub mod relation;
pub mod resolve;
pub mod schedule;
pub mod schema_compat;
pub mod setup;
pub mod size;
pub mod steady;
pub mod table;
pub mod target;
