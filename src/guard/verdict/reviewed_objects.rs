//! Which relations and functions a statement meets that is reviewed, or that may turn out to be one that was.
//!
//! In a rehearsal they are what the approval is bound to besides the text. In the statement itself they tell whether a name
//! means another table by now: one that was made in a schema which the search_path looks into earlier, say.

use std::collections::BTreeSet;

use pgrx::pg_sys;
use rules::words::{RelationName, Serial};

use super::overrides;
use crate::pg::backend_local::BackendLocal;
use crate::pg::ereport::Failure;
use crate::pg::{ffi, owner};
use crate::policy::relation::{ancestors, relation_name};
use crate::policy::table::SCHEMA;
use crate::session::{statement, xact};
use crate::token::definitions::Met;

struct Seen {
    statement: Serial,
    met: Met,
    /// Functions that a plan was made from without calling them: hashes of their entries, as invalidations name them.
    dissolved: BTreeSet<u32>,
}

static SEEN: BackendLocal<Vec<Seen>> = BackendLocal::new(Vec::new());

/// Objects of the server's own have lower OIDs.
const FIRST_OF_USERS: u32 = pg_sys::FirstNormalObjectId;

fn with<T>(note: impl FnOnce(&mut Seen) -> T) -> T {
    let serial = statement::current();
    let mut seen = SEEN.borrow();
    let place = match seen.iter().rposition(|one| one.statement == serial) {
        Some(place) => place,
        None => {
            xact::touch();
            seen.retain(|one| statement::may_resume(one.statement) || overrides::awaits_rows_of(one.statement));
            seen.push(Seen { statement: serial, met: Met::default(), dissolved: BTreeSet::new() });
            seen.len() - 1
        }
    };
    note(&mut seen[place])
}

/// A query begins.
///
/// # Safety
/// A planned statement.
pub unsafe fn query(plan: *const pg_sys::PlannedStmt) {
    // SAFETY: the caller's promise: lists of OIDs and of nodes.
    unsafe {
        let relations = (*plan).relationOids;
        let functions: Vec<u32> = ffi::pointers::<pg_sys::PlanInvalItem>((*plan).invalItems)
            .filter(|item| (**item).cacheId == pg_sys::SysCacheIdentifier::PROCOID as i32)
            .map(|item| (*item).hashValue)
            .collect();
        let count = if relations.is_null() { 0 } else { usize::try_from((*relations).length).unwrap_or(0) };
        let oids = (0..count).map(|index| u32::from((*(*relations).elements.add(index)).oid_value));
        let oids: Vec<u32> = oids.filter(|oid| *oid >= FIRST_OF_USERS).collect();
        if !oids.is_empty() || !functions.is_empty() {
            with(|seen| {
                seen.met.relations.extend(oids);
                seen.dissolved.extend(functions);
            });
        }
    }
}

/// A function is about to be called.
pub fn function(oid: pg_sys::Oid) {
    if u32::from(oid) >= FIRST_OF_USERS {
        with(|seen| seen.met.functions.insert(oid.into()));
    }
}

/// What a statement met so far.
///
/// # Errors
/// What reading the catalog of functions may raise.
pub fn of_statement(statement: Serial) -> Result<Met, Failure> {
    let found = SEEN
        .borrow()
        .iter()
        .find(|seen| seen.statement == statement)
        .map(|seen| (seen.met.clone(), seen.dissolved.clone()));
    let Some((mut met, dissolved)) = found else { return Ok(Met::default()) };
    if !dissolved.is_empty() {
        const ALL: &str = "SELECT oid::pg_catalog.text FROM pg_catalog.pg_proc \
             WHERE oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid";
        let all = owner::connect(|client| owner::rows(client, ALL, &[]))?;
        met.functions.extend(all.iter().filter_map(|oid| oid.parse::<u32>().ok()).filter(|oid| {
            let nothing = pg_sys::Datum::from(0);
            let oid = pg_sys::Datum::from(*oid);
            // SAFETY: the catalog has its OID as the only key; nothing is looked up.
            let hash = unsafe {
                let cache = pg_sys::SysCacheIdentifier::PROCOID as i32;
                pg_sys::GetSysCacheHashValue(cache, oid, nothing, nothing, nothing)
            };
            dissolved.contains(&hash)
        }));
    }
    Ok(met)
}

/// Whether a relation is the extension's own: recording what happens meets these.
fn is_own(relation: pg_sys::Oid) -> bool {
    // SAFETY: syscache look-ups.
    unsafe { pg_sys::get_rel_namespace(relation) == pg_sys::get_namespace_oid(SCHEMA.as_ptr(), true) }
}

/// The first relation that a statement met and that is neither one of the reviewed ones nor below one of them.
pub fn not_reviewed(statement: Serial, reviewed: &BTreeSet<u32>) -> Option<RelationName> {
    let met: Vec<u32> = {
        let seen = SEEN.borrow();
        let seen = seen.iter().find(|seen| seen.statement == statement)?;
        seen.met.relations.iter().copied().filter(|oid| !reviewed.contains(oid)).collect()
    };
    let is_below = |oid: pg_sys::Oid| ancestors(oid).into_iter().any(|one| reviewed.contains(&one.into()));
    let mut others = met.into_iter().map(pg_sys::Oid::from_u32).filter(|oid| !is_own(*oid) && !is_below(*oid));
    others.find_map(relation_name)
}

/// Why a statement is refused that meets another relation.
pub const NOT_REVIEWED: &str = "it reads or writes a table that was not reviewed";

/// The same with the table, as a sentence.
pub fn told(relation: &RelationName, request: i64) -> String {
    format!("Table \"{relation}\" was not met when request {request} was reviewed; nothing was changed.")
}

/// The transaction is over.
pub fn end_transaction() {
    SEEN.borrow().clear();
}

/// Whether its end has nothing to forget here.
#[inline(always)]
pub fn is_clean() -> bool {
    SEEN.borrow().is_empty()
}
