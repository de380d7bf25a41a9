//! A rehearsal's account: how many rows a statement changes of each table, by operation, and a few of them before and
//! after.
//!
//! Rows that an exception block or a savepoint inside takes back leave the account with it. One that stops at a number of
//! rows freezes as it is then. Rehearsals nest, and each has an account of its own: what an inner one does is taken
//! back before the outer one goes on.

use core::ptr;
use std::collections::BTreeMap;
use std::rc::Rc;

use pgrx::pg_sys;
use rules::error::Error;
use rules::words::RelationName;
use serde_json::value::RawValue;

use crate::guard::limits::binding::{Binding, Charge};
use crate::pg::backend_local::{BackendLocal, Borrowed};
use crate::pg::ereport::Failure;
use crate::pg::{encoding, ffi};
use crate::policy::catalog;
use crate::policy::table::Loaded;
use crate::session::settings;
use crate::undo::capture::row_format::{attribute, is_stored};
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
    /// Bytes that rows to be shown may still take, `writeguard.preview_max_bytes` in all.
    room: usize,
    /// There was no room for the row that is about to be noted.
    left_out: bool,
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
    open_accounts().push(Open { wanted, reader, account: Account::default(), room, left_out: false });
}

/// Closes the account that was opened last.
pub fn close() -> Account {
    let mut account = open_accounts().pop().map(|open| open.account).unwrap_or_default();
    let mut merged: Vec<Line> = Vec::new();
    for line in core::mem::take(&mut account.lines) {
        match merged.iter_mut().find(|known| known.name == line.name && known.operation == line.operation) {
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
    let of = |line: &&Line| line.name == *name && line.operation == operation;
    let wanted = open_accounts().last().map(|open| {
        let seen = |line: &Line| line.before.len() as u64 + line.left_out;
        let seen: u64 = open.account.lines.iter().filter(of).map(seen).sum();
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
    let shown = unsafe { json(reader, named, relation, tuple, context, room)? };
    let mut open = open_accounts();
    let Some(open) = open.last_mut() else { return Ok(None) };
    Ok(match shown {
        Shown::Nothing => None,
        Shown::NoRoom => {
            open.left_out = true;
            None
        }
        Shown::Row { json, cut } => {
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
    let noted: u64 = open.account.lines.iter().map(|line| line.rows).sum();
    let left = open.wanted.most.saturating_sub(noted);
    let left_out = core::mem::take(&mut open.left_out);
    if !open.account.stopped {
        // Half a row says less than none.
        let shown = if left_out { (None, None) } else { (before, after) };
        let place = put(&mut open.account.lines, &binding.relation, operation, charges, rows.min(left), shown);
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
    lines: &mut Vec<Line>,
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
    let of = |line: &Line| line.level == level && line.name == *name && line.operation == operation;
    let place = lines.iter().position(of).unwrap_or_else(|| {
        let (before, after) = (Vec::new(), Vec::new());
        let policies = charges.iter().map(|charge| Rc::clone(&charge.policy)).collect();
        lines.push(Line { name: name.clone(), policies, operation, rows: 0, before, after, left_out: 0, level });
        lines.len() - 1
    });
    let line = &mut lines[place];
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
        open.account.lines.retain(|line| line.level < level);
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

/// A value of more bytes is not shown.
const LONGEST_VALUE: usize = 8 * 1024;

/// What is left of the room when a row is shown goes to so many rows at least: before that its widest values are cut.
const SHARES: usize = 8;
/// Nothing is gained by cutting a value of fewer bytes.
const NARROW: usize = 64;

/// A row, shown.
enum Shown {
    /// Who asked may read none of its columns.
    Nothing,
    NoRoom,
    Row {
        json: String,
        /// Values that were cut because there is little room.
        cut: u64,
    },
}

/// Which of the values, given by place and size, are cut so that the others have at most so many bytes in all; none where
/// that cannot be had.
fn too_wide(mut sizes: Vec<(usize, usize)>, most: usize) -> Option<Vec<(usize, usize)>> {
    let mut all: usize = sizes.iter().map(|(_, size)| size).sum();
    sizes.sort_by_key(|(_, size)| core::cmp::Reverse(*size));
    let mut cut = Vec::new();
    for (place, size) in sizes {
        if all <= most {
            break;
        }
        if size <= NARROW {
            return None;
        }
        all -= size;
        cut.push((place, size));
    }
    Some(cut)
}

/// A row as a JSON object of those columns that `reader` may read by way of the relation `named`.
#[expect(ffi_unwind_calls, reason = "inside protect")]
unsafe fn json(
    reader: pg_sys::Oid,
    named: pg_sys::Oid,
    relation: pg_sys::Relation,
    tuple: pg_sys::HeapTuple,
    context: pg_sys::MemoryContext,
    room: usize,
) -> Result<Shown, Failure> {
    // SAFETY: an open relation and a copy of one of its rows. Printing may run other people's code, as the reader.
    unsafe {
        let descriptor = (*relation).rd_att;
        let count = usize::try_from((*descriptor).natts).unwrap_or(0);
        let attributes = |index: usize| &*attribute(descriptor, index);
        let Some(readable) = readable_columns(reader, named, relation) else { return Ok(Shown::Nothing) };
        let mut values = vec![pg_sys::Datum::from(0); count];
        let mut nulls = vec![true; count];
        pg_sys::heap_deform_tuple(tuple, descriptor, values.as_mut_ptr(), nulls.as_mut_ptr());
        let mut hidden: Vec<String> = Vec::new();
        let mut cut: Vec<(String, usize)> = Vec::new();
        let mut sizes: Vec<(usize, usize)> = Vec::new();
        for index in 0..count {
            let column = attributes(index);
            if column.attisdropped {
                continue;
            }
            let name = || encoding::from_name(&column.attname);
            if !readable.includes(index) || !is_stored(column) {
                nulls[index] = true;
                hidden.push(name());
            } else if !nulls[index] && column.attlen == -1 {
                let size = pg_sys::toast_raw_datum_size(values[index]);
                if size > LONGEST_VALUE {
                    nulls[index] = true;
                    cut.push((name(), size));
                } else {
                    sizes.push((index, size));
                }
            }
        }
        let Some(wide) = too_wide(sizes, room / SHARES) else { return Ok(Shown::NoRoom) };
        for (index, size) in &wide {
            nulls[*index] = true;
            cut.push((encoding::from_name(&attributes(*index).attname), *size));
        }
        let row = pg_sys::heap_form_tuple(descriptor, values.as_mut_ptr(), nulls.as_mut_ptr());
        let (mut user, mut security) = (pg_sys::InvalidOid, 0);
        pg_sys::GetUserIdAndSecContext(&mut user, &mut security);
        let mut printed = ptr::null_mut();
        let before = pg_sys::CurrentMemoryContext;
        pg_sys::CurrentMemoryContext = context;
        let restricted = security | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32;
        pg_sys::SetUserIdAndSecContext(reader, restricted);
        let outcome = ffi::protect(|| {
            let datum = ffi::heap_copy_tuple_as_datum(row, descriptor);
            let function = pg_sys::Oid::from_u32(pg_sys::F_ROW_TO_JSON_RECORD);
            let json = ffi::OidFunctionCall1Coll(function, pg_sys::InvalidOid, datum);
            printed = ffi::text_to_cstring(json.cast_mut_ptr());
        });
        pg_sys::SetUserIdAndSecContext(user, security);
        pg_sys::CurrentMemoryContext = before;
        outcome?;
        if core::ffi::CStr::from_ptr(printed).count_bytes() > room {
            return Ok(Shown::NoRoom);
        }
        let printed = encoding::from_c(printed).unwrap_or_default();
        if hidden.is_empty() && cut.is_empty() {
            return Ok(Shown::Row { json: printed, cut: 0 });
        }
        let Ok(mut columns) = serde_json::from_str::<BTreeMap<String, Box<RawValue>>>(&printed) else {
            return Ok(Shown::Nothing);
        };
        hidden.iter().for_each(|name| drop(columns.remove(name)));
        for (name, size) in cut {
            if let Ok(note) = serde_json::value::to_raw_value(&format!("({size} bytes)")) {
                columns.insert(name, note);
            }
        }
        let json = serde_json::to_string(&columns).unwrap_or_default();
        Ok(if json.len() <= room { Shown::Row { json, cut: wide.len() as u64 } } else { Shown::NoRoom })
    }
}

enum Readable {
    All,
    Only(Vec<usize>),
}

impl Readable {
    fn includes(&self, column: usize) -> bool {
        match self {
            Readable::All => true,
            Readable::Only(columns) => columns.contains(&column),
        }
    }
}

/// The columns that somebody could read by SELECT from the relation that the command names, or from the row's own; none
/// where row security stands between, which would have to be asked for each row.
fn readable_columns(reader: pg_sys::Oid, named: pg_sys::Oid, relation: pg_sys::Relation) -> Option<Readable> {
    // SAFETY: look-ups in catalogs; the relation is open.
    unsafe {
        let own = (*relation).rd_id;
        let through: Vec<pg_sys::Oid> = [named, own].into_iter().filter(|table| *table != pg_sys::InvalidOid).collect();
        if through.iter().any(|table| pg_sys::check_enable_rls(*table, reader, true) == ROW_SECURITY_APPLIES) {
            return None;
        }
        let select = pg_sys::ACL_SELECT as pg_sys::AclMode;
        let granted = pg_sys::AclResult::ACLCHECK_OK;
        if through.iter().any(|table| pg_sys::pg_class_aclcheck(*table, reader, select) == granted) {
            return Some(Readable::All);
        }
        let count = usize::try_from((*(*relation).rd_att).natts).unwrap_or(0);
        let columns: Vec<usize> = (0..count)
            .filter(|index| {
                let column = &*attribute((*relation).rd_att, *index);
                let name = column.attname.data.as_ptr();
                !column.attisdropped
                    && through.iter().any(|table| {
                        let number = pg_sys::get_attnum(*table, name);
                        number > 0 && pg_sys::pg_attribute_aclcheck(*table, number, reader, select) == granted
                    })
            })
            .collect();
        (!columns.is_empty()).then_some(Readable::Only(columns))
    }
}

/// `RLS_ENABLED` of core's `rls.h`.
const ROW_SECURITY_APPLIES: core::ffi::c_int = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_widest_values_are_cut_first() {
        let sizes = vec![(0, 100), (1, 5_000), (2, 300), (3, 10)];
        assert_eq!(too_wide(sizes.clone(), 5_410), Some(vec![]));
        assert_eq!(too_wide(sizes.clone(), 5_409), Some(vec![(1, 5_000)]));
        assert_eq!(too_wide(sizes.clone(), 10), Some(vec![(1, 5_000), (2, 300), (0, 100)]));
        assert_eq!(too_wide(sizes, 9), None);
        assert_eq!(too_wide(Vec::new(), 0), Some(vec![]));
    }
}
