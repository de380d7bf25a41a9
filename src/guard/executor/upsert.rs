//! INSERT … ON CONFLICT: which rows were updated, or selected, rather than inserted, and in which partition.

use core::ptr;

use pgrx::pg_sys;
use rules::words::Operation;

use super::assigned_columns;
use super::modify_node::ModifyNode;
use super::{capture, charge_row, moved_row};
use crate::guard::limits::bindings;
use crate::pg::ereport::PendingError;
use crate::pg::ffi::pointers;
use crate::pg::row_version;

/// A conflicting row was updated when the projection for it was filled and a row counts as processed. Which partition
/// it was in, the slot says that the conflicting row was locked into; both marks are wiped for the next row.
///
/// # Safety
/// The node is alive; between two of its rows.
pub unsafe fn conflicted(modify: *mut ModifyNode, rows: u64) -> *mut PendingError {
    // SAFETY: nodes and slots of a living query; between two rows nobody uses these slots.
    unsafe {
        let node = (*modify).source.node;
        let own = (*node).resultRelInfo;
        let mut updated = false;
        let here = conflict_in(own, &mut updated).is_some();
        (*modify).changed = own;
        let elsewhere = conflict_elsewhere(node);
        if (*node).mt_partition_tuple_routing.is_null() {
            return match here && updated {
                _ if rows == 0 => ptr::null_mut(),
                true => charge_row::charge(modify, 0, Operation::Update, 1),
                false if elsewhere != pg_sys::InvalidOid => {
                    (*modify).changed = ptr::null_mut();
                    charge_partition(modify, elsewhere)
                }
                false if (*modify).captures => charge_row::captured(|| capture::inserted(modify, rows)),
                false => ptr::null_mut(),
            };
        }
        let mut partition = pg_sys::InvalidOid;
        for leaf in partitions(modify) {
            if let Some(relation) = conflict_in(leaf, &mut updated) {
                partition = relation;
                (*modify).changed = leaf;
            }
        }
        if rows == 0 || !updated || partition == pg_sys::InvalidOid {
            let inserted = rows > 0 && !updated && (*modify).captures;
            return if inserted { charge_row::captured(|| capture::inserted(modify, rows)) } else { ptr::null_mut() };
        }
        charge_partition(modify, partition)
    }
}

/// An INSERT that updates nothing: the row was inserted, unless it was in conflict and is returned by ON CONFLICT DO SELECT,
/// which there is from version 19 on. Core counts both alike.
///
/// # Safety
/// As for [`conflicted`].
pub unsafe fn inserted(modify: *mut ModifyNode, rows: u64) -> *mut PendingError {
    // SAFETY: as above.
    unsafe {
        let node = (*modify).source.node;
        let plan: *const pg_sys::ModifyTable = (*node).ps.plan.cast();
        if (*plan).onConflictAction != pg_sys::OnConflictAction::ONCONFLICT_NONE {
            let own = (*node).resultRelInfo;
            let mut is_selected = conflict_in(own, &mut false).is_some();
            for leaf in partitions(modify) {
                is_selected |= conflict_in(leaf, &mut false).is_some();
            }
            if is_selected {
                row_version::wipe((*modify).source, own);
                return ptr::null_mut();
            }
        }
        charge_row::captured(|| capture::inserted(modify, rows))
    }
}

/// The partitions that a node's rows went to so far.
unsafe fn partitions(modify: *const ModifyNode) -> impl Iterator<Item = *mut pg_sys::ResultRelInfo> {
    // SAFETY: as for `conflicted`. The list is the query's; other nodes have their partitions in it too.
    unsafe {
        let root = (*(*modify).source.node).rootResultRelInfo;
        let all = pointers::<pg_sys::ResultRelInfo>((*(*modify).source.estate).es_tuple_routing_result_relations);
        all.filter(move |leaf| (**leaf).ri_RootResultRelInfo == root)
    }
}

/// Whether a row of this relation was in conflict, and whether the update for it was projected. Wipes both marks.
#[expect(ffi_unwind_calls, reason = "plain old frame")]
unsafe fn conflict_in(relation: *mut pg_sys::ResultRelInfo, updated: &mut bool) -> Option<pg_sys::Oid> {
    // SAFETY: a result relation of a living query.
    unsafe {
        let state = (*relation).ri_onConflict;
        if state.is_null() {
            return None;
        }
        let projected = (*state).oc_ProjSlot;
        if !moved_row::is_empty(projected) {
            *updated = true;
            if let Some(clear) = (*(*projected).tts_ops).clear {
                clear(projected);
            }
        }
        let existing = (*state).oc_Existing;
        if existing.is_null() || (*existing).tts_tableOid == pg_sys::InvalidOid {
            return None;
        }
        (*existing).tts_tableOid = pg_sys::InvalidOid;
        Some((*(*relation).ri_RelationDesc).rd_id)
    }
}

/// The relation whose row was in conflict and was projected, also where its result relation is nobody's to see, as that
/// of a hypertable's chunk; invalid: none was. The inner tuple of the node's expressions is the excluded row and nothing
/// else, and their scanned tuple is then the row that was there, or what was made of it. Wipes the mark.
unsafe fn conflict_elsewhere(node: *mut pg_sys::ModifyTableState) -> pg_sys::Oid {
    // SAFETY: the node and its slots are those of a living query.
    unsafe {
        let context = (*node).ps.ps_ExprContext;
        if context.is_null() || (*context).ecxt_innertuple.is_null() || (*context).ecxt_scantuple.is_null() {
            return pg_sys::InvalidOid;
        }
        (*context).ecxt_innertuple = ptr::null_mut();
        (*(*context).ecxt_scantuple).tts_tableOid
    }
}

/// Partitions of an INSERT are not known before its rows are; their bindings join the node's when they turn up.
unsafe fn charge_partition(modify: *mut ModifyNode, partition: pg_sys::Oid) -> *mut PendingError {
    let mut binding = None;
    // SAFETY: the node is alive.
    let actor = unsafe { (*modify).actor };
    let raise = bindings::deciding(|| {
        binding = bindings::binding_to_count(partition, actor)?;
        Ok(())
    });
    if !raise.is_null() {
        return raise;
    }
    let Some(binding) = binding else {
        return ptr::null_mut();
    };
    // SAFETY: the node is alive; the list is borrowed for the look-up alone.
    unsafe {
        let node = (*modify).source.node;
        let binding = assigned_columns::narrowed(binding, node, (*node).resultRelInfo, 0);
        let bindings = &mut (*modify).bindings;
        let known = bindings.iter().position(|known| known.as_ref().is_some_and(|known| known.name == binding.name));
        let index = known.unwrap_or_else(|| {
            bindings.push(Some(binding));
            bindings.len() - 1
        });
        charge_row::charge(modify, index, Operation::Update, 1)
    }
}
