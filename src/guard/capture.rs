//! Who wants to see the rows that a statement changes, one by one, and showing them.
//!
//! Nobody, mostly: then a row costs nothing here. A rehearsal does, for its account; and what keeps rows for undo, in a
//! statement that may be overridden.

use pgrx::pg_sys;

use super::binding::Binding;
use super::budget::Serial;
use super::image::{self, Versions};
use super::lift;
use super::tally;
use super::watch::{Kind, Watch};
use crate::ffi::Foreign;
use crate::raise::Failure;
use crate::undo::keep::{self, Reason};
use crate::words::Operation;

/// Whether rows of every table are to be seen, covered or not.
#[inline]
pub fn wants_everything() -> bool {
    tally::wants_everything() || lift::is_undoing()
}

/// Whether changed rows of a covered relation are to be seen.
#[inline]
pub fn wants(binding: &Binding, operations: &[Operation]) -> bool {
    tally::is_open() || (binding.keeps_any(operations) || lift::is_undoing()) && wants_kept(binding, operations)
}

#[cold]
fn wants_kept(binding: &Binding, operations: &[Operation]) -> bool {
    binding.keeps_any(operations) && keep::is_wanted() || lift::is_undoing() && lift::is_undoing_table(&binding.name)
}

/// Whether those of some covered relation may be.
pub fn may_want() -> bool {
    tally::is_open() || keep::is_wanted()
}

/// Rows of a relation are about to be changed unseen.
pub fn missed(binding: &Binding, operation: Operation, statement: Serial) {
    if binding.keeps_any(&[operation]) && !tally::is_open() && !lift::is_undoing() {
        keep::lose(statement, &binding.relation, Reason::Late);
    }
}

/// Rows of a relation were changed and charged; of more than one, or without a node, the versions are not known.
///
/// # Safety
/// Called between two rows of the watch's node.
///
/// # Errors
/// What reading or printing a row may raise, and the end of a rehearsal that has seen enough.
pub unsafe fn changed(watch: &Watch, binding: &Binding, operation: Operation, rows: u64) -> Result<(), Failure> {
    let (name, info) = (&binding.relation, watch.changed);
    let known = !info.is_null() && !watch.node.is_null() && rows == 1;
    if !tally::is_open() {
        // SAFETY: the caller's promise.
        return unsafe {
            let versions = if known { versions_of(watch, info)? } else { None };
            let kept = keep::row(binding, operation, versions.as_ref(), image::per_row(watch));
            if known {
                image::wipe(watch, info);
            }
            kept
        };
    }
    if !known {
        return tally::note(binding, operation.word(), binding.charges(operation), rows, (None, None));
    }
    // SAFETY: the caller's promise.
    unsafe {
        let mut shown = (None, None);
        if tally::has_room((*(*info).ri_RelationDesc).rd_id, name, operation.word())?
            && let Some(versions) = versions_of(watch, info)?
        {
            shown.0 = show(watch, versions.relation, versions.old)?;
            shown.1 = show(watch, versions.new_relation, versions.new)?;
        }
        image::wipe(watch, info);
        tally::note(binding, operation.word(), binding.charges(operation), rows, shown)
    }
}

unsafe fn versions_of(watch: &Watch, info: *mut pg_sys::ResultRelInfo) -> Result<Option<Versions>, Foreign> {
    // SAFETY: as for `changed`.
    unsafe {
        match watch.kind {
            Kind::Conflict => image::of_conflict(watch, info),
            _ => image::of_last_row(watch, info),
        }
    }
}

/// Rows were inserted.
///
/// # Errors
/// As for [`changed`].
pub fn inserted(watch: &Watch, rows: u64) -> Result<(), Failure> {
    let Some(Some(binding)) = watch.bindings.first() else { return Ok(()) };
    if rows == 0 {
        return Ok(());
    }
    if !tally::is_open() && lift::is_undoing() {
        // SAFETY: called between two rows of the watch's node.
        return unsafe {
            let new = if rows == 1 { image::inserted(watch)? } else { None };
            image::wipe(watch, (*watch.node).resultRelInfo);
            new.map_or(Ok(()), |new| keep::inserted(binding, new, image::per_row(watch)))
        };
    }
    if !tally::wants_everything() {
        return Ok(());
    }
    let name = &binding.relation;
    // SAFETY: called between two rows of the watch's node.
    unsafe {
        let mut shown = (None, None);
        if rows == 1
            && tally::has_room(named(watch), name, INSERT)?
            && let Some((relation, new)) = image::inserted(watch)?
        {
            shown.1 = show(watch, relation, new)?;
        }
        image::wipe(watch, (*watch.node).resultRelInfo);
        tally::note(binding, INSERT, &[], rows, shown)
    }
}

unsafe fn show(watch: &Watch, relation: pg_sys::Relation, tuple: pg_sys::HeapTuple) -> Result<Option<String>, Failure> {
    // SAFETY: the versions are copies, and their relations open.
    unsafe { tally::show(named(watch), relation, tuple, image::per_row(watch)) }
}

/// Rows of a relation are about to be truncated; `row` is the last of them, in `context`.
///
/// # Safety
/// The relation is open, and `row` NULL or a copy of a row of it.
///
/// # Errors
/// As for [`changed`].
pub unsafe fn truncated(
    binding: &Binding,
    relation: pg_sys::Relation,
    row: pg_sys::HeapTuple,
    rows: u64,
    context: pg_sys::MemoryContext,
) -> Result<(), Failure> {
    if !tally::is_open() {
        let (old, new_relation, new) = (row, core::ptr::null_mut(), core::ptr::null_mut());
        let versions = Versions { relation, old, new_relation, new, moved: false };
        // SAFETY: the caller's promise.
        return unsafe { keep::row(binding, Operation::Truncate, (!row.is_null()).then_some(&versions), context) };
    }
    // SAFETY: the caller's promise.
    let before = unsafe { tally::show((*relation).rd_id, relation, row, context) }?;
    let operation = Operation::Truncate;
    tally::note(binding, operation.word(), binding.charges(operation), rows, (before, None))
}

/// Whether all rows that are about to be truncated are kept.
pub fn keeps_truncated(binding: &Binding) -> bool {
    !tally::is_open() && binding.keeps_any(&[Operation::Truncate]) && keep::is_wanted()
}

/// Whether a row that is about to be truncated would be shown.
///
/// # Errors
/// What looking for policies may raise.
pub fn shows_truncated(binding: &Binding, relation: pg_sys::Oid) -> Result<bool, Failure> {
    tally::has_room(relation, &binding.relation, Operation::Truncate.word())
}

/// What an insert is called in a rehearsal's account; no policy limits it.
const INSERT: &str = "insert";

/// The relation that the command names, whose privileges decide who may see rows.
unsafe fn named(watch: &Watch) -> pg_sys::Oid {
    // SAFETY: NULL or a node of a living query.
    unsafe {
        if watch.node.is_null() || (*watch.node).rootResultRelInfo.is_null() {
            return pg_sys::InvalidOid;
        }
        (*(*(*watch.node).rootResultRelInfo).ri_RelationDesc).rd_id
    }
}
