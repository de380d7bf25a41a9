//! Who wants to see the rows that a statement changes, one by one, and showing them.
//!
//! Nobody, mostly: then a row costs nothing here. A rehearsal does, for its account; and what keeps rows for undo, in a
//! statement that may be overridden.

use pgrx::pg_sys;
use rules::words::{Operation, Serial};

use super::modify_node::{Kind, ModifyNode};
use crate::guard::limits::binding::Binding;
use crate::guard::rehearsal::account;
use crate::guard::verdict::reviewed_rows;
use crate::pg::ereport::Failure;
use crate::pg::ffi::PgError;
use crate::pg::row_version::{self, Node, Versions};
use crate::undo::capture::row_capture::{self, Reason, Relation};
use crate::undo::in_progress;

/// Whether changed rows of a covered relation are to be seen.
#[inline]
pub fn wants(binding: &Binding, operations: &[Operation]) -> bool {
    account::is_open()
        || reviewed_rows::is_wanted()
        || (binding.keeps_any(operations) || in_progress::is_on()) && wants_kept(binding, operations)
}

#[cold]
fn wants_kept(binding: &Binding, operations: &[Operation]) -> bool {
    binding.keeps_any(operations) && row_capture::is_wanted()
        || in_progress::is_on() && in_progress::covers(&binding.name)
}

/// Whether those of some covered relation may be.
pub fn may_want() -> bool {
    account::is_open() || reviewed_rows::is_wanted() || row_capture::is_wanted()
}

/// The relation as keeping its rows has to know it.
fn kept(binding: &Binding, operation: Option<Operation>) -> Relation<'_> {
    Relation { name: &binding.relation, sql: &binding.name, keep: operation.and_then(|one| binding.kept(one)) }
}

/// Rows of a relation are about to be changed unseen.
pub fn missed(binding: &Binding, operation: Operation, statement: Serial) {
    if binding.keeps_any(&[operation]) && !account::is_open() && !in_progress::is_on() {
        row_capture::lose(statement, &binding.relation, Reason::Late);
    }
}

/// Rows of a relation were changed and charged; of more than one, or without a node, the versions are not known.
///
/// # Safety
/// Called between two rows of the node.
///
/// # Errors
/// What reading or printing a row may raise, and the end of a rehearsal that has seen enough.
pub unsafe fn changed(
    modify: *const ModifyNode,
    binding: &Binding,
    operation: Operation,
    rows: u64,
) -> Result<(), Failure> {
    let name = &binding.relation;
    // SAFETY: the caller's promise.
    let (kind, rows_of, info) = unsafe { ((*modify).kind, (*modify).source, (*modify).changed) };
    let known = !info.is_null() && !rows_of.node.is_null() && rows == 1;
    if !account::is_open() {
        // SAFETY: the caller's promise.
        return unsafe {
            let versions = if known { versions_of(kind, rows_of, info)? } else { None };
            if reviewed_rows::is_wanted() {
                reviewed_rows::note(binding, operation, rows, versions.as_ref())?;
            }
            let kept = row_capture::row(
                kept(binding, Some(operation)),
                operation,
                versions.as_ref(),
                row_version::per_row(rows_of),
            );
            if known {
                row_version::wipe(rows_of, info);
            }
            kept
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        let mut shown = (None, None);
        let sums_up = account::wants_fingerprints();
        let shows = known && account::has_room((*(*info).ri_RelationDesc).rd_id, name, operation.word())?;
        let versions = if known && (shows || sums_up) { versions_of(kind, rows_of, info)? } else { None };
        if sums_up {
            reviewed_rows::note(binding, operation, rows, versions.as_ref())?;
        }
        if shows && let Some(versions) = versions {
            shown.0 = show(rows_of, versions.relation, versions.old)?;
            shown.1 = show(rows_of, versions.new_relation, versions.new)?;
        }
        if known {
            row_version::wipe(rows_of, info);
        }
        account::note(binding, operation.word(), binding.charges(operation), rows, shown)
    }
}

unsafe fn versions_of(
    kind: Kind,
    rows_of: Node,
    info: *mut pg_sys::ResultRelInfo,
) -> Result<Option<Versions>, PgError> {
    // SAFETY: as for `changed`.
    unsafe {
        match kind {
            Kind::Conflict => row_version::of_conflict(rows_of, info),
            _ => row_version::of_last_row(rows_of, info),
        }
    }
}

/// Rows were inserted.
///
/// # Errors
/// As for [`changed`].
///
/// # Safety
/// Called between two rows of the node.
pub unsafe fn inserted(modify: *const ModifyNode, rows: u64) -> Result<(), Failure> {
    if rows == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise; a copy, because what is called here may look the node up again.
    let (binding, rows_of) = unsafe { ((*modify).bindings.first().cloned().flatten(), (*modify).source) };
    let Some(binding) = binding else { return Ok(()) };
    let binding = &*binding;
    if !account::is_open() && in_progress::is_on() {
        // SAFETY: called between two rows of the node.
        return unsafe {
            let new = if rows == 1 { row_version::inserted(rows_of)? } else { None };
            row_version::wipe(rows_of, (*rows_of.node).resultRelInfo);
            new.map_or(Ok(()), |new| row_capture::inserted(kept(binding, None), new, row_version::per_row(rows_of)))
        };
    }
    if !account::wants_everything() {
        return Ok(());
    }
    let name = &binding.relation;
    // SAFETY: called between two rows of the node.
    unsafe {
        let mut shown = (None, None);
        if rows == 1
            && account::has_room(named(rows_of), name, INSERT)?
            && let Some((relation, new)) = row_version::inserted(rows_of)?
        {
            shown.1 = show(rows_of, relation, new)?;
        }
        row_version::wipe(rows_of, (*rows_of.node).resultRelInfo);
        account::note(binding, INSERT, &[], rows, shown)
    }
}

unsafe fn show(rows_of: Node, relation: pg_sys::Relation, tuple: pg_sys::HeapTuple) -> Result<Option<String>, Failure> {
    // SAFETY: the versions are copies, and their relations open.
    unsafe { account::show(named(rows_of), relation, tuple, row_version::per_row(rows_of)) }
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
    if reviewed_rows::is_wanted() {
        // SAFETY: there are no versions. All rows of the table go, whichever they are.
        unsafe { reviewed_rows::note(binding, Operation::Truncate, rows, None)? };
    }
    if !account::is_open() {
        let (old, new_relation, new) = (row, core::ptr::null_mut(), core::ptr::null_mut());
        let versions = Versions { relation, old, new_relation, new, moved: false };
        // SAFETY: the caller's promise.
        return unsafe {
            row_capture::row(
                kept(binding, Some(Operation::Truncate)),
                Operation::Truncate,
                (!row.is_null()).then_some(&versions),
                context,
            )
        };
    }
    // SAFETY: the caller's promise.
    let before = unsafe { account::show((*relation).rd_id, relation, row, context) }?;
    let operation = Operation::Truncate;
    account::note(binding, operation.word(), binding.charges(operation), rows, (before, None))
}

/// Whether all rows that are about to be truncated are kept.
pub fn keeps_truncated(binding: &Binding) -> bool {
    !account::is_open() && binding.keeps_any(&[Operation::Truncate]) && row_capture::is_wanted()
}

/// Whether a row that is about to be truncated would be shown.
///
/// # Errors
/// What looking for policies may raise.
pub fn shows_truncated(binding: &Binding, relation: pg_sys::Oid) -> Result<bool, Failure> {
    account::has_room(relation, &binding.relation, Operation::Truncate.word())
}

/// What an insert is called in a rehearsal's account; no policy limits it.
const INSERT: &str = "insert";

/// The relation that the command names, whose privileges decide who may see rows.
unsafe fn named(rows_of: Node) -> pg_sys::Oid {
    // SAFETY: NULL or a node of a living query.
    unsafe {
        if rows_of.node.is_null() || (*rows_of.node).rootResultRelInfo.is_null() {
            return pg_sys::InvalidOid;
        }
        (*(*(*rows_of.node).rootResultRelInfo).ri_RelationDesc).rd_id
    }
}
