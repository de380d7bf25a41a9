//! Whether an approval token opens a write: bound to the acting role, the database, the client's statement with its
//! parameters, the rows per table, a lifetime and one use.
//!
//! The hash of a statement, and whether a token from outside is good, is `rules::token`'s to say. `check` looks the
//! token up and spends it inside the write's own transaction; `required_approvals` counts the approvals behind it. Only
//! hashes of tokens are ever stored or sent to SQL.
//!
//! A token from outside is a JWT: `key` keeps the keys that are trusted, `jwt_spend` spends it.

pub mod check;
pub mod jwt_spend;
mod key;
pub mod required_approvals;
