//! The two versions of a row that was just changed: the one that this command ended, and the one it made.
//!
//! Between two rows of a ModifyTable nothing else of the command has run, so the way there is short: from the version that
//! the plan gave (or that was in conflict) along the update chain to the first one that this transaction ended, which is the
//! row as it was, also where another session changed it first; and from there one step on. Versions in between cannot have
//! been pruned, for the command's snapshot is older than what ended them. A row that moved to another partition left no
//! trail; the slot that it was inserted from says where it is, so these slots' marks are wiped after each row.

use core::ptr;

use pgrx::pg_sys;

use super::ffi::{self, PgError, pointers};

/// A row before and after, copied to the query's per-row memory: good until its next row.
#[derive(Clone, Copy)]
pub struct Versions {
    pub relation: pg_sys::Relation,
    pub old: pg_sys::HeapTuple,
    /// Another one where the row moved to another partition; NULL with `new`.
    pub new_relation: pg_sys::Relation,
    /// NULL: the row is gone, or (`moved`) cannot be found where it went.
    pub new: pg_sys::HeapTuple,
    /// The row left its partition.
    pub moved: bool,
}

/// A node that writes, and the row that its plan gave it last.
#[derive(Clone, Copy)]
pub struct Node {
    pub estate: *mut pg_sys::EState,
    /// NULL where it is not known.
    pub node: *mut pg_sys::ModifyTableState,
    /// The row; NULL where it is not remembered.
    pub last: *mut pg_sys::TupleTableSlot,
}

impl Node {
    /// No node.
    pub const NONE: Self = Self { estate: ptr::null_mut(), node: ptr::null_mut(), last: ptr::null_mut() };
}

/// The versions of the row that the node was given last and changed. None where the table keeps no versions that can be read:
/// a foreign table, another access method than heap.
///
/// # Safety
/// Called between two rows of the node, of which `info` is the result relation that was changed.
///
/// # Errors
/// What reading the table may raise.
pub unsafe fn of_last_row(of: Node, info: *mut pg_sys::ResultRelInfo) -> Result<Option<Versions>, PgError> {
    // SAFETY: node, relation and slot of a living query.
    unsafe {
        let last = of.last;
        let Some(column) = usize::try_from((*info).ri_RowIdAttNo).ok().and_then(|number| number.checked_sub(1)) else {
            return Ok(None);
        };
        let unknown = last.is_null() || column >= usize::try_from((*last).tts_nvalid).unwrap_or(0);
        if unknown || *(*last).tts_isnull.add(column) || !is_heap((*info).ri_RelationDesc) {
            return Ok(None);
        }
        let at: pg_sys::ItemPointer = (*(*last).tts_values.add(column)).cast_mut_ptr();
        from(of, info, *at)
    }
}

/// Makes an INSERT … ON CONFLICT DO UPDATE keep the row that was in conflict until the next one, in the slot that is for
/// triggers: its own is cleared too soon. What asks for that is a transition table that nobody reads.
///
/// # Safety
/// The node was just started and has not run.
///
/// # Errors
/// What making a transition table may raise.
#[expect(ffi_unwind_calls, reason = "inside protect")]
pub unsafe fn keep_conflicts(node: *mut pg_sys::ModifyTableState) -> Result<(), PgError> {
    // SAFETY: the caller's promise; nothing but the raw call inside.
    unsafe {
        let estate = (*node).ps.state;
        let capture = (*node).mt_oc_transition_capture;
        let kept = !capture.is_null() && ((*capture).tcs_update_old_table || (*capture).tcs_update_new_table);
        if kept || (*estate).es_top_eflags as u32 & pg_sys::EXEC_FLAG_SKIP_TRIGGERS != 0 {
            return Ok(());
        }
        let relation = (*(*(*node).rootResultRelInfo).ri_RelationDesc).rd_id;
        let mut triggers = pg_sys::TriggerDesc { trig_update_old_table: true, ..Default::default() };
        let mut made = ptr::null_mut();
        ffi::protect(|| {
            made = ffi::MakeTransitionCaptureState(&mut triggers, relation, pg_sys::CmdType::CMD_UPDATE);
        })?;
        (*node).mt_oc_transition_capture = made;
        Ok(())
    }
}

/// The versions of the row that was in conflict with one that was to be inserted, and was updated.
///
/// # Safety
/// As for [`of_last_row`]; `info` is the relation whose row was in conflict, and [`keep_conflicts`] was called.
///
/// # Errors
/// What reading the table may raise.
pub unsafe fn of_conflict(of: Node, info: *mut pg_sys::ResultRelInfo) -> Result<Option<Versions>, PgError> {
    // SAFETY: as above.
    unsafe {
        let old = (*info).ri_TrigOldSlot;
        if old.is_null() || !is_heap((*info).ri_RelationDesc) {
            return Ok(None);
        }
        from(of, info, (*old).tts_tid)
    }
}

/// The row that an INSERT just made. None where it was not made by a plain insert into a heap.
///
/// # Safety
/// As for [`of_last_row`].
///
/// # Errors
/// What reading the table may raise.
pub unsafe fn inserted(of: Node) -> Result<Option<(pg_sys::Relation, pg_sys::HeapTuple)>, PgError> {
    // SAFETY: as above.
    unsafe { newly_made(of, (*of.node).resultRelInfo, pg_sys::InvalidOid) }
}

/// Wipes the marks that tell where a row was inserted, so that the next one's are its own.
///
/// # Safety
/// As for [`of_last_row`].
pub unsafe fn wipe(of: Node, info: *mut pg_sys::ResultRelInfo) {
    // SAFETY: between two rows nobody reads these marks.
    unsafe { for_each_slot(of, info, |slot| (*slot).tts_tableOid = pg_sys::InvalidOid) };
}

unsafe fn is_heap(relation: pg_sys::Relation) -> bool {
    // SAFETY: an open relation.
    unsafe { (*(*relation).rd_rel).relam == pg_sys::HEAP_TABLE_AM_OID }
}

unsafe fn from(
    of: Node,
    info: *mut pg_sys::ResultRelInfo,
    start: pg_sys::ItemPointerData,
) -> Result<Option<Versions>, PgError> {
    // SAFETY: as for `of_last_row`.
    unsafe {
        let relation = (*info).ri_RelationDesc;
        let mut at = start;
        loop {
            let old = fetch(of, relation, at)?;
            if old.is_null() {
                return Ok(None);
            }
            let header = (*old).t_data;
            let next = (*header).t_ctid;
            if is_ended_by_us(header) {
                let mut versions = Versions {
                    relation,
                    old,
                    new_relation: ptr::null_mut(),
                    new: ptr::null_mut(),
                    moved: is_moved_mark(&next),
                };
                if versions.moved {
                    if let Some((to, new)) = newly_made(of, info, (*relation).rd_id)? {
                        versions.new_relation = to;
                        versions.new = new;
                    }
                } else if !is_same(&next, &at) {
                    versions.new_relation = relation;
                    versions.new = fetch(of, relation, next)?;
                }
                return Ok(Some(versions));
            }
            if is_same(&next, &at) || is_moved_mark(&next) {
                return Ok(None);
            }
            at = next;
        }
    }
}

/// Whether this transaction updated or deleted the version; locking it ends nothing.
///
/// # Safety
/// A version of a row as it is stored, or a copy of one.
pub unsafe fn is_ended_by_us(header: pg_sys::HeapTupleHeader) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        let mask = u32::from((*header).t_infomask);
        if mask & pg_sys::HEAP_XMAX_INVALID != 0 || mask & pg_sys::HEAP_XMAX_LOCK_ONLY != 0 {
            return false;
        }
        let ended_by = if mask & pg_sys::HEAP_XMAX_IS_MULTI != 0 {
            pg_sys::HeapTupleGetUpdateXid(header)
        } else {
            (*header).t_choice.t_heap.t_xmax
        };
        pg_sys::TransactionIdIsCurrentTransactionId(ended_by)
    }
}

/// `MovedPartitionsOffsetNumber`: in place of the next version of a row that went to another partition.
const MOVED_PARTITIONS: pg_sys::OffsetNumber = 0xfffd;

/// Whether a version's next one is in another partition.
pub fn is_moved_mark(next: &pg_sys::ItemPointerData) -> bool {
    next.ip_blkid.bi_hi == u16::MAX && next.ip_blkid.bi_lo == u16::MAX && next.ip_posid == MOVED_PARTITIONS
}

fn is_same(one: &pg_sys::ItemPointerData, other: &pg_sys::ItemPointerData) -> bool {
    one.ip_blkid.bi_hi == other.ip_blkid.bi_hi
        && one.ip_blkid.bi_lo == other.ip_blkid.bi_lo
        && one.ip_posid == other.ip_posid
}

/// A version as it is stored, copied to the query's per-row memory; NULL where there is none.
#[expect(ffi_unwind_calls, reason = "inside protect")]
unsafe fn fetch(
    of: Node,
    relation: pg_sys::Relation,
    at: pg_sys::ItemPointerData,
) -> Result<pg_sys::HeapTuple, PgError> {
    // SAFETY: the relation is open; nothing but raw calls inside.
    unsafe {
        let context = per_row(of);
        let mut tuple = pg_sys::HeapTupleData { t_self: at, ..Default::default() };
        let mut copy = ptr::null_mut();
        ffi::protect(|| {
            let mut buffer: pg_sys::Buffer = 0;
            if ffi::heap_fetch(relation, &raw mut pg_sys::SnapshotAnyData, &mut tuple, &mut buffer, false) {
                let before = pg_sys::CurrentMemoryContext;
                pg_sys::CurrentMemoryContext = context;
                copy = ffi::heap_copytuple(&mut tuple);
                pg_sys::CurrentMemoryContext = before;
                ffi::ReleaseBuffer(buffer);
            }
        })?;
        Ok(copy)
    }
}

/// The query's per-row memory, which the executor resets before it asks for the next row.
///
/// # Safety
/// The node's query is alive.
pub unsafe fn per_row(of: Node) -> pg_sys::MemoryContext {
    // SAFETY: the caller's promise.
    unsafe {
        let mut context = (*of.estate).es_per_tuple_exprcontext;
        if context.is_null() {
            context = pg_sys::MakePerTupleExprContext(of.estate);
        }
        (*context).ecxt_per_tuple_memory
    }
}

/// The row that was just inserted into another relation than `not_in`: the slot it came from carries its place.
unsafe fn newly_made(
    of: Node,
    info: *mut pg_sys::ResultRelInfo,
    not_in: pg_sys::Oid,
) -> Result<Option<(pg_sys::Relation, pg_sys::HeapTuple)>, PgError> {
    // SAFETY: as for `of_last_row`.
    unsafe {
        let mut found = None;
        for_each_slot(of, info, |slot| {
            let table = (*slot).tts_tableOid;
            if table != pg_sys::InvalidOid && table != not_in {
                found = Some((table, (*slot).tts_tid));
            }
        });
        let Some((table, at)) = found else { return Ok(None) };
        let mut relation = ptr::null_mut();
        for_each_relation(of, |info| {
            if (*(*info).ri_RelationDesc).rd_id == table {
                relation = (*info).ri_RelationDesc;
            }
        });
        if relation.is_null() || !is_heap(relation) {
            return Ok(None);
        }
        let new = fetch(of, relation, at)?;
        let ours =
            !new.is_null() && pg_sys::TransactionIdIsCurrentTransactionId((*(*new).t_data).t_choice.t_heap.t_xmin);
        Ok(ours.then_some((relation, new)))
    }
}

/// The slots that a row may have been inserted from.
unsafe fn for_each_slot(
    of: Node,
    info: *mut pg_sys::ResultRelInfo,
    mut visit: impl FnMut(*mut pg_sys::TupleTableSlot),
) {
    // SAFETY: as for `of_last_row`.
    unsafe {
        let node = of.node;
        let mut visit = |slot: *mut pg_sys::TupleTableSlot| {
            if !slot.is_null() {
                visit(slot);
            }
        };
        visit((*info).ri_newTupleSlot);
        visit((*node).mt_root_tuple_slot);
        if (*node).operation == pg_sys::CmdType::CMD_INSERT {
            // Where nothing has to be projected, the plan's own row is what is inserted.
            visit(of.last);
        }
        for_each_merge_action(info, |action| {
            let projection = (*action).mas_proj;
            if !projection.is_null() {
                visit((*projection).pi_state.resultslot);
            }
        });
        for_each_relation(of, |info| visit((*info).ri_PartitionTupleSlot));
    }
}

unsafe fn for_each_merge_action(
    info: *mut pg_sys::ResultRelInfo,
    mut visit: impl FnMut(*mut pg_sys::MergeActionState),
) {
    // SAFETY: a result relation of a living query.
    unsafe {
        #[cfg(not(since_pg17))]
        let lists = [(*info).ri_matchedMergeAction, (*info).ri_notMatchedMergeAction];
        #[cfg(since_pg17)]
        let lists = (*info).ri_MergeActions;
        for list in lists {
            pointers::<pg_sys::MergeActionState>(list).for_each(&mut visit);
        }
    }
}

/// The node's result relations, and the partitions that rows were routed to.
unsafe fn for_each_relation(of: Node, mut visit: impl FnMut(*mut pg_sys::ResultRelInfo)) {
    // SAFETY: as for `of_last_row`.
    unsafe {
        let node = of.node;
        for index in 0..usize::try_from((*node).mt_nrels).unwrap_or(0) {
            visit((*node).resultRelInfo.add(index));
        }
        let root = (*node).rootResultRelInfo;
        pointers::<pg_sys::ResultRelInfo>((*of.estate).es_tuple_routing_result_relations)
            // The list is the query's; other nodes have their partitions in it too.
            .filter(|leaf| (**leaf).ri_RootResultRelInfo == root)
            .for_each(visit);
    }
}
