//! `writeguard.pooled`: clients share the session, so what one of them has set must not be there for the next.
//!
//! `actor` and `expectation` end with every transaction what was set in it. A SET that is a transaction by itself does
//! nothing then, and whoever sent it has to know.

use core::ffi::c_void;

use pgrx::PgLogLevel;

use super::{actor, expectation, settings, transaction_block};
use crate::pg::ereport;
use crate::pg::ffi::PgError;

/// Whether something that was set outside of a transaction block ends with this commit before any write could use it.
#[inline]
pub fn ends_unused() -> bool {
    settings::pooled() && (actor::is_armed_unused() || expectation::is_armed()) && !transaction_block::is_explicit()
}

/// Sends the client a WARNING that it has no effect.
///
/// # Errors
/// What interrupts that.
pub fn before_commit() -> Result<(), PgError> {
    let (setting, value) = if actor::is_armed_unused() && actor::flag() {
        ("override", "on".to_owned())
    } else if expectation::is_armed() {
        ("expect_rows", expectation::in_force().to_string())
    } else {
        ("token", "'…'".to_owned())
    };
    ereport::tell(
        PgLogLevel::WARNING,
        &format!("writeguard.{setting} was set outside of a transaction block and is over with that command"),
        Some("Clients share this session (writeguard.pooled), so nothing stays armed in it beyond a transaction."),
        Some(&format!("BEGIN; SET LOCAL writeguard.{setting} = {value}; …; COMMIT")),
    )
}

/// Assign hook of `writeguard.pooled`: disarms what was armed before the session was declared pooled.
pub unsafe extern "C-unwind" fn assign(new: bool, _extra: *mut c_void) {
    // Not with each reload that says the same again.
    if new && !settings::pooled() {
        actor::disarm();
        expectation::use_up();
    }
}
