//! Whether an approval token opens a write: bound to the acting role, the database, the client's statement with its
//! parameters, the rows per table, a lifetime and one use.
//!
//! `statement` is pure: what the client's statement is, and its hash, which everybody compares. `check` looks the
//! token up and spends it inside the write's own transaction; `demand` counts the approvals behind it. Only hashes of
//! tokens are ever stored or sent to SQL.

pub mod check;
pub mod demand;
pub mod statement;
