//! Charges rows to the budgets of their relation, and says what that came to.

use core::ffi::c_void;
use std::rc::Rc;

use pgrx::pg_sys;
use rules::limits::ledger::{Ledger, MeterId, Past};
use rules::words::{Operation, Place, Serial};

use super::binding::{Binding, Charge};
use super::uncharged::{self, Run};
use super::{bindings, lost_count, observe, rate};
use crate::guard::verdict::overrides;
use crate::pg::backend_local::Borrowed;
use crate::session::{rehearsing, settings, statement};
use crate::stat::counters;
use crate::undo::in_progress;

/// The numbers, with everything that was counted in them.
#[track_caller]
pub fn ledger() -> Borrowed<Ledger> {
    settle();
    bindings::LEDGER.borrow()
}

/// Opens a run for a node's further rows of one relation, if nothing but the limits decides about them. `child`: as
/// [`Run::child`].
pub fn open_run(
    owner: *mut c_void,
    child: *mut pg_sys::PlanState,
    index: usize,
    binding: &Rc<Binding>,
    operation: Operation,
    place: Place,
) {
    if rehearsing::is_on() || overrides::bounds(place.statement) || in_progress::is_on() || !settings::enabled() {
        return;
    }
    let charges = binding.charges(operation);
    if charges.iter().any(|charge| charge.more.is_some()) {
        return;
    }
    let ledger = ledger();
    let left = charges
        .iter()
        .map(|charge| ledger.left(charge.meter, charge.beside, place.statement))
        .min()
        .unwrap_or(u64::MAX);
    drop(ledger);
    let result = i32::try_from(index).unwrap_or(-1);
    uncharged::open(Run {
        owner,
        child,
        index,
        result,
        left,
        rows: 0,
        operation,
        place,
        binding: Some(Rc::clone(binding)),
    });
}

/// Charges what is in the run, and closes it.
#[inline]
fn settle() {
    if uncharged::close() > 0 {
        settle_rows();
    }
}

/// The owner of a run goes; its address may be another's soon.
pub fn close_run(owner: *mut c_void) {
    if uncharged::owner() == owner {
        settle();
    }
}

#[cold]
fn settle_rows() {
    let (rows, operation, place, binding) = uncharged::take();
    let Some(binding) = binding else { return };
    let mut ledger = bindings::LEDGER.borrow();
    ledger.charge(binding.rows, rows, place, goes_on);
    if !rehearsing::is_on() {
        counters::count(binding.stat, operation, rows, place.statement);
    }
    for charge in binding.charges(operation) {
        ledger.charge_beside(charge.meter, rows, charge.beside, place, goes_on);
    }
}

/// Whether a statement may continue later, so that its counts are still needed.
pub fn goes_on(statement: Serial) -> bool {
    statement::may_resume(statement) || overrides::has_lift(statement) || observe::waits(statement)
}

/// How many more rows of a statement a charge takes before a limit is passed.
pub fn left(charge: &Charge, statement: Serial) -> u64 {
    if let Some(more) = &charge.more {
        more.prepare(statement);
    }
    let ledger = ledger();
    let left = ledger.left(charge.meter, charge.beside, statement);
    charge.more.as_ref().map_or(left, |more| more.left(&ledger, left, statement))
}

/// Whether a statement went past a limit of a charge's policy, which is of mode observe or warn.
pub fn is_noted(charge: &Charge, statement: Serial) -> bool {
    ledger().is_noted(charge.meter, statement)
}

/// The policy behind a charge is lifted for a statement: it spends nothing of its rate.
pub fn lifted(meter: MeterId, statement: Serial) {
    let bucket = {
        let book = bindings::book();
        let policy = book.policies.iter().find(|(_, known)| **known == meter).map(|(revision, _)| *revision);
        policy.and_then(|revision| book.further.rate(revision))
    };
    if let Some(bucket) = bucket {
        rate::lifted(bucket, statement, &mut ledger());
    }
}

/// A subtransaction of this level was rolled back.
pub fn roll_back(level: i32) {
    if lost_count::is_lost() {
        return;
    }
    let mut ledger = ledger();
    ledger.roll_back(level);
    rate::rolled_back(&ledger);
}

/// What a charge came to.
pub enum Verdict {
    /// The rows are within every limit.
    Within,
    /// The guard is switched off; nothing was charged.
    Off,
    /// The budget at that place among the relation's was charged with so many rows, and went past the limit or has further
    /// ones. Those after it were not charged: [`charge_from`] continues there.
    Past { at: usize, past: Option<Past>, rows: u64 },
    /// All was charged, for a rehearsal.
    Rehearsed { rows: u64 },
    /// All was charged, and it is more than was reviewed.
    Reviewed,
}

/// Charges rows to a relation's budgets.
///
/// Runs for each row that joins no run: no allocation, no lock, nothing that raises.
#[inline]
pub fn charge(binding: &Binding, operation: Operation, rows: u64, place: Place) -> Verdict {
    if rows == 0 || in_progress::is_on() {
        return Verdict::Within;
    }
    if !settings::enabled() {
        return Verdict::Off;
    }
    settle();
    bindings::LEDGER.borrow().charge(binding.rows, rows, place, goes_on);
    if !rehearsing::is_on() {
        counters::count(binding.stat, operation, rows, place.statement);
    }
    charge_from(0, binding, operation, rows, place)
}

/// Charges rows to the budgets from that place on.
#[inline]
pub fn charge_from(from: usize, binding: &Binding, operation: Operation, rows: u64, place: Place) -> Verdict {
    for (at, charge) in binding.charges(operation).iter().enumerate().skip(from) {
        let past = bindings::LEDGER.borrow().charge_beside(charge.meter, rows, charge.beside, place, goes_on);
        if (past.is_some() || charge.more.is_some()) && !overrides::is_lifted(charge.meter, place.statement) {
            return Verdict::Past { at, past, rows };
        }
    }
    if rehearsing::is_on() {
        return Verdict::Rehearsed { rows };
    }
    if overrides::is_granted(place.statement)
        && !overrides::within_grant(&ledger(), place.statement, binding.rows, &binding.name)
    {
        return Verdict::Reviewed;
    }
    Verdict::Within
}

/// Rows charged in a statement by qualified table name.
pub fn rows_by_table(statement: Serial) -> Vec<(String, u64)> {
    let ledger = ledger();
    bindings::book()
        .relations
        .iter()
        .map(|(name, meter)| (name.to_string(), ledger.in_statement(*meter, statement)))
        .filter(|(_, rows)| *rows > 0)
        .collect()
}

/// The transaction is over. `kept`: it committed, or was prepared for it; what it took of rates stays spent.
pub fn end_transaction(kept: bool) {
    lost_count::end_transaction();
    rate::end_transaction(kept);
    uncharged::close();
    drop(uncharged::take());
    let mut ledger = bindings::LEDGER.borrow();
    ledger.end_transaction();
    bindings::forget_stale(&mut ledger);
}
