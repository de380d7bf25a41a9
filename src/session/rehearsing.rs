//! Whether what runs now is rolled back afterwards, as a rehearsal: no limit refuses anything in it, nothing is kept of it for
//! an undo, and it cannot execute a request or break the glass.

use crate::pg::backend_local::{BackendLocal, Borrowed};
use crate::pg::ffi;

/// Nest levels of the subtransactions in which a statement is rehearsed, the innermost last.
static LEVELS: BackendLocal<Vec<i32>> = BackendLocal::new(Vec::new());

#[track_caller]
fn levels() -> Borrowed<Vec<i32>> {
    LEVELS.borrow()
}

/// Whether a rehearsal runs.
#[inline]
pub fn is_on() -> bool {
    !levels().is_empty()
}

/// A rehearsal runs from now on, until the subtransaction that was just begun is rolled back.
pub fn begin() {
    // SAFETY: reads a static.
    let level = unsafe { ffi::GetCurrentTransactionNestLevel() };
    levels().push(level);
}

/// A subtransaction of this level was rolled back.
pub fn roll_back(level: i32) {
    levels().retain(|begun| *begun < level);
}

/// The transaction is over.
pub fn end_transaction() {
    levels().clear();
}

/// Whether its end has nothing to forget here.
#[inline(always)]
pub fn is_clean() -> bool {
    levels().is_empty()
}
