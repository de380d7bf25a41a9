//! `writeguard.pooled`: clients share the session, so what one of them has set must not be there for the next.
//!
//! `session` and `expectation` end with every transaction what was set in it. A SET that is a transaction by itself does
//! nothing then, and whoever sent it has to know.

use pgrx::PgLogLevel;

use crate::guard::statement;
use crate::{expectation, ffi, raise, session, settings};

/// Whether something that was set outside of a transaction block ends with this commit before any write could use it.
#[inline]
pub fn ends_unused() -> bool {
    // SAFETY: reads the transaction's state.
    settings::pooled()
        && (session::is_armed_unused() || expectation::is_armed())
        && !unsafe { ffi::IsTransactionBlock() }
}

/// Tells the client of it.
pub fn before_commit() {
    let (setting, value) = if session::flag() {
        ("override", "on".to_owned())
    } else if expectation::is_armed() {
        ("expect_rows", expectation::in_force().to_string())
    } else {
        ("token", "'…'".to_owned())
    };
    raise::tell(
        PgLogLevel::WARNING,
        &format!("writeguard.{setting} was set outside of a transaction block and is over with that command"),
        Some("Clients share this session (writeguard.pooled), so nothing stays armed in it beyond a transaction."),
        Some(&format!("BEGIN; SET LOCAL writeguard.{setting} = {value}; …; COMMIT")),
    );
    // Perhaps it was set before the session was called pooled; it is over all the same.
    statement::touch();
}
