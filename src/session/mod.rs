//! What a session has, and what is forgotten at its ends: `settings` are the settings `writeguard.*`, `actor` is who is acting
//! and from where, `expectation` the number of rows that the client says its next write changes, `pooled` what becomes of
//! all that where clients share sessions.
//!
//! Nothing here knows of policies, tables or events.

pub mod actor;
pub mod expectation;
pub mod pooled;
pub mod settings;
