//! Runs a statement inside a subtransaction, counts the covered rows it changed, and takes all of it back.
//!
//! The statement runs as its caller and with the caller's rights; nothing is refused by a limit while it runs. Its own
//! errors come out as they are. What cannot be taken back is what a rolled-back statement never gives back: sequence
//! numbers, and what functions did outside the database.

use core::ptr;
use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;

use pgrx::pg_sys;
use rules::token::fingerprint::Fingerprint;

use super::run::{Run, values};
use crate::guard::limits::charge;
use crate::guard::rehearsal::account::{self, Account, Wanted};
use crate::guard::rehearsal::policy_verdicts::{self, Concern};
use crate::guard::verdict::{reviewed_objects, reviewed_rows};
use crate::pg::ereport::Failure;
use crate::pg::{encoding, ffi};
use crate::session::actor::Review;
use crate::session::{rehearsing, statement};
use crate::token::definitions::Met;

/// What a rehearsal found.
pub struct Rehearsed {
    /// Covered rows that the statement would change, by qualified table name.
    pub rows: BTreeMap<String, u64>,
    /// Which rows these are, of the tables of which all were seen one by one and are known by a key.
    pub fingerprints: BTreeMap<String, Fingerprint>,
    /// Relations and functions that it met, where fingerprints were wanted.
    pub met: Met,
    /// The same by table and operation, with a few rows before and after.
    pub account: Account,
    /// A policy refuses it whatever number of rows it changes.
    pub refused_without_rows: bool,
    /// What the policies say that cover what it changes.
    pub concerns: Vec<Concern>,
    /// The parameters as their types' output functions print them, which is how a token check sees those of a client.
    pub parameters: Vec<Option<String>>,
}

/// Runs the statement and takes it back. One that has seen as many rows as `wanted` gives ends there.
///
/// # Errors
/// Those of the statement itself, untouched; WG007 when the number of parameters is not what it takes.
#[expect(ffi_unwind_calls, reason = "inside protect")]
pub fn rehearse(text: &CString, parameters: &[Option<String>], wanted: Wanted) -> Result<Rehearsed, Failure> {
    super::run::none_beyond(text, parameters.len())?;
    let values = values(parameters);
    let mut printed = vec![ptr::null_mut(); values.len()];
    let serial = statement::current();
    let mut before: HashMap<String, u64> = HashMap::new();
    let (account, changed);
    let review = wanted.fingerprints.then(Review::begin);
    let outer = policy_verdicts::begin();
    account::open(wanted);
    // SAFETY: `Run::run` is a plain old frame over raw calls, and what it began is taken back here, whichever way it
    // went.
    let (outcome, taken_back, (takes, unused), bytes, rows) = unsafe {
        let (context, owner) = (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner);
        let mut run = Run::new(text, &values, &mut printed, context);
        let mut outcome = ffi::protect(|| run.begin());
        if outcome.is_ok() {
            rehearsing::begin();
            before = charge::rows_by_table(serial).into_iter().collect();
            // The statement's own error must outlive what is taken back.
            let inside = pg_sys::CurrentMemoryContext;
            pg_sys::CurrentMemoryContext = context;
            outcome = ffi::protect(|| {
                pg_sys::CurrentMemoryContext = inside;
                run.run();
            });
        }
        let rows = charge::rows_by_table(serial);
        changed = reviewed_rows::of_statements(&[serial]);
        account = account::close();
        let begun = run.begun;
        let taken_back = ffi::protect(|| {
            if begun {
                ffi::RollbackAndReleaseCurrentSubTransaction();
            }
        });
        pg_sys::CurrentMemoryContext = context;
        pg_sys::CurrentResourceOwner = owner;
        (outcome, taken_back, (run.wanted, run.unused), run.bytes, rows)
    };
    drop(review);
    let concerns = policy_verdicts::end(outer);
    taken_back?;
    if !account.stopped {
        outcome.map_err(|error| error.in_query(text))?;
    }
    super::run::all_given(takes, values.len())?;
    super::run::each_used(unused)?;
    super::run::not_too_long(bytes)?;
    let rows: BTreeMap<String, u64> = rows
        .into_iter()
        .map(|(name, rows)| {
            let earlier = before.get(&name).copied().unwrap_or(0);
            (name, rows.saturating_sub(earlier))
        })
        .filter(|(_, rows)| *rows > 0)
        .collect();
    let fingerprints = changed
        .into_iter()
        .filter_map(|(name, changed)| {
            let fingerprint = changed.rows.filter(|seen| rows.get(&name) == Some(&seen.rows()))?;
            Some((name, fingerprint))
        })
        .collect();
    // SAFETY: NULL or C strings in our own memory context.
    let parameters = printed.into_iter().map(|text| unsafe { encoding::from_c(text) }).collect();
    Ok(Rehearsed {
        rows,
        fingerprints,
        met: reviewed_objects::of_statement(serial)?,
        account,
        refused_without_rows: policy_verdicts::is_refused_without_rows(),
        concerns,
        parameters,
    })
}
