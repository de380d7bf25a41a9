//! Which rows a statement changes that is reviewed, or that may turn out to be one that was: a fingerprint for each table.
//!
//! A token is presented at the row past the limit, and the rows before that one belong to what was reviewed as well; so where
//! flag and token are armed, rows are added from the first one on. What a subtransaction added goes with its rollback. A row
//! is known by its primary key; where a table has none, or its rows are not seen one by one, it has no fingerprint, and an
//! approval is bound to their number alone.

use std::collections::BTreeMap;
use std::rc::Rc;

use core::{ptr, slice};

use pgrx::pg_sys;
use rules::token::fingerprint::{Difference, Fingerprint, RowHash, RowHasher};
use rules::token::grant::{Grant, Others};
use rules::words::{Operation, RelationName, Serial, counted};

use super::overrides;
use crate::guard::limits::binding::Binding;
use crate::guard::limits::charge;
use crate::guard::rehearsal::account;
use crate::pg::backend_local::{BackendLocal, Borrowed};
use crate::pg::ereport::Failure;
use crate::pg::ffi;
use crate::pg::row_version::Versions;
use crate::policy::key::primary_key;
use crate::session::{actor, statement, xact};
use crate::undo::capture::row_format::attribute;

/// The rows of one table that a statement changed in one subtransaction.
struct Seen {
    statement: Serial,
    level: i32,
    table: Rc<str>,
    relation: Rc<RelationName>,
    /// None: not all of them were seen.
    rows: Option<Fingerprint>,
}

/// By which columns of a relation a row is known.
struct Key {
    relation: pg_sys::Oid,
    /// What the relation's was; only ever compared.
    descriptor: pg_sys::TupleDesc,
    /// Places in the descriptor, in the order of the columns' names, which all partitions have in common.
    columns: Rc<[usize]>,
}

struct State {
    seen: Vec<Seen>,
    keys: Vec<Key>,
    hasher: Option<RowHasher>,
}

static STATE: BackendLocal<State> = BackendLocal::new(State { seen: Vec::new(), keys: Vec::new(), hasher: None });

#[track_caller]
fn state() -> Borrowed<State> {
    STATE.borrow()
}

/// Whether the rows of a statement that starts now may have to be compared with reviewed ones, or are reviewed.
#[inline]
pub fn is_wanted() -> bool {
    if account::is_open() {
        return account::wants_fingerprints();
    }
    actor::may_have_token() && actor::flag() || statement::is_executing()
}

/// Rows of a relation were changed; without `versions` nobody knows which.
///
/// # Safety
/// The versions are those of the changed row.
///
/// # Errors
/// What reading a value that is stored out of line may raise.
pub unsafe fn note(
    binding: &Binding,
    operation: Operation,
    rows: u64,
    versions: Option<&Versions>,
) -> Result<(), Failure> {
    if rows == 0 {
        return Ok(());
    }
    let serial = statement::current();
    // SAFETY: the caller's promise; the second reads a static.
    let (row, level) = unsafe {
        let row = match versions.filter(|versions| rows == 1 && !versions.old.is_null()) {
            Some(versions) => hash(operation, versions)?,
            None => None,
        };
        (row, ffi::GetCurrentTransactionNestLevel())
    };
    let mut state = state();
    let is_it = |seen: &Seen| seen.statement == serial && seen.level == level && seen.table == binding.name;
    let place = match state.seen.iter().rposition(is_it) {
        Some(place) => place,
        None => {
            xact::touch();
            // What is over and opened nothing is compared with nothing any more.
            state.seen.retain(|seen| {
                seen.statement == serial
                    || statement::may_resume(seen.statement)
                    || overrides::awaits_rows_of(seen.statement)
            });
            let (table, relation) = (Rc::clone(&binding.name), Rc::clone(&binding.relation));
            state.seen.push(Seen { statement: serial, level, table, relation, rows: Some(Fingerprint::default()) });
            state.seen.len() - 1
        }
    };
    let seen = &mut state.seen[place].rows;
    match (seen.as_mut(), row) {
        (Some(all), Some(row)) => all.add(row),
        _ => *seen = None,
    }
    Ok(())
}

/// The number of a changed row; none where its table has no primary key.
unsafe fn hash(operation: Operation, versions: &Versions) -> Result<Option<RowHash>, Failure> {
    // SAFETY: the caller's promise: a row of an open relation, whose values point into it.
    unsafe {
        let columns = key_of(versions.relation);
        if columns.is_empty() {
            return Ok(None);
        }
        let hasher = hasher();
        let descriptor = (*versions.relation).rd_att;
        let width = usize::try_from((*descriptor).natts).unwrap_or(0);
        let (mut values, mut nulls) = (vec![pg_sys::Datum::from(0); width], vec![true; width]);
        pg_sys::heap_deform_tuple(versions.old, descriptor, values.as_mut_ptr(), nulls.as_mut_ptr());
        let mut key: Vec<Vec<u8>> = Vec::with_capacity(columns.len());
        for place in columns.iter() {
            key.push(bytes(values[*place], &*attribute(descriptor, *place))?);
        }
        Ok(Some(hasher.row(operation.word(), key.iter().map(Vec::as_slice))))
    }
}

/// A value as it is stored: the row that was reviewed has the same bytes as long as nobody writes it.
#[expect(ffi_unwind_calls, reason = "inside protect")]
unsafe fn bytes(value: pg_sys::Datum, column: &pg_sys::FormData_pg_attribute) -> Result<Vec<u8>, ffi::PgError> {
    // SAFETY: a value of that column, not NULL.
    unsafe {
        Ok(match (column.attbyval, column.attlen) {
            (true, _) => value.value().to_le_bytes().to_vec(),
            (false, -1) => {
                let mut plain = ptr::null_mut();
                ffi::protect(|| plain = ffi::pg_detoast_datum(value.cast_mut_ptr()))?;
                pgrx::varlena::varlena_to_byte_slice(plain).to_vec()
            }
            (false, -2) => core::ffi::CStr::from_ptr(value.cast_mut_ptr()).to_bytes().to_vec(),
            (false, length) => {
                slice::from_raw_parts(value.cast_mut_ptr::<u8>(), usize::try_from(length).unwrap_or(0)).to_vec()
            }
        })
    }
}

/// The places of a relation's key; none: it has no primary key.
unsafe fn key_of(relation: pg_sys::Relation) -> Rc<[usize]> {
    // SAFETY: the relation is open.
    unsafe {
        let (oid, descriptor) = ((*relation).rd_id, (*relation).rd_att);
        let is_it = |key: &&Key| key.relation == oid && ptr::eq(key.descriptor, descriptor);
        if let Some(key) = state().keys.iter().rev().find(is_it) {
            return Rc::clone(&key.columns);
        }
        let mut columns: Vec<usize> =
            primary_key(oid).into_iter().filter_map(|number| usize::try_from(number).ok()?.checked_sub(1)).collect();
        columns.sort_by_key(|place| {
            let name = &(*attribute(descriptor, *place)).attname;
            core::ffi::CStr::from_ptr(name.data.as_ptr()).to_bytes().to_vec()
        });
        let columns: Rc<[usize]> = columns.into();
        let mut state = state();
        state.keys.retain(|key| key.relation != oid);
        state.keys.push(Key { relation: oid, descriptor, columns: Rc::clone(&columns) });
        columns
    }
}

/// Of this database's rows, under what the cluster keeps secret from everybody but its superusers.
fn hasher() -> RowHasher {
    state()
        .hasher
        .get_or_insert_with(|| {
            const LENGTH: usize = 32;
            // SAFETY: core's control file is read when a process starts, and has so many random bytes there.
            let secret = unsafe { slice::from_raw_parts(pg_sys::GetMockAuthenticationNonce().cast::<u8>(), LENGTH) };
            RowHasher::new(secret)
        })
        .clone()
}

/// The rows of a table that a statement changed; no fingerprint where not all of them were seen.
pub struct Changed {
    pub relation: Rc<RelationName>,
    pub rows: Option<Fingerprint>,
}

/// What was seen of statements so far, by qualified table name.
pub fn of_statements(statements: &[Serial]) -> BTreeMap<String, Changed> {
    let mut found: BTreeMap<String, Changed> = BTreeMap::new();
    for seen in state().seen.iter().filter(|seen| statements.contains(&seen.statement)) {
        let one = found
            .entry(seen.table.to_string())
            .or_insert_with(|| Changed { relation: Rc::clone(&seen.relation), rows: Some(Fingerprint::default()) });
        match (&mut one.rows, &seen.rows) {
            (Some(all), Some(rows)) => all.merge(rows),
            (all, _) => *all = None,
        }
    }
    found
}

/// A table of which other rows were changed than reviewed.
pub struct OtherRows {
    pub table: String,
    pub relation: Option<RelationName>,
    pub others: Others,
}

impl OtherRows {
    /// Whether it may still come out as reviewed: so far rows are missing, and nothing tells that others were changed.
    pub fn may_be_unfinished(&self) -> bool {
        matches!(self.others, Others::Rows(Difference { missing, added: 0, .. }) if missing > 0)
    }

    /// The numbers, as a sentence.
    pub fn told(&self, request: i64) -> String {
        let table = &self.table;
        let Others::Rows(Difference { missing, added, at_least }) = self.others else {
            return format!(
                "Which rows of \"{table}\" it changed is not known from the first one on, and request {request} was approved \
                 for certain ones; nothing was changed."
            );
        };
        let gone =
            (missing > 0).then(|| format!("{missing} of them {} missing", if missing == 1 { "is" } else { "are" }));
        let new = (added > 0).then(|| format!("{} would change", counted(added, "other row")));
        let both: Vec<String> = gone.into_iter().chain(new).collect();
        let sure = match (both.is_empty(), at_least) {
            (true, _) => "many of them are missing, and as many others would change".to_owned(),
            (false, true) => format!("at least {}", both.join(", and ")),
            (false, false) => both.join(", and "),
        };
        format!("Request {request} was approved for certain rows of \"{table}\": {sure}; nothing was changed.")
    }
}

/// The first table of which `statements` changed other rows than `grant` is for.
pub fn others(grant: &Grant, statements: &[Serial]) -> Option<OtherRows> {
    if !grant.binds_rows() {
        return None;
    }
    let changed = of_statements(statements);
    let charged: Vec<(String, u64)> = statements.iter().flat_map(|one| charge::rows_by_table(*one)).collect();
    let rows_of = |name: &str| charged.iter().filter(|(table, _)| table == name).map(|(_, rows)| rows).sum::<u64>();
    let nothing = Fingerprint::default();
    let (table, others) = grant.others(|name| {
        let seen = match changed.get(name) {
            Some(changed) => changed.rows.as_ref()?,
            None => &nothing,
        };
        (seen.rows() == rows_of(name)).then_some(seen)
    })?;
    let relation = changed.get(table).map(|changed| (*changed.relation).clone());
    Some(OtherRows { table: table.to_owned(), relation, others })
}

/// A subtransaction of this level was rolled back.
pub fn roll_back(level: i32) {
    state().seen.retain(|seen| seen.level < level);
}

/// A subtransaction of this level was released.
pub fn release(level: i32) {
    let mut state = state();
    let (deeper, mut left): (Vec<Seen>, Vec<Seen>) =
        core::mem::take(&mut state.seen).into_iter().partition(|seen| seen.level >= level);
    for one in deeper {
        let to = left
            .iter_mut()
            .find(|seen| seen.statement == one.statement && seen.level == level - 1 && seen.table == one.table);
        match to {
            None => left.push(Seen { level: level - 1, ..one }),
            Some(to) => match (&mut to.rows, &one.rows) {
                (Some(all), Some(rows)) => all.merge(rows),
                (all, _) => *all = None,
            },
        }
    }
    state.seen = left;
}

/// The transaction is over.
pub fn end_transaction() {
    let mut state = state();
    state.seen.clear();
    state.keys.clear();
}

/// Whether its end has nothing to forget here.
#[inline(always)]
pub fn is_clean() -> bool {
    state().seen.is_empty()
}
