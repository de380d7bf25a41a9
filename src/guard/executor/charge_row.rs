//! Charges the rows that a node has changed, and shows them to `capture` where a rehearsal or undo wants them.

use core::ptr;

use rules::words::{Operation, Place};

use super::capture;
use super::modify_node::ModifyNode;
use crate::guard::limits::{charge, uncharged};
use crate::guard::verdict::violation;
use crate::pg::ereport::{Failure, PendingError, guarded};
use crate::pg::ffi;
use crate::session::{actor, statement};

/// Charges rows of the result relation whose row was changed last.
///
/// # Safety
/// The node is alive; between two of its rows.
#[inline]
pub unsafe fn charge_last(modify: *mut ModifyNode, operation: Operation, rows: u64) -> *mut PendingError {
    if rows == 0 {
        return ptr::null_mut();
    }
    // SAFETY: the node is alive.
    unsafe {
        let node = (*modify).source.node;
        let place = usize::try_from((*node).mt_lastResultIndex).unwrap_or(0);
        (*modify).changed = (*node).resultRelInfo.add(place);
        charge(modify, place, operation, rows)
    }
}

/// Charges rows of one of the node's relations.
///
/// # Safety
/// The node is alive.
#[inline]
pub unsafe fn charge(modify: *mut ModifyNode, index: usize, operation: Operation, rows: u64) -> *mut PendingError {
    if rows == 0 {
        return ptr::null_mut();
    }
    if rows == 1 && uncharged::join(modify.cast(), index, operation) {
        return ptr::null_mut();
    }
    // SAFETY: the caller's promise. The binding is held here, because what a decision runs may look the node up.
    unsafe {
        let bindings = &(*modify).bindings;
        let Some(Some(binding)) = bindings.get(index).cloned() else {
            return ptr::null_mut();
        };
        let place = match (*modify).place {
            Some(place) => place,
            None => {
                actor::use_armed();
                // A node runs within one subtransaction, whatever happens between its rows.
                let place = Place { statement: statement::current(), level: ffi::GetCurrentTransactionNestLevel() };
                (*modify).place = Some(place);
                if !(*modify).captures {
                    capture::missed(&binding, operation, place.statement);
                }
                place
            }
        };
        let raise = violation::charge(&binding, operation, rows, place, (*modify).estimate);
        if !raise.is_null() {
            return raise;
        }
        if (*modify).captures {
            return captured(|| capture::changed(modify, &binding, operation, rows));
        }
        // A statement of one row is over before a run could be of use.
        if (*modify).seen > 1 && !(*modify).source.node.is_null() {
            let child = if (*modify).only_counts() { (*modify).child } else { ptr::null_mut() };
            charge::open_run(modify.cast(), child, index, &binding, operation, place);
        }
        raise
    }
}

/// Has a changed row's versions looked at.
#[cold]
pub fn captured(look: impl FnOnce() -> Result<(), Failure>) -> *mut PendingError {
    guarded(look)
}
