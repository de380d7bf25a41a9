//! Keeps each row that a statement changes as it was, as long as the statement may turn out to be overridden.
//!
//! Whether it will be is known at the row past the limit, and the rows before that one are wanted as well; so the keeping
//! begins with the statement, when the override is armed (or `writeguard.capture_undo` is on) and a policy with `undo` applies.
//! What is kept lies in a tuplestore, which goes to disk past `work_mem`, until the commit stores it or drops it. Rows of a
//! subtransaction that is rolled back are left out by their numbers: a tuplestore forgets nothing.
//!
//! A row that could not be kept is remembered as such: the override is then refused rather than left without its rows.

use core::ptr;

use pgrx::{IntoDatum, pg_sys};
use rules::error::Error;
use rules::policy::model::Keep;
use rules::words::{Operation, RelationName, Serial};
use rustc_hash::{FxBuildHasher, FxHashSet};

use super::kept_table;
use super::row_format::Image;
use super::statement_tables::{Filed, Tables};
use crate::pg::backend_local::{BackendLocal, Borrowed};
use crate::pg::ereport::Failure;
use crate::pg::ffi;
use crate::pg::row_version::Versions;
use crate::session::{actor, rehearsing, settings, statement, xact};
use crate::undo::in_progress;

/// Rows that were kept one after the other in a statement and a subtransaction.
pub struct Span {
    pub statement: Serial,
    level: i32,
    /// The first one's number.
    pub from: i64,
    /// The number after the last one's.
    pub to: i64,
}

/// A statement that has kept rows.
pub struct Kept {
    /// The statement's, or an undo's own.
    pub serial: Serial,
    /// The change that it takes back, where it is an undo.
    pub undoes: Option<i64>,
    pub text: String,
    /// The longest time that a policy wants them kept.
    pub keep: Keep,
    /// The tables that they are of.
    pub tables: Tables,
}

/// A statement that changed rows which were not kept although a policy asks for it.
struct Lost {
    statement: Serial,
    level: i32,
    relation: RelationName,
    reason: Reason,
}

/// Why a row was not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The override was armed when it was changed already, or about to be.
    Late,
    /// It has no primary key.
    NoKey,
    /// Its storage keeps no versions that can be read, or another server has them.
    NoVersions,
}

struct State {
    /// NULL: nothing was kept in this transaction.
    store: *mut pg_sys::Tuplestorestate,
    descriptor: pg_sys::TupleDesc,
    next: i64,
    spans: Vec<Span>,
    statements: Vec<Kept>,
    lost: Vec<Lost>,
    /// Statements that were overridden: their rows stay until the commit.
    overridden: FxHashSet<Serial>,
}

/// What an undo keeps is a change of its own, whatever else the statement does that calls it: its serial is this with the
/// number of the change that it takes back.
const UNDO: Serial = 1 << 63;

static STATE: BackendLocal<State> = BackendLocal::new(State {
    store: ptr::null_mut(),
    descriptor: ptr::null_mut(),
    next: 0,
    spans: Vec::new(),
    statements: Vec::new(),
    lost: Vec::new(),
    overridden: FxHashSet::with_hasher(FxBuildHasher),
});

#[track_caller]
fn state() -> Borrowed<State> {
    STATE.borrow()
}

/// Whether a statement that starts now may turn out to be overridden, or keeps its rows anyway.
pub fn is_wanted() -> bool {
    !rehearsing::is_on() && (actor::flag() || statement::is_executing() || settings::capture_undo())
}

/// Whether a transaction has kept rows.
pub fn any() -> bool {
    !state().store.is_null()
}

/// Whether a statement may still turn out to be overridden, or was.
fn may_matter(overridden: &FxHashSet<Serial>, statement: Serial) -> bool {
    statement & UNDO != 0 || statement::may_resume(statement) || overridden.contains(&statement)
}

/// Rows of a relation that a policy wants kept are changed without being kept.
pub fn lose(statement: Serial, relation: &RelationName, reason: Reason) {
    // SAFETY: reads a static.
    let level = unsafe { ffi::GetCurrentTransactionNestLevel() };
    xact::touch();
    let State { lost, overridden, .. } = &mut *state();
    lost.retain(|lost| lost.statement == statement || may_matter(overridden, lost.statement));
    let known = |one: &Lost| one.statement == statement && one.level == level && one.relation == *relation;
    if !lost.iter().any(known) {
        lost.push(Lost { statement, level, relation: relation.clone(), reason });
    }
}

/// Refuses to override a statement of which rows were not kept that a policy wants kept.
///
/// # Errors
/// WG008 with the reason.
pub fn check(statement: Serial) -> Result<(), Error> {
    let state = state();
    let Some(lost) = state.lost.iter().find(|lost| lost.statement == statement) else { return Ok(()) };
    let name = lost.relation.to_sql();
    let (reason, hint) = match lost.reason {
        Reason::Late => (
            "its rows were not kept from the first one on, as the policy's undo asks",
            "SET writeguard.override = on; (then the statement again)".to_owned(),
        ),
        Reason::NoKey => (
            "it has no primary key, so its rows cannot be kept as the policy's undo asks",
            format!("ALTER TABLE {name} ADD PRIMARY KEY (…);"),
        ),
        Reason::NoVersions => (
            "its storage does not show rows as they were, so they cannot be kept as the policy's undo asks",
            format!(
                "SELECT policy FROM writeguard.effective({}, CURRENT_USER, 'update');",
                rules::words::literal(&name)
            ),
        ),
    };
    Err(Error::Undecided { reason: reason.into(), hint, relation: Some(lost.relation.clone()) })
}

/// A statement is overridden: what it changes is kept until the commit.
pub fn overridden(statement: Serial) {
    state().overridden.insert(statement);
}

/// The relation that a row is of, as far as keeping it has to know.
#[derive(Clone, Copy)]
pub struct Relation<'a> {
    pub name: &'a RelationName,
    /// The same as SQL has it.
    pub sql: &'a str,
    /// How long its rows are kept where the change is overridden; none: not at all.
    pub keep: Option<&'a Keep>,
}

/// Keeps a changed row as it was.
///
/// # Safety
/// Called between two rows of a node, or while a table is scanned; the versions are the changed row's, and `context` is
/// freed before long.
///
/// # Errors
/// What printing the row may raise.
pub unsafe fn row(
    of: Relation<'_>,
    operation: Operation,
    versions: Option<&Versions>,
    context: pg_sys::MemoryContext,
) -> Result<(), Failure> {
    let Some((serial, undoes, keep)) = who_keeps(of) else { return Ok(()) };
    let Some(versions) = versions else {
        lose(serial, of.name, Reason::NoVersions);
        return Ok(());
    };
    // SAFETY: the caller's promise.
    unsafe {
        let before = pg_sys::MemoryContextSwitchTo(context);
        let kept = print(serial, undoes, &keep, of.name, operation, versions, context);
        let put = kept.map(|kept| {
            if let Some(printed) = kept {
                put(serial, printed);
            }
        });
        pg_sys::MemoryContextSwitchTo(before);
        put
    }
}

/// Keeps a row that an undo put back: to take that back means to delete it.
///
/// # Safety
/// As for [`row`]; `new` is the row as it was inserted.
///
/// # Errors
/// As for [`row`].
pub unsafe fn inserted(
    of: Relation<'_>,
    new: (pg_sys::Relation, pg_sys::HeapTuple),
    context: pg_sys::MemoryContext,
) -> Result<(), Failure> {
    let Some((serial, undoes, keep)) = who_keeps(of) else { return Ok(()) };
    // SAFETY: the caller's promise.
    unsafe {
        let Some(filed) = file(serial, undoes, &keep, new.0)? else { return Ok(()) };
        let before = pg_sys::MemoryContextSwitchTo(context);
        let nothing = Image { text: c"{}".as_ptr(), length: 2 };
        let image = filed.table.whole(filed.members.as_deref(), new, context);
        let root = filed.table.root.relation;
        let at = (None, filed.at(new.1));
        let put = image.map(|is| put(serial, Printed { root, word: "insert", was: nothing, is: Some(is), at }));
        pg_sys::MemoryContextSwitchTo(before);
        put
    }
}

/// For which statement or undo a row of this relation is kept, and how long; none: not at all.
fn who_keeps(of: Relation<'_>) -> Option<(Serial, Option<i64>, Keep)> {
    if let Some((change, keep)) = in_progress::change() {
        let serial = UNDO | u64::try_from(change).unwrap_or(0);
        return in_progress::covers(of.sql).then_some((serial, Some(change), keep));
    }
    Some((statement::current(), None, of.keep?.clone()))
}

/// A changed row.
struct Printed {
    /// The table at the top.
    root: pg_sys::Oid,
    /// What was done.
    word: &'static str,
    was: Image,
    is: Option<Image>,
    /// Where the versions are stored that were there before and after.
    at: (Option<i64>, Option<i64>),
}

unsafe fn print(
    serial: Serial,
    undoes: Option<i64>,
    keep: &Keep,
    name: &RelationName,
    operation: Operation,
    versions: &Versions,
    context: pg_sys::MemoryContext,
) -> Result<Option<Printed>, Failure> {
    // SAFETY: the caller's promise.
    unsafe {
        let Some(from) = file(serial, undoes, keep, versions.relation)? else {
            lose(serial, name, Reason::NoKey);
            return Ok(None);
        };
        let (root, members) = (from.table.root.relation, from.members.as_deref());
        let was_at = from.at(versions.old);
        let old = (versions.relation, versions.old);
        if versions.new.is_null() {
            let truncates = operation == Operation::Truncate;
            if truncates && let Some(kept) = state().statements.iter_mut().rev().find(|kept| kept.serial == serial) {
                kept.tables.empty(from.table.relation);
            }
            let word = if truncates { operation.word() } else { Operation::Delete.word() };
            let was = from.table.whole(members, old, context)?;
            return Ok(Some(Printed { root, word, was, is: None, at: (was_at, None) }));
        }
        let to = if ptr::eq(versions.relation, versions.new_relation) {
            from.clone()
        } else {
            match file(serial, undoes, keep, versions.new_relation)? {
                Some(to) => to,
                None => return Ok(None),
            }
        };
        let (new, there) = ((versions.new_relation, versions.new), (&*to.table, to.members.as_deref()));
        let (was, is) = from.table.changed(members, old, there, new, context)?;
        let at = (was_at, to.at(versions.new));
        Ok(Some(Printed { root, word: Operation::Update.word(), was, is: Some(is), at }))
    }
}

/// How the relation's rows are kept in this statement; none where it has no primary key.
unsafe fn file(
    serial: Serial,
    undoes: Option<i64>,
    keep: &Keep,
    relation: pg_sys::Relation,
) -> Result<Option<Filed>, Failure> {
    // SAFETY: the relation is open.
    let table = unsafe { kept_table::of(relation) }?;
    if table.root.key.is_empty() {
        return Ok(None);
    }
    if let Some(kept) = state().statements.iter_mut().rev().find(|kept| kept.serial == serial) {
        if kept.keep < *keep {
            kept.keep = keep.clone();
        }
        return Ok(Some(kept.tables.file(&table)));
    }
    xact::touch();
    let text = statement::excerpt().shown();
    let mut state = state();
    forget(&mut state);
    let mut tables = Tables::default();
    let filed = tables.file(&table);
    state.statements.push(Kept { serial, undoes, text, keep: keep.clone(), tables });
    Ok(Some(filed))
}

unsafe fn put(serial: Serial, Printed { root, word, was, is, at }: Printed) {
    let state = &mut *state();
    // SAFETY: the store lives as long as the transaction, and copies what it is given.
    unsafe {
        if state.store.is_null() {
            begin(state);
        }
        let number = state.next;
        let mut values = [
            number.into_datum(),
            root.into_datum(),
            word.into_datum(),
            Some(text_of(was)),
            is.map(|is| text_of(is)),
            at.0.into_datum(),
            at.1.into_datum(),
        ];
        let mut nulls = values.map(|value| value.is_none());
        let mut datums = values.map(|value| value.unwrap_or(pg_sys::Datum::from(0)));
        values.fill(None);
        pg_sys::tuplestore_putvalues(state.store, state.descriptor, datums.as_mut_ptr(), nulls.as_mut_ptr());
        state.next += 1;
        let level = ffi::GetCurrentTransactionNestLevel();
        match state.spans.last_mut() {
            Some(span) if span.statement == serial && span.level == level && span.to == number => span.to += 1,
            _ => state.spans.push(Span { statement: serial, level, from: number, to: number + 1 }),
        }
    }
}

/// An image as a value of type text, in the current memory context.
unsafe fn text_of(image: Image) -> pg_sys::Datum {
    let length = i32::try_from(image.length).unwrap_or(i32::MAX);
    // SAFETY: an image is as long as it says, and shorter than a text may be.
    unsafe { pg_sys::Datum::from(pg_sys::cstring_to_text_with_len(image.text, length)) }
}

/// Drops what was kept by statements that are over and were not overridden.
fn forget(state: &mut State) {
    if settings::capture_undo() {
        return;
    }
    let overridden = &state.overridden;
    state.statements.retain(|kept| may_matter(overridden, kept.serial));
    let kept = |span: &Span| state.statements.iter().any(|kept| kept.serial == span.statement);
    state.spans.retain(kept);
    if state.spans.is_empty() && !state.store.is_null() {
        // SAFETY: the transaction's own, and nobody reads it now.
        unsafe { pg_sys::tuplestore_clear(state.store) };
        state.next = 0;
    }
}

/// Names and types of what is kept.
const COLUMNS: [(&core::ffi::CStr, pg_sys::Oid); 7] = [
    (c"number", pg_sys::INT8OID),
    (c"relation", pg_sys::OIDOID),
    (c"operation", pg_sys::TEXTOID),
    (c"before", pg_sys::TEXTOID),
    (c"after", pg_sys::TEXTOID),
    (c"was_at", pg_sys::INT8OID),
    (c"left_at", pg_sys::INT8OID),
];

/// A tuplestore for rows of these columns, with its descriptor; it lives until the transaction ends.
///
/// # Safety
/// In a transaction.
pub unsafe fn new_store(
    columns: &[(&core::ffi::CStr, pg_sys::Oid)],
) -> (*mut pg_sys::Tuplestorestate, pg_sys::TupleDesc) {
    // SAFETY: allocations and files that belong to the transaction.
    unsafe {
        let (context, owner) = (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner);
        pg_sys::CurrentMemoryContext = pg_sys::TopTransactionContext;
        pg_sys::CurrentResourceOwner = pg_sys::TopTransactionResourceOwner;
        let descriptor = pg_sys::CreateTemplateTupleDesc(columns.len() as i32);
        for (number, (name, type_oid)) in (1..).zip(columns) {
            pg_sys::TupleDescInitEntry(descriptor, number, name.as_ptr(), *type_oid, -1, 0);
        }
        ffi::finish_descriptor(descriptor);
        let store = pg_sys::tuplestore_begin_heap(false, false, pg_sys::work_mem);
        pg_sys::CurrentMemoryContext = context;
        pg_sys::CurrentResourceOwner = owner;
        (store, descriptor)
    }
}

unsafe fn begin(state: &mut State) {
    // The end of the transaction has to be noticed here.
    xact::touch();
    // SAFETY: in a transaction, which rows are changed in.
    (state.store, state.descriptor) = unsafe { new_store(&COLUMNS) };
}

/// Takes the statements that have rows left.
pub fn take_statements() -> Vec<Kept> {
    let state = &mut *state();
    let mut statements = core::mem::take(&mut state.statements);
    let left: FxHashSet<Serial> = state.spans.iter().map(|span| span.statement).collect();
    statements.retain(|kept| left.contains(&kept.serial));
    statements
}

/// Visits the rows that are left, in their order, each with its statement. Only once.
///
/// # Safety
/// Before the transaction commits; nothing is kept meanwhile.
pub unsafe fn for_each_row(mut visit: impl FnMut(Serial, *mut pg_sys::TupleTableSlot)) {
    // SAFETY: the store and its descriptor belong together.
    unsafe {
        let (store, descriptor, spans) = {
            let mut state = state();
            (state.store, state.descriptor, core::mem::take(&mut state.spans))
        };
        let slot = pg_sys::MakeSingleTupleTableSlot(descriptor, &raw const pg_sys::TTSOpsMinimalTuple);
        let mut spans = spans.iter().peekable();
        let mut number = 0;
        while pg_sys::tuplestore_gettupleslot(store, true, false, slot) {
            while spans.peek().is_some_and(|span| span.to <= number) {
                spans.next();
            }
            match spans.peek() {
                Some(span) if span.from <= number => visit(span.statement, slot),
                Some(_) => {}
                None => break,
            }
            number += 1;
        }
        pg_sys::ExecDropSingleTupleTableSlot(slot);
    }
}

/// A subtransaction of this level was rolled back.
pub fn roll_back(level: i32) {
    let mut state = state();
    state.spans.retain(|span| span.level < level);
    state.lost.retain(|lost| lost.level < level);
}

/// A subtransaction of this level was released.
pub fn release(level: i32) {
    let mut state = state();
    state.spans.iter_mut().filter(|span| span.level >= level).for_each(|span| span.level = level - 1);
    state.lost.iter_mut().filter(|lost| lost.level >= level).for_each(|lost| lost.level = level - 1);
}

/// The transaction commits, and what is kept was stored or is not needed. The file is closed here, because PostgreSQL
/// takes one that is open at a commit for a leak.
pub fn close() {
    let store = {
        let mut state = state();
        state.spans.clear();
        core::mem::replace(&mut state.store, ptr::null_mut())
    };
    // SAFETY: the transaction's own, and nobody reads it now.
    unsafe { pg_sys::tuplestore_end(store) };
}

/// The transaction is over, and its memory goes.
pub fn end_transaction() {
    kept_table::end_transaction();
    let mut state = state();
    state.store = ptr::null_mut();
    state.descriptor = ptr::null_mut();
    state.next = 0;
    state.spans.clear();
    state.statements.clear();
    state.lost.clear();
    state.overridden.clear();
}

/// Whether its end has nothing to forget here.
#[inline(always)]
pub fn is_clean() -> bool {
    let state = state();
    state.store.is_null()
        && state.next == 0
        && state.spans.is_empty()
        && state.statements.is_empty()
        && state.lost.is_empty()
        && state.overridden.is_empty()
        && kept_table::is_clean()
}
