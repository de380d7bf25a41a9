//! A row that moves to another partition: it is deleted in one and inserted into the other, and where a trigger keeps it out
//! there it is gone without having counted as processed.

use core::ptr;

use pgrx::pg_sys;
use rules::words::Operation;

use super::charge_row;
use super::modify_node::ModifyNode;
use crate::pg::ereport::{PendingError, guarded};
use crate::pg::ffi::{self, PgError};
use crate::pg::row_version;

/// Whether a slot has no row.
///
/// # Safety
/// NULL or a slot of the executor's.
pub unsafe fn is_empty(slot: *mut pg_sys::TupleTableSlot) -> bool {
    // SAFETY: NULL or a slot of the executor's.
    unsafe { slot.is_null() || (u32::from((*slot).tts_flags) & pg_sys::TTS_FLAG_EMPTY) != 0 }
}

/// Rows that the running subtransaction has deleted of a relation; 0 where no statistics are collected.
///
/// # Safety
/// The relation is open.
pub unsafe fn deleted(relation: pg_sys::Relation) -> i64 {
    // SAFETY: the caller's promise; NULL where nothing was counted yet.
    unsafe {
        let statistics = (*relation).pgstat_info;
        if statistics.is_null() || (*statistics).trans.is_null() { 0 } else { (*(*statistics).trans).tuples_deleted }
    }
}

/// The result relation that a row which a node was given is one of, as the node itself will find out in a moment.
///
/// # Safety
/// The node is alive; between two of its rows.
#[expect(ffi_unwind_calls, reason = "plain old frame")]
pub unsafe fn relation_of_row(
    node: *mut pg_sys::ModifyTableState,
    slot: *mut pg_sys::TupleTableSlot,
) -> pg_sys::Relation {
    // SAFETY: plain old frame, between the node's child and the node; with `missing_ok` the look-up raises nothing.
    unsafe {
        let mut relation = (*node).resultRelInfo;
        if let Ok(column) = usize::try_from((*node).mt_resultOidAttno)
            && column > 0
        {
            if column > usize::try_from((*slot).tts_nvalid).unwrap_or(0) {
                ffi::slot_getsomeattrs_int(slot, (*node).mt_resultOidAttno);
            }
            // What a MERGE has nothing to match with is in no relation.
            if !*(*slot).tts_isnull.add(column - 1) {
                let oid = pg_sys::Oid::from_u32((*(*slot).tts_values.add(column - 1)).value() as u32);
                let found = ffi::ExecLookupResultRelByOid(node, oid, true, false);
                relation = if found.is_null() { relation } else { found };
            }
        }
        (*relation).ri_RelationDesc
    }
}

/// The row that was given last did not count as processed. Charges it all the same when it was taken out of one
/// partition and kept out of another by that one's trigger: it is gone.
///
/// # Safety
/// The node is alive; between two of its rows.
#[cold]
pub unsafe fn vanished(modify: *mut ModifyNode) -> *mut PendingError {
    // SAFETY: the node is alive, and between two rows the slot still holds the last one.
    unsafe {
        if !(*modify).moves || (*modify).source.last.is_null() {
            return ptr::null_mut();
        }
        let mut gone = false;
        let mut raise = guarded(|| {
            gone = was_moved_away(modify)?;
            Ok(())
        });
        if raise.is_null() && gone {
            raise = charge_row::charge_last(modify, Operation::Update, 1);
        }
        (*modify).source.last = ptr::null_mut();
        raise
    }
}

/// Whether this transaction deleted the row that the node was given last in order to move it to another partition.
#[expect(ffi_unwind_calls, reason = "inside protect")]
unsafe fn was_moved_away(modify: *const ModifyNode) -> Result<bool, PgError> {
    // SAFETY: node, relation and slot of a living query; the row's version is read as it is stored.
    unsafe {
        let index = usize::try_from((*(*modify).source.node).mt_lastResultIndex).unwrap_or(0);
        let from = (*(*modify).source.node).resultRelInfo.add(index);
        let (relation, last) = ((*from).ri_RelationDesc, (*modify).source.last);
        if (*modify).deleted == deleted(relation) {
            // It was moved before: a join gives a row several times, and other branches of the command have had it.
            return Ok(false);
        }
        // A row is known by its place only where it is one of a heap.
        let Some(column) = usize::try_from((*from).ri_RowIdAttNo).ok().and_then(|number| number.checked_sub(1)) else {
            return Ok(false);
        };
        let known = is_empty(last) || column >= usize::try_from((*last).tts_nvalid).unwrap_or(0);
        if (*(*relation).rd_rel).relam != pg_sys::HEAP_TABLE_AM_OID || known || *(*last).tts_isnull.add(column) {
            return Ok(false);
        }
        let Some(fetch) = (*(*relation).rd_tableam).tuple_fetch_row_version else { return Ok(false) };
        let at: pg_sys::ItemPointer = (*(*last).tts_values.add(column)).cast_mut_ptr();
        let version = pg_sys::table_slot_create(relation, ptr::null_mut());
        let mut found = false;
        ffi::protect(|| found = fetch(relation, at, &raw mut pg_sys::SnapshotAnyData, version))?;
        let mut moved = false;
        if found {
            let header = (*(*version.cast::<pg_sys::HeapTupleTableSlot>()).tuple).t_data;
            // What a trigger's command moved meanwhile is charged to that.
            moved = row_version::is_moved_mark(&(*header).t_ctid)
                && row_version::is_ended_by_us(header)
                && pg_sys::HeapTupleHeaderGetCmax(header) == (*(*modify).source.estate).es_output_cid;
        }
        pg_sys::ExecDropSingleTupleTableSlot(version);
        Ok(moved)
    }
}
