//! Whether an approval token opens a write: bound to the acting role, the database, the client's statement with its
//! parameters, the rows per table, a lifetime and one use.
//!
//! `statement` is pure: what the client's statement is, and its hash, which everybody compares. `check` looks the
//! token up and spends it inside the write's own transaction; `required_approvals` counts the approvals behind it. Only
//! hashes of tokens are ever stored or sent to SQL.
//!
//! A token from outside is a JWT: `key` keeps the keys that are trusted, `jwt` reads and verifies the token, `claims`
//! judges what it says (both pure), `jwt_spend` spends it. `grant` is what either kind opens.

pub mod check;
pub mod claims;
pub mod grant;
mod jwt;
pub mod jwt_spend;
mod key;
mod name;
pub mod required_approvals;
pub mod statement;
