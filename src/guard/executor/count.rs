//! What runs per row: called by the executor itself, so plain old frames throughout.
//!
//! A ModifyTable asks its child for a row, changes it, and asks for the next. Between the two the node's counters tell
//! whether the row before was really changed; that is charged before the next one is fetched, so at most one row past
//! a limit is touched and nothing is fetched for it. What follows the last fetch is counted by [`after_run`].

use core::ptr;

use pgrx::pg_sys;
use rules::words::Operation;

use super::modify_node::{self, Kind, ModifyNode};
use super::{capture, charge_row, moved_row, upsert};
use crate::guard::limits::uncharged;
use crate::pg::ereport::{PendingError, raise, unwound};

/// Stands in for the child of a ModifyTable. What is asked here is asked for each row of a bulk write: while a run
/// is open, a row costs a few compares and a jump.
///
/// # Safety
/// Called by the executor for a node that `modify_node` prepared.
#[expect(ffi_unwind_calls, reason = "plain old frame")]
pub unsafe extern "C-unwind" fn child(node: *mut pg_sys::PlanState) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: the run's owner is alive while it is open, and so are its node and its query.
    unsafe {
        let run = uncharged::run();
        if (*run).child == node
            && let Some(left) = (*run).left.checked_sub(1)
        {
            let modify: *mut ModifyNode = (*run).owner.cast();
            let processed = (*(*modify).source.estate).es_processed;
            if processed == (*modify).seen + 1
                && (*run).result == (*(*modify).source.node).mt_lastResultIndex
                && let Some(exec) = (*modify).child_exec
            {
                (*run).left = left;
                (*run).rows += 1;
                (*modify).seen = processed;
                return exec(node);
            }
        }
        child_in_full(node)
    }
}

/// [`child`] of a MERGE, whose own counters have to say that the row before was updated.
///
/// # Safety
/// As for [`child`].
#[expect(ffi_unwind_calls, reason = "plain old frame")]
pub unsafe extern "C-unwind" fn child_of_merge(node: *mut pg_sys::PlanState) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: as for `child`.
    unsafe {
        let run = uncharged::run();
        if (*run).child == node
            && (*run).operation == Operation::Update
            && let Some(left) = (*run).left.checked_sub(1)
        {
            let modify: *mut ModifyNode = (*run).owner.cast();
            let (processed, merge) = ((*(*modify).source.estate).es_processed, (*modify).source.node);
            let updated = (*merge).mt_merge_updated;
            if processed == (*modify).seen + 1
                && updated == (*modify).seen_updated + 1.0
                && (*run).result == (*merge).mt_lastResultIndex
                && let Some(exec) = (*modify).child_exec
            {
                (*run).left = left;
                (*run).rows += 1;
                (*modify).seen = processed;
                (*modify).seen_updated = updated;
                return exec(node);
            }
        }
        child_in_full(node)
    }
}

#[inline(never)]
#[expect(ffi_unwind_calls, reason = "plain old frame")]
unsafe extern "C-unwind" fn child_in_full(node: *mut pg_sys::PlanState) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: it lives as long as the executor's node.
    unsafe {
        let modify = modify_node::of_child(node);
        let processed = (*(*modify).source.estate).es_processed;
        if may_have_changed(modify, processed) {
            raise(unwound(|| changed(modify, processed)));
        }
        let slot = match (*modify).child_exec {
            Some(exec) => exec(node),
            None => ptr::null_mut(),
        };
        if (*modify).moves && !moved_row::is_empty(slot) {
            (*modify).deleted = moved_row::deleted(moved_row::relation_of_row((*modify).source.node, slot));
        }
        if !(*modify).remote.is_empty() {
            raise(unwound(|| changed_remotely(modify, u64::from(!moved_row::is_empty(slot)))));
        }
        if (*modify).remembers {
            (*modify).source.last = slot;
        }
        slot
    }
}

/// Stands in for what runs the ModifyTable of a WITH branch, which counts its rows in the query's counter as if it had the tag.
///
/// # Safety
/// Called by the executor for a node that `modify_node` prepared.
#[expect(ffi_unwind_calls, reason = "plain old frame")]
pub unsafe extern "C-unwind" fn outer(node: *mut pg_sys::PlanState) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: it lives as long as the executor's node. After an error the query, and with it the counter, is gone.
    unsafe {
        let modify = modify_node::of_outer(node);
        let estate = (*modify).source.estate;
        let outside = (*estate).es_processed;
        (*estate).es_processed = (*modify).processed;
        let slot = match (*modify).outer_exec {
            Some(exec) => exec(node),
            None => ptr::null_mut(),
        };
        (*modify).processed = (*estate).es_processed;
        (*estate).es_processed = outside;
        slot
    }
}

/// Whether a node may have done something since it was looked at last. Some kinds have counters besides the query's.
///
/// # Safety
/// The node is alive.
#[inline(always)]
unsafe fn may_have_changed(modify: *mut ModifyNode, processed: u64) -> bool {
    // SAFETY: the caller's promise.
    unsafe { processed != (*modify).seen || (*modify).moves || !matches!((*modify).kind, Kind::Update | Kind::Delete) }
}

/// Charges what a node did since it last asked for a row.
///
/// # Safety
/// The node is alive; called from a plain old frame.
#[inline]
unsafe fn changed(modify: *mut ModifyNode, processed: u64) -> *mut PendingError {
    // SAFETY: the caller's promise.
    unsafe {
        if processed < (*modify).seen {
            // A new run of the query starts counting again.
            (*modify).seen = 0;
        }
        let rows = processed - (*modify).seen;
        (*modify).seen = processed;
        match (*modify).kind {
            Kind::Update if rows == 0 && (*modify).moves => moved_row::vanished(modify),
            Kind::Update => charge_row::charge_last(modify, Operation::Update, rows),
            Kind::Delete => charge_row::charge_last(modify, Operation::Delete, rows),
            Kind::Merge => merged(modify, rows),
            Kind::Conflict => upsert::conflicted(modify, rows),
            Kind::Insert => upsert::inserted(modify, rows),
            Kind::Whole(operation) => charge_row::charge(modify, 0, operation, rows),
        }
    }
}

/// After ExecutorRun: charges what the nodes did after they last asked for a row. WITH branches
/// always run until they get no more rows, so nothing is left of them.
///
/// # Safety
/// `query_desc` is being run; called from a plain old frame.
pub unsafe fn after_run(query_desc: *mut pg_sys::QueryDesc) -> *mut PendingError {
    // SAFETY: watches of this query are alive as long as its EState.
    unsafe {
        let estate = (*query_desc).estate;
        let mut next = usize::MAX;
        loop {
            let modify = modify_node::of_query(estate, &mut next);
            if modify.is_null() {
                return ptr::null_mut();
            }
            let processed = (*estate).es_processed;
            if (*modify).outer_exec.is_none() && may_have_changed(modify, processed) {
                let raise = unwound(|| changed(modify, processed));
                if !raise.is_null() {
                    return raise;
                }
            }
        }
    }
}

/// A MERGE counts updates and deletes apart; an update that turned out to move a row and was suppressed is
/// in them too, but not in `rows`, which has inserts besides.
unsafe fn merged(modify: *mut ModifyNode, rows: u64) -> *mut PendingError {
    // SAFETY: the node is alive.
    unsafe {
        let (updated, deleted) = ((*(*modify).source.node).mt_merge_updated, (*(*modify).source.node).mt_merge_deleted);
        let (updates, deletes) = (updated - (*modify).seen_updated, deleted - (*modify).seen_deleted);
        ((*modify).seen_updated, (*modify).seen_deleted) = (updated, deleted);
        if rows == 0 {
            return if updates > 0.0 { moved_row::vanished(modify) } else { ptr::null_mut() };
        }
        if updates > 0.0 {
            return charge_row::charge_last(modify, Operation::Update, rows.min(updates as u64));
        }
        if deletes > 0.0 {
            return charge_row::charge_last(modify, Operation::Delete, rows.min(deletes as u64));
        }
        if (*modify).captures { charge_row::captured(|| capture::inserted(modify, rows)) } else { ptr::null_mut() }
    }
}

/// Foreign servers changed rows by themselves: all at once, or as they are returned. Their scans count them for
/// EXPLAIN.
unsafe fn changed_remotely(modify: *mut ModifyNode, returned: u64) -> *mut PendingError {
    // SAFETY: the node is alive, and so are its scans.
    unsafe {
        let operation = if (*modify).kind == Kind::Delete { Operation::Delete } else { Operation::Update };
        for place in 0..(*modify).remote.len() {
            let remotes = &mut (*modify).remote;
            let Some(remote) = remotes.get_mut(place) else { break };
            let total = (*remote.rows).tuplecount as u64;
            let rows = if remote.returned { returned } else { total.saturating_sub(remote.seen) };
            let index = remote.index;
            remote.seen = total;
            (*modify).changed = ptr::null_mut();
            if (*modify).outer_exec.is_none() {
                // With the tag they are in the query's counter as well.
                (*modify).seen += rows;
            }
            let raise = charge_row::charge(modify, index, operation, rows);
            if !raise.is_null() {
                return raise;
            }
        }
    }
    ptr::null_mut()
}
