//! Whether an approval token opens a write: bound to the acting role, the database, the client's statement with its
//! parameters, the rows per table, a lifetime and one use.
//!
//! `check` looks the token up and spends it inside the write's own transaction, `required_approvals` counts the approvals behind
//! it. A token from outside is a JWT: `key` has the keys that are trusted, `jwt_spend` verifies the token and spends it. How a
//! statement is hashed, and what a JWT has to claim, is decided in `rules::token`.
//!
//! What comes in is a token with the hash of the statement. What goes out is a `Grant`, which bounds the rows of each table, or
//! WG006 with the reason. Only hashes of tokens are stored or sent to SQL. Not promised: which rows the statement changes.

pub mod check;
pub mod definitions;
pub mod jwt_spend;
mod key;
pub mod required_approvals;
