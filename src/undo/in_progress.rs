//! The undo that is running, if one is: what it takes back, and that nothing it writes is limited.

use rules::policy::model::Keep;
use rustc_hash::FxHashSet;

use crate::pg::backend_local::{BackendLocal, Borrowed};
use crate::pg::ffi;
use crate::session::xact;
use crate::undo::user_triggers;

struct Running {
    level: i32,
    /// The change that is taken back, and how long that is kept.
    change: i64,
    keep: Keep,
    /// Qualified names of the tables.
    tables: FxHashSet<String>,
}

static RUNNING: BackendLocal<Option<Running>> = BackendLocal::new(None);

#[track_caller]
fn running() -> Borrowed<Option<Running>> {
    RUNNING.borrow()
}

/// Rows of a change are put back into these tables and their partitions. What that writes is kept as well, and no limit
/// refuses it.
pub fn begin(change: i64, keep: Keep, tables: FxHashSet<String>, fire_triggers: bool) {
    xact::touch();
    // SAFETY: reads a static.
    let level = unsafe { ffi::GetCurrentTransactionNestLevel() };
    *running() = Some(Running { level, change, keep, tables });
    if !fire_triggers {
        user_triggers::leave_out();
    }
}

/// The undo is over.
pub fn end() {
    user_triggers::let_fire();
    *running() = None;
}

/// Whether rows are being put back.
#[inline]
pub fn is_on() -> bool {
    running().is_some()
}

/// Whether rows of the table of that name are being put back.
pub fn covers(name: &str) -> bool {
    running().as_ref().is_some_and(|undo| undo.tables.contains(name))
}

/// The change that is taken back, and how long what that writes is kept.
pub fn change() -> Option<(i64, Keep)> {
    running().as_ref().map(|undo| (undo.change, undo.keep.clone()))
}

/// A subtransaction of this level was rolled back.
pub fn roll_back(level: i32) {
    if running().as_ref().is_some_and(|undo| undo.level >= level) {
        end();
    }
}

/// The transaction is over.
pub fn end_transaction() {
    end();
}

/// Whether its end has nothing to forget here.
#[inline(always)]
pub fn is_clean() -> bool {
    running().is_none()
}
