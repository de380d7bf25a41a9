//! The undo that is running, if one is: what it takes back, and what it may change whatever limits say.

use rules::policy::model::Keep;
use rustc_hash::FxHashMap;

use crate::pg::backend_local::{BackendLocal, Borrowed};
use crate::pg::ffi;
use crate::session::xact;

struct Running {
    level: i32,
    /// The change that is taken back, and how long that is kept.
    change: i64,
    keep: Keep,
    /// Places in `left`, by qualified table name.
    tables: FxHashMap<String, usize>,
    /// Rows that are left.
    left: Vec<u64>,
}

static RUNNING: BackendLocal<Option<Running>> = BackendLocal::new(None);

#[track_caller]
fn running() -> Borrowed<Option<Running>> {
    RUNNING.borrow()
}

/// Rows of a change are put back: of each of these groups of tables (a table with its partitions) so many. What that writes
/// is kept as well.
pub fn begin(change: i64, keep: Keep, bounds: Vec<(Vec<String>, u64)>) {
    let (mut tables, mut left) = (FxHashMap::default(), Vec::with_capacity(bounds.len()));
    for (names, rows) in bounds {
        tables.extend(names.into_iter().map(|name| (name, left.len())));
        left.push(rows);
    }
    xact::touch();
    // SAFETY: reads a static.
    let level = unsafe { ffi::GetCurrentTransactionNestLevel() };
    *running() = Some(Running { level, change, keep, tables, left });
}

/// The undo is over.
pub fn end() {
    *running() = None;
}

/// Whether rows are being put back.
#[inline]
pub fn is_on() -> bool {
    running().is_some()
}

/// Whether rows of the table of that name are being put back.
pub fn covers(name: &str) -> bool {
    running().as_ref().is_some_and(|undo| undo.tables.contains_key(name))
}

/// The change that is taken back, and how long what that writes is kept.
pub fn change() -> Option<(i64, Keep)> {
    running().as_ref().map(|undo| (undo.change, undo.keep.clone()))
}

/// How many of the rows that were just changed are not the undo's own: triggers and cascades may have changed others.
pub fn beyond(name: &str, rows: u64) -> u64 {
    let mut running = running();
    let Some(undo) = running.as_mut() else { return rows };
    let Some(left) = undo.tables.get(name).and_then(|place| undo.left.get_mut(*place)) else { return rows };
    let own = rows.min(*left);
    *left -= own;
    rows - own
}

/// A subtransaction of this level was rolled back.
pub fn roll_back(level: i32) {
    let mut running = running();
    if running.as_ref().is_some_and(|undo| undo.level >= level) {
        *running = None;
    }
}

/// The transaction is over.
pub fn end_transaction() {
    *running() = None;
}

/// Whether its end has nothing to forget here.
#[inline(always)]
pub fn is_clean() -> bool {
    running().is_none()
}
