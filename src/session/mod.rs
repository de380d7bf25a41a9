//! What a session has and runs, and what is forgotten at its ends.
//!
//! `settings` are the settings `writeguard.*`, `actor` is who is acting and from where, `expectation` the number of rows that
//! the client says its next write changes, `pooled` what becomes of all that where clients share sessions. `portal` knows
//! which of the client's commands is running, `statement` the statement that a write belongs to, `statement_text` its text
//! and `excerpt` the beginning of that. `transaction_block` knows whether the client opened one, `xact` whether the library
//! has anything to forget when it ends, `rehearsing` whether what runs is taken back.
//!
//! Nothing here knows of policies, tables or events.

pub mod actor;
pub mod excerpt;
pub mod expectation;
pub mod pooled;
pub mod portal;
pub mod rehearsing;
pub mod settings;
pub mod statement;
pub mod statement_text;
pub mod transaction_block;
pub mod xact;
