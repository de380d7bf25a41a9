//! One executor run's ModifyTable nodes while they are counted.
//!
//! A modify node dies with its query's memory, whichever way that goes; portals suspend and interleave, so they are found
//! by node and are no stack.

use core::mem::ManuallyDrop;
use core::ops::{Deref, DerefMut};
use core::ptr;
use std::rc::Rc;

use pgrx::pg_sys;
use rules::words::{Operation, Place};

use crate::guard::limits::binding::Binding;
use crate::guard::limits::{charge, lost_count};
use crate::guard::where_clause::scan_filters::Estimate;
use crate::pg::backend_local::{BackendCell, BackendLocal, Borrowed};
use crate::pg::contained::contained;
use crate::pg::ffi::{self, NodeInstrumentation, Opaque};
use crate::pg::row_version::Node;
use crate::session::actor::Actor;

/// How a node tells what it did to the row it was given last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Update,
    Delete,
    Merge,
    /// INSERT … ON CONFLICT DO UPDATE.
    Conflict,
    /// Another INSERT; looked at only where rows are captured.
    Insert,
    /// No ModifyTable to count on: only the number at the end of the run is known.
    Whole(Operation),
}

/// A node's function that gives its next row.
pub type ExecProcNode = unsafe extern "C-unwind" fn(*mut pg_sys::PlanState) -> *mut pg_sys::TupleTableSlot;

/// A foreign table whose rows the foreign server changes by itself.
pub struct Remote {
    /// Its place among the node's result relations.
    pub index: usize,
    /// Where its scan counts the rows.
    pub rows: *mut NodeInstrumentation,
    pub seen: u64,
    /// The scan is the node's own child and returns the rows: it counts each only after the child's stand-in has
    /// returned.
    pub returned: bool,
}

/// The counting of one node. Never freed but used again, and never borrowed while it is in use: what runs between two rows of a
/// node may look it up in turn, so its fields are read and written in place. All that the per-row functions touch is plain
/// data.
pub struct ModifyNode {
    pub kind: Kind,
    /// Its node is NULL for [`Kind::Whole`]; the row that the child gave last is there where that is remembered.
    pub source: Node,
    pub child: *mut pg_sys::PlanState,
    pub child_exec: Option<ExecProcNode>,
    /// For a WITH branch, whose `canSetTag` was false: what runs it, the node itself or a custom scan around it, and the
    /// function of that, with its own count of processed rows.
    pub outer: *mut pg_sys::PlanState,
    pub outer_exec: Option<ExecProcNode>,
    pub processed: u64,
    /// What was counted so far, by the three clocks that nodes have.
    pub seen: u64,
    pub seen_updated: f64,
    pub seen_deleted: f64,
    /// The foreign tables that are modified remotely.
    pub remote: Vec<Remote>,
    pub remembers: bool,
    /// Each changed row is shown to [`capture`](crate::guard::executor::capture).
    pub captures: bool,
    /// The result relation whose row was changed last.
    pub changed: *mut pg_sys::ResultRelInfo,
    /// Rows may move between partitions.
    pub moves: bool,
    /// Rows that the running subtransaction had deleted of the last row's relation when the child gave that row, as far
    /// as the statistics collect them.
    pub deleted: i64,
    /// Where rows are charged; set at the first one.
    pub place: Option<Place>,
    pub estimate: Estimate,
    pub actor: Actor,
    /// By result relation, in the node's order.
    pub bindings: Vec<Option<Rc<Binding>>>,
    callback: pg_sys::MemoryContextCallback,
}

struct State {
    active: Vec<*mut ModifyNode>,
    free: Vec<*mut ModifyNode>,
}

static STATE: BackendLocal<State> = BackendLocal::new(State { active: Vec::new(), free: Vec::new() });

#[track_caller]
fn state() -> Borrowed<State> {
    STATE.borrow()
}

/// Whether any run is watched; one compare for a SELECT.
#[inline(always)]
pub fn any() -> bool {
    !state().active.is_empty()
}

/// The modify node that was found last. A modify node is never freed, and one that is not in use has no child.
static RECENT: BackendCell<*mut ModifyNode> = BackendCell::new(ptr::null_mut());

/// The modify node of a node's child.
#[inline]
pub fn of_child(child: *mut pg_sys::PlanState) -> *mut ModifyNode {
    // SAFETY: NULL, or a modify node that is active or waits to be used again.
    unsafe {
        let recent = RECENT.get();
        if !recent.is_null() && (*recent).child == child {
            return recent;
        }
        let found = find(|modify| (*modify).child == child);
        RECENT.set(found);
        found
    }
}

/// The modify node of a WITH branch.
#[inline]
pub fn of_outer(outer: *mut pg_sys::PlanState) -> *mut ModifyNode {
    // SAFETY: as for `of_child`.
    unsafe { find(|modify| (*modify).outer == outer) }
}

#[inline]
fn find(matches: impl Fn(*mut ModifyNode) -> bool) -> *mut ModifyNode {
    // The innermost run is the last one made.
    state().active.iter().rev().copied().find(|modify| matches(*modify)).unwrap_or(ptr::null_mut())
}

/// A modify node that is being filled in. What is not put to work goes back to those that wait to be used again, whichever way
/// its maker leaves: it may be the one that was found last.
pub struct Draft(*mut ModifyNode);

impl Deref for Draft {
    type Target = ModifyNode;

    #[inline(always)]
    fn deref(&self) -> &ModifyNode {
        // SAFETY: the draft's own until `activate` takes it; nobody else looks at it.
        unsafe { &*self.0 }
    }
}

impl DerefMut for Draft {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut ModifyNode {
        // SAFETY: as above.
        unsafe { &mut *self.0 }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        self.empty();
        state().free.push(self.0);
    }
}

/// A modify node to fill in; one that is not in use any more, where there is one.
pub fn fresh(kind: Kind, estate: *mut pg_sys::EState, actor: Actor) -> Draft {
    if let Some(used) = state().free.pop() {
        let mut draft = Draft(used);
        draft.kind = kind;
        draft.source.estate = estate;
        draft.actor = actor;
        return draft;
    }
    Draft(Box::into_raw(Box::new(ModifyNode {
        kind,
        source: Node { estate, ..Node::NONE },
        child: ptr::null_mut(),
        child_exec: None,
        outer: ptr::null_mut(),
        outer_exec: None,
        processed: 0,
        seen: 0,
        seen_updated: 0.0,
        seen_deleted: 0.0,
        remote: Vec::new(),
        remembers: false,
        captures: false,
        changed: ptr::null_mut(),
        moves: false,
        deleted: 0,
        place: None,
        estimate: Estimate::NONE,
        actor,
        bindings: Vec::new(),
        callback: pg_sys::MemoryContextCallback::default(),
    })))
}

impl ModifyNode {
    /// As [`fresh`] makes it, but for what that sets and the room in the lists.
    fn empty(&mut self) {
        // No `..`: a field that joins has to be thought of here.
        let Self {
            kind: _,
            source,
            child,
            child_exec,
            outer,
            outer_exec,
            processed,
            seen,
            seen_updated,
            seen_deleted,
            remote,
            remembers,
            captures,
            changed,
            moves,
            deleted,
            place,
            estimate,
            actor: _,
            bindings,
            callback: _,
        } = self;
        *source = Node::NONE;
        *child = ptr::null_mut();
        *child_exec = None;
        *outer = ptr::null_mut();
        *outer_exec = None;
        (*processed, *seen) = (0, 0);
        (*seen_updated, *seen_deleted) = (0.0, 0.0);
        remote.clear();
        (*remembers, *captures, *moves) = (false, false, false);
        *changed = ptr::null_mut();
        *deleted = 0;
        *place = None;
        *estimate = Estimate::NONE;
        bindings.clear();
    }

    /// Whether nothing but counting is to be done between two of its node's rows, and each row that it processes is one
    /// more of the same, or of a MERGE, whose own stand-in asks.
    pub fn only_counts(&self) -> bool {
        matches!(self.kind, Kind::Update | Kind::Delete | Kind::Merge)
            && !self.moves
            && !self.remembers
            && self.remote.is_empty()
    }
}

/// Puts a modify node to work until its query's memory goes.
///
/// # Safety
/// Its EState is that of a query that was just started.
pub unsafe fn activate(draft: Draft) {
    let modify = ManuallyDrop::new(draft).0;
    // SAFETY: the query's memory lives as long as its nodes; a modify node outlives it.
    unsafe {
        (*modify).callback.func = Some(query_gone);
        (*modify).callback.arg = modify.cast();
        let context = (*(*modify).source.estate).es_query_cxt;
        ffi::MemoryContextRegisterResetCallback(context, &raw mut (*modify).callback);
    }
    state().active.push(modify);
}

/// The query's memory goes, at its end or after an error.
unsafe extern "C-unwind" fn query_gone(argument: Opaque) {
    if !contained("letting a query go", || forget(argument.cast())) {
        lost_count::lose(false);
        contained("giving a query up", || give_up(argument.cast()));
    }
}

/// Never looks at a node again, nor at its memory; what is left of it is not even dropped. Others may be where it was.
fn give_up(gone: *mut ModifyNode) {
    let mut state = state();
    if let Some(at) = state.active.iter().rposition(|modify| *modify == gone) {
        state.active.swap_remove(at);
        // SAFETY: nobody looks at it any more, but to see whose it is.
        unsafe { ((*gone).child, (*gone).outer) = (ptr::null_mut(), ptr::null_mut()) };
    }
}

fn forget(gone: *mut ModifyNode) {
    charge::close_run(gone.cast());
    let mut state = state();
    if let Some(at) = state.active.iter().rposition(|modify| *modify == gone) {
        state.active.swap_remove(at);
        // SAFETY: nobody looks at it any more.
        unsafe { (*gone).empty() };
        state.free.push(gone);
    }
}

/// The modify nodes of a query, the innermost run first; `next` is where the search continues.
pub fn of_query(estate: *mut pg_sys::EState, next: &mut usize) -> *mut ModifyNode {
    let state = state();
    *next = (*next).min(state.active.len());
    while *next > 0 {
        *next -= 1;
        if let Some(modify) = state.active.get(*next).copied()
            // SAFETY: it is active.
            && unsafe { (*modify).source.estate } == estate
        {
            return modify;
        }
    }
    ptr::null_mut()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// [`RECENT`] keeps pointing at a modify node that was found, so its memory has to stay that of one.
    #[test]
    fn a_draft_that_is_given_up_is_used_again_and_never_freed() {
        let nobody = pg_sys::InvalidOid;
        let actor = Actor { login: nobody, session: nobody, set: nobody };
        let draft = |kind| fresh(kind, ptr::null_mut(), actor);
        let mut first = draft(Kind::Update);
        first.seen = 7;
        let place = ptr::from_ref::<ModifyNode>(&first);
        let second = draft(Kind::Delete);
        assert!(!ptr::eq(place, &*second));
        drop(first);
        let again = draft(Kind::Merge);
        assert!(ptr::eq(place, &*again));
        assert_eq!((again.kind, again.seen), (Kind::Merge, 0));
    }
}
