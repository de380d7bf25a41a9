//! What runs per row: called by the executor itself, so plain old frames throughout.
//!
//! A ModifyTable asks its child for a row, changes it, and asks for the next. Between the two the node's counters tell
//! whether the row before was really changed; that is charged before the next one is fetched, so at most one row past
//! a limit is touched and nothing is fetched for it. What follows the last fetch is counted by [`after_run`].

use core::ptr;

use pgrx::pg_sys;
use rules::words::{Operation, Place};

use super::capture;
use super::modify_node::{self, Kind, ModifyNode};
use crate::guard::limits::{charge, uncharged};
use crate::guard::verdict::violation;
use crate::pg::ereport::{Failure, PendingError, guarded, raise, unwound};
use crate::pg::ffi::{self, PgError};
use crate::pg::row_version;
use crate::session::{actor, statement};

unsafe fn is_empty(slot: *mut pg_sys::TupleTableSlot) -> bool {
    // SAFETY: NULL or a slot of the executor's.
    unsafe { slot.is_null() || (u32::from((*slot).tts_flags) & pg_sys::TTS_FLAG_EMPTY) != 0 }
}

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
        raise(unwound(|| changed(modify, (*(*modify).source.estate).es_processed)));
        let slot = match (*modify).child_exec {
            Some(exec) => exec(node),
            None => ptr::null_mut(),
        };
        if (*modify).moves && !is_empty(slot) {
            (*modify).deleted = deleted(relation_of_row((*modify).source.node, slot));
        }
        if !(*modify).remote.is_empty() {
            raise(unwound(|| changed_remotely(modify, u64::from(!is_empty(slot)))));
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
            Kind::Update if rows == 0 && (*modify).moves => vanished(modify),
            Kind::Update => charge_last(modify, Operation::Update, rows),
            Kind::Delete => charge_last(modify, Operation::Delete, rows),
            Kind::Merge => merged(modify, rows),
            Kind::Conflict => conflicted(modify, rows),
            Kind::Insert => captured(|| capture::inserted(modify, rows)),
            Kind::Whole(operation) => charge(modify, 0, operation, rows),
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
            if (*modify).outer_exec.is_none() {
                let raise = unwound(|| changed(modify, (*estate).es_processed));
                if !raise.is_null() {
                    return raise;
                }
            }
        }
    }
}

#[inline]
unsafe fn charge_last(modify: *mut ModifyNode, operation: Operation, rows: u64) -> *mut PendingError {
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

/// A MERGE's counters tell of updates and deletes apart; an update that turned out to move a row and was suppressed is
/// in them too, but not in `rows`, which has inserts besides.
unsafe fn merged(modify: *mut ModifyNode, rows: u64) -> *mut PendingError {
    // SAFETY: the node is alive.
    unsafe {
        let (updated, deleted) = ((*(*modify).source.node).mt_merge_updated, (*(*modify).source.node).mt_merge_deleted);
        let (updates, deletes) = (updated - (*modify).seen_updated, deleted - (*modify).seen_deleted);
        ((*modify).seen_updated, (*modify).seen_deleted) = (updated, deleted);
        if rows == 0 {
            return if updates > 0.0 { vanished(modify) } else { ptr::null_mut() };
        }
        if updates > 0.0 {
            return charge_last(modify, Operation::Update, rows.min(updates as u64));
        }
        if deletes > 0.0 {
            return charge_last(modify, Operation::Delete, rows.min(deletes as u64));
        }
        if (*modify).captures { captured(|| capture::inserted(modify, rows)) } else { ptr::null_mut() }
    }
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
#[expect(ffi_unwind_calls, reason = "plain old frame")]
unsafe fn relation_of_row(node: *mut pg_sys::ModifyTableState, slot: *mut pg_sys::TupleTableSlot) -> pg_sys::Relation {
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
#[cold]
unsafe fn vanished(modify: *mut ModifyNode) -> *mut PendingError {
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
            raise = charge_last(modify, Operation::Update, 1);
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

/// A conflicting row was updated when the projection for it was filled and a row counts as processed. Which partition
/// it was in is told by the slot that the conflicting row was locked into; both marks are wiped for the next row.
unsafe fn conflicted(modify: *mut ModifyNode, rows: u64) -> *mut PendingError {
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
                true => charge(modify, 0, Operation::Update, 1),
                false if elsewhere != pg_sys::InvalidOid => {
                    (*modify).changed = ptr::null_mut();
                    charge_partition(modify, elsewhere)
                }
                false if (*modify).captures => captured(|| capture::inserted(modify, rows)),
                false => ptr::null_mut(),
            };
        }
        let routed = (*(*modify).source.estate).es_tuple_routing_result_relations;
        let count = if routed.is_null() { 0 } else { usize::try_from((*routed).length).unwrap_or(0) };
        let mut partition = pg_sys::InvalidOid;
        for index in 0..count {
            let leaf = (*(*routed).elements.add(index)).ptr_value.cast::<pg_sys::ResultRelInfo>();
            // The list is the query's; other nodes have their partitions in it too.
            if (*leaf).ri_RootResultRelInfo == (*node).rootResultRelInfo
                && let Some(relation) = conflict_in(leaf, &mut updated)
            {
                partition = relation;
                (*modify).changed = leaf;
            }
        }
        if rows == 0 || !updated || partition == pg_sys::InvalidOid {
            let inserted = rows > 0 && !updated && (*modify).captures;
            return if inserted { captured(|| capture::inserted(modify, rows)) } else { ptr::null_mut() };
        }
        charge_partition(modify, partition)
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
        if !is_empty(projected) {
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
    let raise = charge::deciding(|| {
        binding = charge::binding_to_count(partition, actor)?;
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
        let bindings = &mut (*modify).bindings;
        let known = bindings.iter().position(|known| known.as_ref().is_some_and(|known| known.name == binding.name));
        let index = known.unwrap_or_else(|| {
            bindings.push(Some(binding));
            bindings.len() - 1
        });
        charge(modify, index, Operation::Update, 1)
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
            let raise = charge(modify, index, operation, rows);
            if !raise.is_null() {
                return raise;
            }
        }
    }
    ptr::null_mut()
}

/// Charges rows of one of the node's relations.
///
/// # Safety
/// The node is alive.
#[inline]
unsafe fn charge(modify: *mut ModifyNode, index: usize, operation: Operation, rows: u64) -> *mut PendingError {
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
fn captured(look: impl FnOnce() -> Result<(), Failure>) -> *mut PendingError {
    guarded(look)
}
