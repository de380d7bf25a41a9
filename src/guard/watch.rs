//! One executor run and its ModifyTable nodes: which of them write covered tables, and their counting from start to end.
//!
//! After ExecutorStart the nodes are there and have not run: the plan's own ModifyTable, also below custom scans, and one for each
//! data-modifying WITH branch. For each that may change rows of a covered table a [`Watch`] is made and the node's child
//! gets [`super::count::child`] in front, which runs before each row is fetched. A watch dies with the query's
//! memory, whichever way that goes; portals suspend and interleave, so watches are found by node and are no stack.

use core::ptr;
use std::rc::Rc;

use pgrx::pg_sys;

use super::book::{self, Binding};
use super::budget::Place;
use super::count;
use crate::error::Error;
use crate::ffi::{Backend, Failure, Opaque, Raise};
use crate::policy::catalog;
use crate::policy::model::Operation;
use crate::session::Actor;

/// How a node tells what it did to the row it was given last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Update,
    Delete,
    Merge,
    /// INSERT … ON CONFLICT DO UPDATE.
    Conflict,
    /// No ModifyTable to count on: only the number at the end of the run is known.
    Whole(Operation),
}

type ExecProcNode = unsafe extern "C-unwind" fn(*mut pg_sys::PlanState) -> *mut pg_sys::TupleTableSlot;

/// The counting of one node. Boxed and used again; all that the per-row functions touch is plain data.
pub struct Watch {
    pub kind: Kind,
    pub estate: *mut pg_sys::EState,
    /// NULL for [`Kind::Whole`].
    pub node: *mut pg_sys::ModifyTableState,
    pub child: *mut pg_sys::PlanState,
    pub child_exec: Option<ExecProcNode>,
    /// For a WITH branch, whose `canSetTag` was false: the node's own function, with its own count of processed rows.
    pub node_exec: Option<ExecProcNode>,
    pub processed: u64,
    /// What was counted so far, by the three clocks that nodes have.
    pub seen: u64,
    pub seen_updated: f64,
    pub seen_deleted: f64,
    /// A foreign table that is modified remotely, all rows in one go.
    pub direct: Option<usize>,
    pub direct_rows: *mut pg_sys::Instrumentation,
    pub returning: bool,
    /// Where rows are charged; set at the first one.
    pub place: Option<Place>,
    pub estimate: Option<u64>,
    pub actor: Actor,
    /// By result relation, in the node's order.
    pub bindings: Vec<Option<Rc<Binding>>>,
    callback: pg_sys::MemoryContextCallback,
}

struct State {
    active: Vec<Box<Watch>>,
    free: Vec<Box<Watch>>,
}

static STATE: Backend<State> = Backend::new(State { active: Vec::new(), free: Vec::new() });

fn state() -> &'static mut State {
    // SAFETY: single-threaded; references end before the executor goes on.
    unsafe { &mut *STATE.get() }
}

/// Whether any run is watched; one compare for a SELECT.
#[inline(always)]
pub fn any() -> bool {
    !state().active.is_empty()
}

/// The watch of a node's child.
#[inline]
pub fn of_child(child: *mut pg_sys::PlanState) -> *mut Watch {
    find(|watch| watch.child == child)
}

/// The watch of a node itself.
#[inline]
pub fn of_node(node: *mut pg_sys::PlanState) -> *mut Watch {
    find(|watch| watch.node.cast() == node)
}

#[inline]
fn find(matches: impl Fn(&Watch) -> bool) -> *mut Watch {
    // The innermost run is the last one made.
    state()
        .active
        .iter_mut()
        .rev()
        .find(|watch| matches(watch))
        .map_or(ptr::null_mut(), |watch| ptr::from_mut(&mut **watch))
}

/// The cells of a list of pointers.
unsafe fn pointers<T>(list: *mut pg_sys::List) -> impl Iterator<Item = *mut T> {
    // SAFETY: a list of the executor's, NULL or valid; its cells hold pointers.
    unsafe {
        let length = if list.is_null() { 0 } else { usize::try_from((*list).length).unwrap_or(0) };
        (0..length).map(move |index| (*(*list).elements.add(index)).ptr_value.cast())
    }
}

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

/// After ExecutorStart of something that may write: finds what it writes and counts what is covered. Gives what to raise.
///
/// # Safety
/// `query_desc` was just started; called from a plain old frame.
pub unsafe fn begin(query_desc: *mut pg_sys::QueryDesc) -> *mut Raise {
    // SAFETY: the caller's promise.
    book::guarded(|| unsafe { begin_watching(query_desc) })
}

unsafe fn begin_watching(query_desc: *mut pg_sys::QueryDesc) -> Result<(), Failure> {
    // SAFETY: executor structures of the query that was just started.
    unsafe {
        let estate = (*query_desc).estate;
        let actor = Actor::current();
        let operation = (*query_desc).operation;
        let own = own_node((*query_desc).planstate);
        if !own.is_null() {
            watch_node(estate, own, actor)?;
        } else if matches!(operation, pg_sys::CmdType::CMD_UPDATE | pg_sys::CmdType::CMD_DELETE) {
            watch_whole(query_desc, actor)?;
        }
        for node in pointers::<pg_sys::ModifyTableState>((*estate).es_auxmodifytables) {
            if node != own {
                watch_node(estate, node, actor)?;
            }
        }
        Ok(())
    }
}

unsafe fn watch_node(
    estate: *mut pg_sys::EState,
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
            _ => return Ok(()),
        };
        let operations: &[Operation] = match kind {
            Kind::Update | Kind::Conflict => &[Operation::Update],
            Kind::Delete => &[Operation::Delete],
            _ => &[Operation::Update, Operation::Delete],
        };
        // Rows of an ON CONFLICT on a partitioned table go to partitions that are found row by row.
        let routed = kind == Kind::Conflict && !(*node).mt_partition_tuple_routing.is_null();
        let relations = usize::try_from((*node).mt_nrels).unwrap_or(0);
        let relation = |index: usize| (*(*(*node).resultRelInfo.add(index)).ri_RelationDesc).rd_id;
        let mut covered = routed && catalog::installed();
        for index in 0..relations {
            covered |= book::binding(relation(index), actor)?
                .is_some_and(|binding| operations.iter().any(|operation| !binding.charges(*operation).is_empty()));
        }
        if !covered {
            return Ok(());
        }
        let child = (*node).ps.lefttree;
        let Some(child_exec) = (!child.is_null()).then(|| (*child).ExecProcNodeReal).flatten() else {
            return Err(undecided("its plan has no rows to count", relation(0)));
        };
        let direct = (0..relations).find(|index| (*(*node).resultRelInfo.add(*index)).ri_usesFdwDirectModify);
        let is_branch = !(*node).canSetTag;
        let mut direct_rows = ptr::null_mut();
        if direct.is_some() && is_branch {
            // Without the tag such a scan tells its rows to EXPLAIN only.
            if (*child).type_ != pg_sys::NodeTag::T_ForeignScanState {
                return Err(undecided("rows that a foreign server changes inside WITH cannot be counted", relation(0)));
            }
            if (*child).instrument.is_null() {
                (*child).instrument = pg_sys::InstrAlloc(1, pg_sys::InstrumentOption::INSTRUMENT_ROWS as i32, false);
            }
            direct_rows = (*child).instrument;
        }
        let mut watch = fresh(kind, estate, actor);
        for index in 0..relations {
            watch.bindings.push(book::binding(relation(index), actor)?);
        }
        watch.node = node;
        watch.child = child;
        watch.child_exec = Some(child_exec);
        watch.estimate = Some((*(*child).plan).plan_rows as u64);
        watch.direct = direct;
        watch.direct_rows = direct_rows;
        watch.returning = !(*plan).returningLists.is_null();
        (*child).ExecProcNodeReal = Some(count::child);
        if is_branch {
            watch.node_exec = (*node).ps.ExecProcNodeReal;
            (*node).canSetTag = true;
            (*node).ps.ExecProcNodeReal = Some(count::node);
        }
        activate(watch);
        Ok(())
    }
}

/// A plan without a ModifyTable, of a distributed engine say: its count is checked when the run is over.
unsafe fn watch_whole(query_desc: *mut pg_sys::QueryDesc, actor: Actor) -> Result<(), Failure> {
    // SAFETY: structures of the query that was just started; result relations are indexes into the range table.
    unsafe {
        let statement = (*query_desc).plannedstmt;
        let operation =
            if (*query_desc).operation == pg_sys::CmdType::CMD_DELETE { Operation::Delete } else { Operation::Update };
        let targets = (*statement).resultRelations;
        if targets.is_null() || (*targets).length < 1 {
            return Ok(());
        }
        let index = usize::try_from((*(*targets).elements).int_value).unwrap_or(0);
        let Some(entry) = pointers::<pg_sys::RangeTblEntry>((*statement).rtable).nth(index.saturating_sub(1)) else {
            return Ok(());
        };
        let binding = book::binding((*entry).relid, actor)?;
        if binding.as_ref().is_none_or(|binding| binding.charges(operation).is_empty()) {
            return Ok(());
        }
        let mut watch = fresh(Kind::Whole(operation), (*query_desc).estate, actor);
        watch.bindings.push(binding);
        watch.estimate = Some((*(*statement).planTree).plan_rows as u64);
        activate(watch);
        Ok(())
    }
}

fn undecided(reason: &str, relation: pg_sys::Oid) -> Failure {
    Failure::Ours(Error::Undecided {
        reason: reason.into(),
        hint: "As superuser, when it must be done all the same: SET writeguard.enabled = off;".into(),
        relation: catalog::relation_name(relation),
    })
}

fn fresh(kind: Kind, estate: *mut pg_sys::EState, actor: Actor) -> Box<Watch> {
    let blank = Watch {
        kind,
        estate,
        node: ptr::null_mut(),
        child: ptr::null_mut(),
        child_exec: None,
        node_exec: None,
        processed: 0,
        seen: 0,
        seen_updated: 0.0,
        seen_deleted: 0.0,
        direct: None,
        direct_rows: ptr::null_mut(),
        returning: false,
        place: None,
        estimate: None,
        actor,
        bindings: Vec::new(),
        callback: pg_sys::MemoryContextCallback::default(),
    };
    match state().free.pop() {
        Some(mut used) => {
            let mut bindings = core::mem::take(&mut used.bindings);
            bindings.clear();
            *used = Watch { bindings, ..blank };
            used
        }
        None => Box::new(blank),
    }
}

unsafe fn activate(mut watch: Box<Watch>) {
    watch.callback.func = Some(query_gone);
    watch.callback.arg = ptr::from_mut(&mut *watch).cast();
    // SAFETY: the query's memory lives as long as its nodes; the box does not move and outlives it.
    unsafe { pg_sys::MemoryContextRegisterResetCallback((*watch.estate).es_query_cxt, &mut watch.callback) };
    state().active.push(watch);
}

/// The query's memory goes, at its end or after an error.
unsafe extern "C-unwind" fn query_gone(argument: Opaque) {
    let gone: *mut Watch = argument.cast();
    let state = state();
    if let Some(at) = state.active.iter().rposition(|watch| ptr::eq(&raw const **watch, gone)) {
        let mut watch = state.active.swap_remove(at);
        watch.bindings.clear();
        watch.node = ptr::null_mut();
        watch.child = ptr::null_mut();
        watch.estate = ptr::null_mut();
        state.free.push(watch);
    }
}

/// After ExecutorRun or ExecutorFinish: counts what the nodes did after they last asked for a row.
///
/// # Safety
/// `query_desc` is being run; called from a plain old frame.
pub unsafe fn after_run(query_desc: *mut pg_sys::QueryDesc) -> *mut Raise {
    // SAFETY: watches of this query are alive as long as its EState; `charge` neither adds nor removes watches.
    unsafe {
        let estate = (*query_desc).estate;
        let mut at = state().active.len();
        while at > 0 {
            at -= 1;
            let watch: *mut Watch = match state().active.get_mut(at) {
                Some(watch) if watch.estate == estate && watch.node_exec.is_none() => &mut **watch,
                _ => continue,
            };
            let raise = count::rest(watch, (*estate).es_processed);
            if !raise.is_null() {
                return raise;
            }
        }
    }
    ptr::null_mut()
}
