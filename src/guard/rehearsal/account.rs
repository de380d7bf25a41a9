//! A rehearsal's account: how many rows a statement changes of each table, by operation, and a few of them before and
//! after.
//!
//! Rows that an exception block or a savepoint inside takes back leave the account with it. One that stops at a number of
//! rows freezes as it is then. Rehearsals nest, and each has an account of its own: what an inner one does is taken
//! back before the outer one continues.

use std::rc::Rc;

use pgrx::pg_sys;
use rules::error::Error;
use rules::words::RelationName;
use rustc_hash::FxHashMap;

use super::shown_row;
use crate::guard::limits::binding::{Binding, Charge};
use crate::pg::backend_local::{BackendLocal, Borrowed};
use crate::pg::ereport::Failure;
use crate::pg::ffi;
use crate::policy::catalog;
use crate::policy::table::Loaded;
use crate::session::settings;
use crate::undo::in_progress;

/// What a rehearsal wants to know.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Rows of tables that no policy covers as well, and inserted ones.
    pub everything: bool,
    /// Rows to show of each table and operation.
    pub sample: usize,
    /// Not of tables that a policy keeps out of requests.
    pub respects_policies: bool,
    /// It ends before the row after these.
    pub most: u64,
    /// A fingerprint of the rows, for an approval to be bound to.
    pub fingerprints: bool,
}

/// One table and operation.
#[derive(Debug)]
pub struct Line {
    pub name: RelationName,
    /// The policies that apply to it.
    pub policies: Vec<Rc<Loaded>>,
    pub operation: &'static str,
    pub rows: u64,
    /// As JSON; `null` where there is none, or it cannot be read.
    pub before: Vec<String>,
    pub after: Vec<String>,
    /// Further rows that would have been shown, had there been room for them.
    pub left_out: u64,
    level: i32,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Account {
    /// In the order in which the tables were reached first.
    pub lines: Vec<Line>,
    /// It ended before the statement did.
    pub stopped: bool,
    /// Values that are shown by their size, because there was no room for them.
    pub cut: u64,
}

struct Open {
    wanted: Wanted,
    /// Who asked, and sees only what they may.
    reader: pg_sys::Oid,
    account: Account,
    /// Places among the account's lines by the table's name.
    places: FxHashMap<RelationName, Vec<usize>>,
    /// Rows of all its lines.
    noted: u64,
    /// Bytes that rows to be shown may still take, `writeguard.preview_max_bytes` in all.
    room: usize,
    /// There was no room for the row that is about to be noted.
    left_out: bool,
}

impl Open {
    /// The lines of a table and operation, one for each level, with their places.
    fn lines_of<'a>(&'a self, name: &RelationName, operation: &'a str) -> impl Iterator<Item = (usize, &'a Line)> {
        let places = self.places.get(name).into_iter().flatten();
        let lines = places.filter_map(|place| Some((*place, self.account.lines.get(*place)?)));
        lines.filter(move |(_, line)| line.operation == operation)
    }

    /// Lines were taken out.
    fn find_again(&mut self) {
        self.places.clear();
        for (place, line) in self.account.lines.iter().enumerate() {
            self.places.entry(line.name.clone()).or_default().push(place);
        }
        self.noted = self.account.lines.iter().map(|line| line.rows).sum();
    }
}

static OPEN: BackendLocal<Vec<Open>> = BackendLocal::new(Vec::new());

#[track_caller]
fn open_accounts() -> Borrowed<Vec<Open>> {
    OPEN.borrow()
}

/// Opens an account; [`close`] has to follow, whatever happens between.
pub fn open(wanted: Wanted) {
    // SAFETY: reads a static.
    let reader = unsafe { pg_sys::GetUserId() };
    // One that runs inside another has what that one has left.
    let room = settings::preview_max_bytes().min(open_accounts().last().map_or(usize::MAX, |outer| outer.room));
    open_accounts().push(Open {
        wanted,
        reader,
        account: Account::default(),
        places: FxHashMap::default(),
        noted: 0,
        room,
        left_out: false,
    });
}

/// Closes the account that was opened last.
pub fn close() -> Account {
    let mut account = open_accounts().pop().map(|open| open.account).unwrap_or_default();
    let mut merged: Vec<Line> = Vec::new();
    let mut places: FxHashMap<(RelationName, &str), usize> = FxHashMap::default();
    for line in core::mem::take(&mut account.lines) {
        let place = *places.entry((line.name.clone(), line.operation)).or_insert(merged.len());
        match merged.get_mut(place) {
            Some(known) => add(known, line),
            None => merged.push(line),
        }
    }
    Account { lines: merged, ..account }
}

/// Whether an account is open.
#[inline]
pub fn is_open() -> bool {
    !open_accounts().is_empty()
}

/// Whether the open account wants rows of every table.
#[inline]
pub fn wants_everything() -> bool {
    open_accounts().last().is_some_and(|open| open.wanted.everything)
}

/// Whether the open account wants to know which rows they are.
#[inline]
pub fn wants_fingerprints() -> bool {
    open_accounts().last().is_some_and(|open| open.wanted.fingerprints)
}

/// Whether rows of every table are counted, covered or not: for an account, or because an undo may change no others than those
/// that it puts back.
#[inline]
pub fn counts_everything() -> bool {
    wants_everything() || in_progress::is_on()
}

/// Whether the open account would show another row of that relation.
///
/// # Errors
/// What looking for policies may raise.
pub fn has_room(relation: pg_sys::Oid, name: &RelationName, operation: &str) -> Result<bool, Failure> {
    let wanted = open_accounts().last().map(|open| {
        let seen = |line: &Line| line.before.len() as u64 + line.left_out;
        let seen: u64 = open.lines_of(name, operation).map(|(_, line)| seen(line)).sum();
        (seen < open.wanted.sample as u64, open.wanted.respects_policies)
    });
    let Some((has_room, respects_policies)) = wanted else { return Ok(false) };
    Ok(has_room && (!respects_policies || catalog::shows_samples(relation)?))
}

/// A row as the open account shows it; none where it does not, or the reader may not see it.
///
/// # Safety
/// An open relation, and a copy of a row of it or NULL. Printing may run other people's code, as the reader.
///
/// # Errors
/// What printing may raise.
pub unsafe fn show(
    named: pg_sys::Oid,
    relation: pg_sys::Relation,
    tuple: pg_sys::HeapTuple,
    context: pg_sys::MemoryContext,
) -> Result<Option<String>, Failure> {
    let wanted = open_accounts().last().map(|open| (open.reader, open.room));
    let Some((reader, room)) = wanted.filter(|_| !tuple.is_null()) else { return Ok(None) };
    // SAFETY: the caller's promise.
    let shown = unsafe { shown_row::json(reader, named, relation, tuple, context, room)? };
    let mut open = open_accounts();
    let Some(open) = open.last_mut() else { return Ok(None) };
    Ok(match shown {
        shown_row::Shown::Nothing => None,
        shown_row::Shown::NoRoom => {
            open.left_out = true;
            None
        }
        shown_row::Shown::Row { json, cut } => {
            open.room = open.room.saturating_sub(json.len());
            open.account.cut += cut;
            Some(json)
        }
    })
}

/// Notes changed rows in the open account, and one of them as it was and as it is.
///
/// # Errors
/// 57014 where the account has seen enough.
pub fn note(
    binding: &Binding,
    operation: &'static str,
    charges: &[Charge],
    rows: u64,
    (before, after): (Option<String>, Option<String>),
) -> Result<(), Failure> {
    let mut accounts = open_accounts();
    let Some(open) = accounts.last_mut() else { return Ok(()) };
    let left = open.wanted.most.saturating_sub(open.noted);
    let left_out = core::mem::take(&mut open.left_out);
    if !open.account.stopped {
        // Half a row says less than none.
        let shown = if left_out { (None, None) } else { (before, after) };
        let place = put(open, &binding.relation, operation, charges, rows.min(left), shown);
        if let Some(line) = place.and_then(|place| open.account.lines.get_mut(place)) {
            line.left_out += u64::from(left_out);
        }
    }
    if open.account.stopped || rows > left {
        open.account.stopped = true;
        return Err(Error::Stopped { rows: open.wanted.most }.into());
    }
    Ok(())
}

fn put(
    open: &mut Open,
    name: &RelationName,
    operation: &'static str,
    charges: &[Charge],
    rows: u64,
    (before, after): (Option<String>, Option<String>),
) -> Option<usize> {
    if rows == 0 {
        return None;
    }
    // SAFETY: reads a static.
    let level = unsafe { ffi::GetCurrentTransactionNestLevel() };
    let known = open.lines_of(name, operation).find(|(_, line)| line.level == level).map(|(place, _)| place);
    let place = known.unwrap_or_else(|| {
        let (before, after) = (Vec::new(), Vec::new());
        let policies = charges.iter().map(|charge| Rc::clone(&charge.policy)).collect();
        let place = open.account.lines.len();
        let line = Line { name: name.clone(), policies, operation, rows: 0, before, after, left_out: 0, level };
        open.account.lines.push(line);
        open.places.entry(name.clone()).or_default().push(place);
        place
    });
    open.noted += rows;
    let line = &mut open.account.lines[place];
    line.rows += rows;
    if before.is_some() || after.is_some() {
        let null = || "null".to_owned();
        line.before.push(before.unwrap_or_else(null));
        line.after.push(after.unwrap_or_else(null));
    }
    Some(place)
}

fn add(to: &mut Line, line: Line) {
    to.rows += line.rows;
    to.before.extend(line.before);
    to.after.extend(line.after);
    to.left_out += line.left_out;
}

/// A subtransaction of this level was rolled back.
pub fn roll_back(level: i32) {
    if let Some(open) = open_accounts().last_mut()
        && !open.account.stopped
    {
        // The deeper ones are the last, but for those of subtransactions that were released into this one.
        if open.account.lines.iter().any(|line| line.level >= level) {
            open.account.lines.retain(|line| line.level < level);
            open.find_again();
        }
    }
}

/// A subtransaction of this level was released.
pub fn release(level: i32) {
    let mut accounts = open_accounts();
    let Some(open) = accounts.last_mut() else { return };
    for line in open.account.lines.iter_mut().filter(|line| line.level >= level) {
        line.level = level - 1;
    }
}

/// The transaction is over, and with it every rehearsal; none is open unless something went wrong.
pub fn end_transaction() {
    open_accounts().clear();
}

/// Whether its end has nothing to forget here.
#[inline(always)]
pub fn is_clean() -> bool {
    open_accounts().is_empty()
}
