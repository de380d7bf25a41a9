//! A backend's way to the counters: what the guard calls for the rows of covered statements.
//!
//! A statement is counted when its first row is charged, as one with that many rows; when more of its rows follow, it is
//! moved to the bucket that it belongs to by then. So the counters are right at any time, nobody has to tell when a
//! statement is over, and the commonest one, of a single row, costs a few compares and one atomic addition.

use core::sync::atomic::Ordering;
use std::rc::Rc;

use pgrx::pg_sys;
use rules::stat::histogram::bucket_of;
use rules::words::{Operation, RelationName};
use rustc_hash::{FxBuildHasher, FxHashMap};

use super::memory::{self, Entry, Key};
use crate::pg::backend_local::{BackendLocal, Borrowed};

/// Place of a table's counters in this session, by role; its operations follow in the order of [`Operation::ALL`].
pub type StatId = usize;

/// Of a table that no policy covers: a place that there never is.
pub const UNCOUNTED: StatId = usize::MAX >> 1;

/// A key as this session counts it.
struct Local {
    /// The statement that was counted last, and its rows so far.
    statement: u64,
    rows: u64,
    /// Where the counters are, and which use of that place is this key's.
    entry: &'static Entry,
    number: u64,
    /// The last statement that was counted as refused, and as overridden.
    refused: u64,
    overridden: u64,
}

static NOWHERE: Entry = Entry::blank();

struct State {
    locals: Vec<Local>,
    /// Whose they are, and for which role: as many of them as an operation has.
    tables: Vec<(Rc<RelationName>, pg_sys::Oid)>,
    known: FxHashMap<(Rc<RelationName>, u32), StatId>,
}

static STATE: BackendLocal<State> =
    BackendLocal::new(State { locals: Vec::new(), tables: Vec::new(), known: FxHashMap::with_hasher(FxBuildHasher) });

#[track_caller]
fn state() -> Borrowed<State> {
    STATE.borrow()
}

/// The place of a table's counters for a role. Looks nothing up in shared memory yet.
pub fn place_of(relation: &Rc<RelationName>, role: pg_sys::Oid) -> StatId {
    let mut state = state();
    let key = (Rc::clone(relation), u32::from(role));
    if let Some(known) = state.known.get(&key) {
        return *known;
    }
    let place = state.locals.len();
    state.locals.extend(Operation::ALL.map(|_| Local {
        statement: 0,
        rows: 0,
        entry: &NOWHERE,
        // Not even the number of a free place.
        number: u64::MAX,
        refused: 0,
        overridden: 0,
    }));
    state.tables.push((Rc::clone(relation), role));
    state.known.insert(key, place);
    place
}

/// Forgets all places. Only between transactions, when nobody holds a [`StatId`].
pub fn clear() {
    let mut state = state();
    state.locals.clear();
    state.tables.clear();
    state.known.clear();
}

impl Local {
    #[inline]
    fn is_current(&self) -> bool {
        self.entry.number.load(Ordering::Relaxed) == self.number
    }
}

impl State {
    /// A table's counters of an operation, with the entry that is theirs; none where there is none for them.
    fn settled(&mut self, place: StatId, operation: Operation) -> Option<&mut Local> {
        let local = self.locals.get_mut(place + operation as usize)?;
        if !local.is_current() {
            let (relation, role) = self.tables.get(place / Operation::ALL.len())?;
            // SAFETY: a static of this process.
            let database = unsafe { pg_sys::MyDatabaseId };
            let entry = memory::find(&Key::new(database, *role, operation, &relation.schema, &relation.name))?;
            local.entry = entry;
            local.number = entry.number.load(Ordering::Acquire);
            // What was counted of the running statement was counted elsewhere.
            local.statement = 0;
        }
        Some(local)
    }
}

/// Counts rows that a statement changed. Neither raises nor looks anything up after the first time.
#[inline]
pub fn count(place: StatId, operation: Operation, rows: u64, statement: u64) {
    let state = &mut *state();
    let Some(local) = state.locals.get_mut(place + operation as usize) else { return };
    if rows == 1 && local.statement != statement && local.is_current() {
        local.statement = statement;
        local.rows = 1;
        local.entry.statements[0].fetch_add(1, Ordering::Relaxed);
        return;
    }
    count_more(state, place, operation, rows, statement);
}

#[cold]
fn count_more(state: &mut State, place: StatId, operation: Operation, rows: u64, statement: u64) {
    let Some(local) = state.locals.get(place + operation as usize) else { return };
    let before = if local.statement == statement { local.rows } else { 0 };
    if rows == 0 {
        return;
    }
    let Some(local) = state.settled(place, operation) else { return };
    let now = before.saturating_add(rows);
    let is_known = local.statement == statement;
    (local.statement, local.rows) = (statement, now);
    let entry = local.entry;
    let (from, to) = (bucket_of(before), bucket_of(now));
    if !is_known || from != to {
        entry.statements[to].fetch_add(1, Ordering::Relaxed);
        if is_known {
            entry.statements[from].fetch_sub(1, Ordering::Relaxed);
        }
    }
    if now > 1 {
        // Rows of statements with one row are in the first bucket.
        let counted = if is_known && before > 1 { before } else { 0 };
        entry.rows_of_more.fetch_add(now - counted, Ordering::Relaxed);
        entry.largest.fetch_max(now, Ordering::Relaxed);
    }
}

/// Counts a statement that was refused, once.
pub fn refused(place: StatId, operation: Operation, statement: u64) {
    if let Some(local) = state().settled(place, operation)
        && local.refused != statement
    {
        local.refused = statement;
        local.entry.refused.fetch_add(1, Ordering::Relaxed);
    }
}

/// Counts a statement that went past a limit on purpose, once.
pub fn overridden(place: StatId, operation: Operation, statement: u64) {
    if let Some(local) = state().settled(place, operation)
        && local.overridden != statement
    {
        local.overridden = statement;
        local.entry.overridden.fetch_add(1, Ordering::Relaxed);
    }
}

/// A procedure committed and continues: what follows counts as another statement.
pub fn forget_statements() {
    for local in &mut state().locals {
        (local.statement, local.refused, local.overridden) = (0, 0, 0);
    }
}
