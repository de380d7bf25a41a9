//! Which policies there are, and which of them cover a table for an acting role.
//!
//! What a policy is, what it covers and which of several apply is decided in `rules::policy`, from what is looked
//! up here. `table` reads the policies, `relation` what the system catalogs have about names, `target` the names by
//! which one relation can be covered; `catalog` keeps policies and answers in this backend until `invalidation`
//! says that they are stale. `conditions` asks PostgreSQL whether a policy is in force for this session now,
//! `interval` translates intervals, `size` estimates tables, `key` looks for primary keys. `schema_compat` knows
//! what the tables of an older version of the extension have no place for. `api` is what a DBA calls for one
//! policy, `alter` changes some of its columns, `import` for all of them at once, `change` what these three have in common,
//! `consequences` what such a change tells of others, `install` what the install and upgrade scripts call, `rule_change`
//! what an upgrade tells of policies that mean something else since.
//!
//! What comes in are a relation and an acting role. What goes out are the policies that apply to each operation, or
//! WG008 where that cannot be told. Not promised: the policies of a later moment than the start of a write. Nothing
//! here counts rows or compares them with limits: that is the guard's work.

pub mod alter;
pub mod api;
pub mod catalog;
pub mod change;
pub mod conditions;
pub mod consequences;
pub mod import;
pub mod install;
pub mod interval;
pub mod invalidation;
pub mod key;
pub mod readable;
pub mod relation;
pub mod rule_change;
pub mod schema_compat;
pub mod size;
pub mod table;
pub mod target;
