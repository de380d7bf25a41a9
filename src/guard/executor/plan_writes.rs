//! What a plan writes, and to which tables.
//!
//! After ExecutorStart the nodes are there and have not run: the plan's own ModifyTable, also below custom scans, and
//! one for each data-modifying WITH branch. For each that may change rows of a covered table a [`ModifyNode`] is made, and the
//! node's child gets [`count::child`] in front, which runs before each row is fetched.

use core::ptr;
use std::rc::Rc;

use pgrx::pg_sys;
use rules::error::Error;
use rules::words::Operation;
use rustc_hash::{FxHashMap, FxHashSet};

use super::assigned_columns;
use super::modify_node::{self, Draft, Kind, ModifyNode, Remote};
use super::{capture, count};
use crate::guard::limits::binding::Binding;
use crate::guard::limits::bindings;
use crate::guard::rehearsal::account;
use crate::guard::verdict::violation;
use crate::guard::where_clause::scan_filters::estimate;
use crate::guard::where_clause::unfiltered_write::require_where;
use crate::pg::ereport::{Failure, PendingError};
use crate::pg::ffi::{self, pointers};
use crate::pg::row_version;
use crate::policy::{catalog, relation};
use crate::session::actor::{self, Actor};
use crate::session::statement;

/// The ModifyTable node of the plan itself, also below custom scans.
unsafe fn own_node(state: *mut pg_sys::PlanState) -> *mut pg_sys::ModifyTableState {
    // SAFETY: walks a plan state tree that ExecutorStart built.
    unsafe {
        if state.is_null() {
            return ptr::null_mut();
        }
        match (*state).type_ {
            pg_sys::NodeTag::T_ModifyTableState => state.cast(),
            pg_sys::NodeTag::T_CustomScanState => {
                let custom: *mut pg_sys::CustomScanState = state.cast();
                pointers((*custom).custom_ps)
                    .map(|below| own_node(below))
                    .find(|node| !node.is_null())
                    .unwrap_or(ptr::null_mut())
            }
            _ => ptr::null_mut(),
        }
    }
}

/// The whole of [`begin`] for nearly every write of a session that has written before: a plan that changes rows of one
/// table of which all is known. Where no policy covers it nothing is done, and where nothing but the number of rows is
/// asked for the node is watched. Says whether that was all; neither raises nor looks anything up.
///
/// # Safety
/// As for [`begin`].
#[inline]
pub unsafe fn begin_plainly(query_desc: *mut pg_sys::QueryDesc, actor: Actor) -> bool {
    // SAFETY: executor structures of the query that was just started.
    unsafe {
        let node: *mut pg_sys::ModifyTableState = (*query_desc).planstate.cast();
        let alone = !node.is_null()
            && (*node).ps.type_ == pg_sys::NodeTag::T_ModifyTableState
            && (*node).mt_nrels == 1
            && (*node).mt_partition_tuple_routing.is_null()
            && (*(*query_desc).estate).es_auxmodifytables.is_null()
            && !account::counts_everything()
            && !statement::is_executing();
        if !alone {
            return false;
        }
        match bindings::known((*(*(*node).resultRelInfo).ri_RelationDesc).rd_id, actor) {
            Some(Some(binding)) => watch_plainly((*query_desc).estate, node, binding, actor),
            Some(None) => true,
            None => false,
        }
    }
}

/// Watches a node that changes rows of one covered table, if nothing but their number is asked for.
unsafe fn watch_plainly(
    estate: *mut pg_sys::EState,
    node: *mut pg_sys::ModifyTableState,
    binding: Rc<Binding>,
    actor: Actor,
) -> bool {
    // SAFETY: a node of the query that was just started; it has not run.
    unsafe {
        let (kind, operation) = match (*node).operation {
            pg_sys::CmdType::CMD_UPDATE => (Kind::Update, Operation::Update),
            pg_sys::CmdType::CMD_DELETE => (Kind::Delete, Operation::Delete),
            _ => return false,
        };
        let (target, child) = ((*node).resultRelInfo, (*node).ps.lefttree);
        // A root of its own is that of a partition, from which rows may move.
        let plain = (*node).rootResultRelInfo == target
            && (*node).canSetTag
            && !(*target).ri_usesFdwDirectModify
            && !binding.wants_where(operation)
            && !binding.is_by_columns()
            && !capture::wants(&binding, &[operation])
            && !child.is_null();
        let Some(child_exec) = plain.then(|| (*child).ExecProcNodeReal).flatten() else { return false };
        if !binding.charges(operation).is_empty() {
            let mut modify = modify_node::fresh(kind, estate, actor);
            modify.bindings.push(Some(binding));
            actor::use_armed();
            put_in_front(modify, node, child_exec);
        }
        true
    }
}

/// Puts [`count::child`] in front of a node's child, whose own function `child_exec` is, and the draft to work.
unsafe fn put_in_front(mut modify: Draft, node: *mut pg_sys::ModifyTableState, child_exec: modify_node::ExecProcNode) {
    // SAFETY: a node of the query that was just started; it has not run.
    unsafe {
        let child = (*node).ps.lefttree;
        modify.source.node = node;
        modify.child = child;
        modify.child_exec = Some(child_exec);
        modify.estimate = estimate((*child).plan);
        (*child).ExecProcNodeReal = Some(if modify.kind == Kind::Merge { count::child_of_merge } else { count::child });
        modify_node::activate(modify);
    }
}

/// After ExecutorStart of something that may write: finds what it writes and counts what is covered. Gives what to
/// raise.
///
/// # Safety
/// `query_desc` was just started; called from a plain old frame.
pub unsafe fn begin(query_desc: *mut pg_sys::QueryDesc, actor: Actor) -> *mut PendingError {
    // SAFETY: the caller's promise.
    bindings::deciding(|| unsafe { begin_watching(query_desc, actor) })
}

unsafe fn begin_watching(query_desc: *mut pg_sys::QueryDesc, actor: Actor) -> Result<(), Failure> {
    // SAFETY: executor structures of the query that was just started.
    unsafe {
        let estate = (*query_desc).estate;
        let operation = (*query_desc).operation;
        let own = own_node((*query_desc).planstate);
        if !own.is_null() {
            watch_node(estate, own.cast(), own, actor)?;
        } else if matches!(operation, pg_sys::CmdType::CMD_UPDATE | pg_sys::CmdType::CMD_DELETE) {
            watch_whole(query_desc, actor)?;
        }
        for outer in pointers::<pg_sys::PlanState>((*estate).es_auxmodifytables) {
            // TimescaleDB puts the custom scan that it runs a ModifyTable by in its place.
            let node = own_node(outer);
            if !node.is_null() && node != own {
                watch_node(estate, outer, node, actor)?;
            }
        }
        Ok(())
    }
}

/// Watches a node that `outer` runs: itself, or a custom scan.
unsafe fn watch_node(
    estate: *mut pg_sys::EState,
    outer: *mut pg_sys::PlanState,
    node: *mut pg_sys::ModifyTableState,
    actor: Actor,
) -> Result<(), Failure> {
    // SAFETY: a node of the query that was just started; it has not run.
    unsafe {
        let plan: *mut pg_sys::ModifyTable = (*node).ps.plan.cast();
        let kind = match (*node).operation {
            pg_sys::CmdType::CMD_UPDATE => Kind::Update,
            pg_sys::CmdType::CMD_DELETE => Kind::Delete,
            pg_sys::CmdType::CMD_MERGE => Kind::Merge,
            pg_sys::CmdType::CMD_INSERT if (*plan).onConflictAction == pg_sys::OnConflictAction::ONCONFLICT_UPDATE => {
                Kind::Conflict
            }
            pg_sys::CmdType::CMD_INSERT if account::counts_everything() => Kind::Insert,
            _ => return Ok(()),
        };
        let operations: &[Operation] = match kind {
            Kind::Insert => &[],
            Kind::Update | Kind::Conflict => &[Operation::Update],
            Kind::Delete => &[Operation::Delete],
            _ => &[Operation::Update, Operation::Delete],
        };
        // Rows of an ON CONFLICT on a partitioned table go to partitions that are found row by row.
        let routed = kind == Kind::Conflict && !(*node).mt_partition_tuple_routing.is_null();
        let relations = usize::try_from((*node).mt_nrels).unwrap_or(0);
        let relation = |index: usize| (*(*(*node).resultRelInfo.add(index)).ri_RelationDesc).rd_id;
        let everything = account::counts_everything();
        let mut counted = false;
        let mut captures = everything;
        let mut modify = modify_node::fresh(kind, estate, actor);
        for index in 0..relations {
            let target = (*node).resultRelInfo.add(index);
            let binding = bindings::binding_to_count(relation(index), actor)?
                .map(|binding| assigned_columns::narrowed(binding, node, target, index));
            captures |= binding.as_ref().is_some_and(|binding| capture::wants(binding, operations));
            counted |= binding.as_ref().is_some_and(|binding| bindings::is_counted(binding, operations));
            modify.bindings.push(binding);
        }
        if counted {
            actor::use_armed();
        } else if !(everything || routed && catalog::installed()?) {
            return Ok(());
        }
        let child = (*node).ps.lefttree;
        let Some(child_exec) = (!child.is_null()).then(|| (*child).ExecProcNodeReal).flatten() else {
            let all = (0..relations).zip(&modify.bindings);
            let mut all = all.filter_map(|(index, binding)| Some((index, binding.as_ref()?)));
            let reason = "its plan has no rows to count";
            return all.try_for_each(|(index, binding)| cannot_count(binding, operations, reason, relation(index)));
        };
        if !matches!(kind, Kind::Conflict | Kind::Insert) {
            require_where(estate, node, operations, &modify.bindings)?;
        }
        if (0..relations).any(|index| (*(*node).resultRelInfo.add(index)).ri_usesFdwDirectModify) {
            watch_remotely(&mut modify, node, operations)?;
        }
        let root = (*node).rootResultRelInfo;
        modify.moves = matches!(kind, Kind::Update | Kind::Merge)
            && !root.is_null()
            && (*(*(*root).ri_RelationDesc).rd_rel).relkind as u8 == pg_sys::RELKIND_PARTITIONED_TABLE;
        modify.captures = captures || routed && capture::may_want();
        if modify.captures && kind == Kind::Conflict {
            row_version::keep_conflicts(node)?;
        }
        modify.remembers = modify.moves || modify.captures;
        if !(*node).canSetTag {
            modify.outer = outer;
            modify.outer_exec = (*outer).ExecProcNodeReal;
            (*node).canSetTag = true;
            (*outer).ExecProcNodeReal = Some(count::outer);
        }
        put_in_front(modify, node, child_exec);
        Ok(())
    }
}

/// Finds where rows are counted that foreign servers change by themselves.
#[cold]
#[inline(never)]
unsafe fn watch_remotely(
    modify: &mut ModifyNode,
    node: *mut pg_sys::ModifyTableState,
    operations: &[Operation],
) -> Result<(), Failure> {
    // SAFETY: as for `watch_node`, and the node has a child.
    unsafe {
        let plan: *mut pg_sys::ModifyTable = (*node).ps.plan.cast();
        let child = (*node).ps.lefttree;
        let mut scans = FxHashMap::default();
        remote_scans(child, &mut |scan, relation| {
            scans.insert(relation, scan);
        });
        let mut planned = FxHashSet::default();
        remote_scans_in_plan((*child).plan, &mut |relation| {
            planned.insert(relation);
        });
        for (index, binding) in modify.bindings.iter().enumerate() {
            let target = (*node).resultRelInfo.add(index);
            if !(*target).ri_usesFdwDirectModify {
                continue;
            }
            let Some(scan) = scans.get(&(*target).ri_RangeTableIndex).copied() else {
                if planned.contains(&(*target).ri_RangeTableIndex) {
                    // Pruned when the executor started: it does not run.
                    continue;
                }
                if let Some(binding) = binding {
                    let reason = "rows that a foreign server changes cannot be counted here";
                    cannot_count(binding, operations, reason, (*(*target).ri_RelationDesc).rd_id)?;
                }
                continue;
            };
            if (*scan).instrument.is_null() {
                (*scan).instrument = ffi::row_instrumentation();
            }
            let returned = scan == child && !(*plan).returningLists.is_null();
            modify.remote.push(Remote { index, rows: (*scan).instrument, seen: 0, returned });
        }
        Ok(())
    }
}

/// Visits the scans of a plan by which foreign servers modify relations, with the relations' range table indexes: the
/// ModifyTable's own child, or below whatever stands over them (an Append over partitions or children, a Result that
/// computes new values for it).
unsafe fn remote_scans(state: *mut pg_sys::PlanState, found: &mut impl FnMut(*mut pg_sys::PlanState, pg_sys::Index)) {
    // SAFETY: walks a plan state tree that ExecutorStart built.
    unsafe {
        if state.is_null() {
            return;
        }
        let mut array = |states: *mut *mut pg_sys::PlanState, count: core::ffi::c_int| {
            (0..usize::try_from(count).unwrap_or(0)).for_each(|index| remote_scans(*states.add(index), found));
        };
        match (*state).type_ {
            pg_sys::NodeTag::T_ForeignScanState => {
                let relation = (*(*state).plan.cast::<pg_sys::ForeignScan>()).resultRelation;
                if relation > 0 {
                    found(state, relation);
                }
            }
            pg_sys::NodeTag::T_AppendState => {
                let append: *mut pg_sys::AppendState = state.cast();
                array((*append).appendplans, (*append).as_nplans);
            }
            pg_sys::NodeTag::T_MergeAppendState => {
                let append: *mut pg_sys::MergeAppendState = state.cast();
                array((*append).mergeplans, (*append).ms_nplans);
            }
            pg_sys::NodeTag::T_SubqueryScanState => {
                remote_scans((*state.cast::<pg_sys::SubqueryScanState>()).subplan, found);
            }
            pg_sys::NodeTag::T_CustomScanState => {
                pointers((*state.cast::<pg_sys::CustomScanState>()).custom_ps)
                    .for_each(|below| remote_scans(below, found));
            }
            _ => {}
        }
        remote_scans((*state).lefttree, found);
        remote_scans((*state).righttree, found);
    }
}

/// The same of the plan, run or not: visits the range table indexes.
unsafe fn remote_scans_in_plan(plan: *mut pg_sys::Plan, found: &mut impl FnMut(pg_sys::Index)) {
    // SAFETY: walks a plan tree.
    unsafe {
        if plan.is_null() {
            return;
        }
        let mut list = |plans| pointers(plans).for_each(|below| remote_scans_in_plan(below, found));
        match (*plan).type_ {
            pg_sys::NodeTag::T_ForeignScan => found((*plan.cast::<pg_sys::ForeignScan>()).resultRelation),
            pg_sys::NodeTag::T_Append => list((*plan.cast::<pg_sys::Append>()).appendplans),
            pg_sys::NodeTag::T_MergeAppend => list((*plan.cast::<pg_sys::MergeAppend>()).mergeplans),
            pg_sys::NodeTag::T_SubqueryScan => {
                remote_scans_in_plan((*plan.cast::<pg_sys::SubqueryScan>()).subplan, found);
            }
            pg_sys::NodeTag::T_CustomScan => list((*plan.cast::<pg_sys::CustomScan>()).custom_plans),
            _ => {}
        }
        remote_scans_in_plan((*plan).lefttree, found);
        remote_scans_in_plan((*plan).righttree, found);
    }
}

/// A plan without a ModifyTable, of a distributed engine say: its count is checked when the run is over.
unsafe fn watch_whole(query_desc: *mut pg_sys::QueryDesc, actor: Actor) -> Result<(), Failure> {
    // SAFETY: structures of the query that was just started; result relations are indexes into the range table.
    unsafe {
        let statement = (*query_desc).plannedstmt;
        let operation =
            if (*query_desc).operation == pg_sys::CmdType::CMD_DELETE { Operation::Delete } else { Operation::Update };
        let place = (ffi::first_result_relation(statement) as usize).checked_sub(1);
        let entry = place.and_then(|place| pointers::<pg_sys::RangeTblEntry>((*statement).rtable).nth(place));
        let Some(entry) = entry else { return Ok(()) };
        let binding = bindings::binding_to_count((*entry).relid, actor)?;
        if binding.as_ref().is_none_or(|binding| !bindings::is_counted(binding, &[operation])) {
            return Ok(());
        }
        if let Some(binding) = binding.as_ref().filter(|binding| binding.wants_where(operation)) {
            let wanting = binding.only(operation, |policy| policy.policy.wants_where());
            if wanting.refuses(operation) {
                return Err(undecided("its plan does not show whether a condition narrows it", (*entry).relid));
            }
        }
        let mut modify = modify_node::fresh(Kind::Whole(operation), (*query_desc).estate, actor);
        modify.bindings.push(binding);
        modify.captures = capture::may_want();
        modify.estimate = estimate((*statement).planTree);
        actor::use_armed();
        modify_node::activate(modify);
        Ok(())
    }
}

/// Rows of a covered relation cannot be counted: that is refused where a policy would refuse anything, and recorded where
/// all policies are of mode observe or warn.
fn cannot_count(
    binding: &Binding,
    operations: &[Operation],
    reason: &str,
    relation: pg_sys::Oid,
) -> Result<(), Failure> {
    if operations.iter().any(|operation| binding.refuses(*operation)) {
        return Err(undecided(reason, relation));
    }
    for operation in operations {
        violation::note_uncounted(binding, *operation, reason)?;
    }
    Ok(())
}

fn undecided(reason: &str, relation: pg_sys::Oid) -> Failure {
    Failure::Ours(Error::Undecided {
        reason: reason.into(),
        hint: "As superuser, when it must be done all the same: SET writeguard.enabled = off;".into(),
        relation: relation::relation_name(relation),
    })
}
