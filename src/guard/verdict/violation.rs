//! Rows past a limit, or past what was reviewed: from the charge to the decision. All of it is rare, and nothing of it is
//! on the way of a row that is within every limit.

use rules::limits::ledger::Past;
use rules::words::{Operation, Place, Serial};

use super::decide::{self, Attempt};
use super::overrides;
use crate::guard::limits::binding::{Binding, Charge};
use crate::guard::limits::bindings;
use crate::guard::limits::charge::{self, Verdict};
use crate::guard::limits::extra_limits::Charged;
use crate::guard::limits::observe::{self, Counted};
use crate::guard::rehearsal::policy_verdicts;
use crate::guard::where_clause::scan_filters::Estimate;
use crate::pg::ereport::{Failure, PendingError, guarded};
use crate::pg::ffi::PgError;
use crate::session::{rehearsing, settings, statement};
use crate::stat::counters;

/// Charges rows to a relation's budgets and decides about what is past a limit. Null: they may stay; otherwise what to raise.
#[inline]
pub fn charge(
    binding: &Binding,
    operation: Operation,
    rows: u64,
    place: Place,
    estimate: Estimate,
) -> *mut PendingError {
    match charge::charge(binding, operation, rows, place) {
        Verdict::Within => core::ptr::null_mut(),
        verdict => follow(verdict, binding, operation, place, estimate),
    }
}

#[cold]
fn follow(
    mut verdict: Verdict,
    binding: &Binding,
    operation: Operation,
    place: Place,
    estimate: Estimate,
) -> *mut PendingError {
    loop {
        verdict = match verdict {
            Verdict::Within => return core::ptr::null_mut(),
            Verdict::Off => return switched_off(binding, operation, place),
            Verdict::Rehearsed { rows } => return rehearsed(binding, operation, rows, place),
            Verdict::Reviewed => return review(binding, operation, place, estimate),
            Verdict::Past { at, past, rows } => {
                if let Some(charge) = binding.charges(operation).get(at) {
                    let raise = limit(binding, operation, charge, past, rows, place, estimate);
                    if !raise.is_null() {
                        return raise;
                    }
                }
                charge::charge_from(at + 1, binding, operation, rows, place)
            }
        };
    }
}

/// Records a covered write that runs while the guard is switched off, once per statement.
fn switched_off(binding: &Binding, operation: Operation, place: Place) -> *mut PendingError {
    if rehearsing::is_on() || decide::knows_disabled(place.statement) {
        return core::ptr::null_mut();
    }
    guarded(|| {
        decide::record_disabled(&binding.relation, operation, place.statement);
        Ok(())
    })
}

/// Decides about a charge that went past a limit, or that has further ones.
fn limit(
    binding: &Binding,
    operation: Operation,
    charge: &Charge,
    past: Option<Past>,
    rows: u64,
    place: Place,
    estimate: Estimate,
) -> *mut PendingError {
    if !charge.policy.policy.mode.refuses() {
        return look_on(binding, operation, charge, past, rows, place, estimate);
    }
    guarded(|| {
        let past = match (past, &charge.more) {
            (None, Some(more)) => {
                let charged = Charged { policy: &charge.policy, rows, place };
                more.prepare(place.statement);
                more.charge(&mut charge::ledger(), &charged, charge::goes_on)?
            }
            (past, _) => past,
        };
        let Some(past) = past else { return Ok(()) };
        let attempt = Attempt {
            relation: &binding.relation,
            operation,
            policy: &charge.policy,
            meter: charge.meter,
            past,
            place,
            estimate: estimate.rows(),
        };
        decided(binding, operation, place.statement, decide::decide(&attempt))?;
        charge::lifted(charge.meter, place.statement);
        decided(binding, operation, place.statement, check_grant(&attempt))
    })
}

/// Notes what the policies of rows that a rehearsal has charged say to them.
fn rehearsed(binding: &Binding, operation: Operation, rows: u64, place: Place) -> *mut PendingError {
    guarded(|| {
        binding
            .charges(operation)
            .iter()
            .flat_map(|charge| &charge.more)
            .for_each(|more| more.prepare(place.statement));
        policy_verdicts::met(&mut charge::ledger(), binding, operation, rows, place, charge::goes_on);
        Ok(())
    })
}

/// Refuses a statement that went past what its token opens. Tables that were charged before the token was spent count as
/// well, now and with what is charged later.
///
/// # Errors
/// WG006.
pub fn check_grant(attempt: &Attempt<'_>) -> Result<(), Failure> {
    let statement = attempt.place.statement;
    if !overrides::is_granted(statement) {
        return Ok(());
    }
    let rows = charge::rows_by_table(statement);
    overrides::count_in(
        statement,
        rows.iter().filter_map(|(name, _)| Some((name.as_str(), bindings::meter_of(name)?))),
    );
    decide::check_grant(attempt, &rows)
}

/// The same for a policy of mode observe or warn: it is noted, once per statement.
#[cold]
fn look_on(
    binding: &Binding,
    operation: Operation,
    charge: &Charge,
    past: Option<Past>,
    rows: u64,
    place: Place,
    estimate: Estimate,
) -> *mut PendingError {
    guarded(|| {
        let charged = Charged { policy: &charge.policy, rows, place };
        let further = charge.more.as_ref().and_then(|more| {
            more.prepare(place.statement);
            more.observe(&mut charge::ledger(), &charged, charge::goes_on)
        });
        let own = past
            .map(|past| (past, if past == Past::Transaction { Counted::Transaction } else { Counted::ToStatement }));
        let Some((past, counted)) = own.or(further) else { return Ok(()) };
        let (meter, policy) = (charge.meter, &charge.policy);
        let attempt =
            Attempt { relation: &binding.relation, operation, policy, meter, past, place, estimate: estimate.rows() };
        Ok(note(&attempt, counted, None)?)
    })
}

/// Notes a statement whose rows cannot be counted, for policies of mode observe or warn.
///
/// # Errors
/// As for [`note`].
pub fn note_uncounted(binding: &Binding, operation: Operation, reason: &str) -> Result<(), PgError> {
    if rehearsing::is_on() || !settings::enabled() {
        return Ok(());
    }
    // SAFETY: called while the client's command is about to run, or runs.
    unsafe {
        statement::about_to_run(|place| {
            let limited = binding.charges(operation).iter().filter(|charge| charge.policy.policy.is_limited());
            for Charge { meter, policy, .. } in limited {
                let (meter, past) = (*meter, Past::Statement);
                let attempt =
                    Attempt { relation: &binding.relation, operation, policy, meter, past, place, estimate: None };
                note(&attempt, Counted::Unknown, Some(format!("Nothing is known of its rows: {reason}.")))?;
            }
            Ok(())
        })
    }
}

/// Notes, once, a statement that went past a limit of a policy of mode observe or warn. `reason`: what else there is to say.
///
/// # Errors
/// What interrupts the telling of an earlier statement's.
pub fn note(attempt: &Attempt<'_>, counted: Counted, reason: Option<String>) -> Result<(), PgError> {
    let (meter, statement) = (attempt.meter, attempt.place.statement);
    if charge::ledger().is_noted(meter, statement) {
        return Ok(());
    }
    let new = decide::to_note(attempt, counted, reason);
    let told = observe::note(charge::ledger(), new);
    charge::ledger().note(meter, statement, charge::goes_on);
    told
}

/// Refuses rows beyond what was reviewed.
fn review(binding: &Binding, operation: Operation, place: Place, estimate: Estimate) -> *mut PendingError {
    guarded(|| {
        let charges = binding.charges(operation);
        let Some(charge) = charges.iter().find(|charge| charge.policy.policy.mode.refuses()).or(charges.first()) else {
            return Ok(());
        };
        let attempt = Attempt {
            relation: &binding.relation,
            operation,
            policy: &charge.policy,
            meter: charge.meter,
            past: Past::Statement,
            place,
            estimate: estimate.rows(),
        };
        decided(
            binding,
            operation,
            place.statement,
            decide::check_grant(&attempt, &charge::rows_by_table(place.statement)),
        )
    })
}

/// Counts what was decided about a statement past a limit: refused, or let pass on purpose.
///
/// # Errors
/// What was decided.
pub fn decided(
    binding: &Binding,
    operation: Operation,
    statement: Serial,
    decision: Result<(), Failure>,
) -> Result<(), Failure> {
    match &decision {
        Ok(()) => counters::overridden(binding.stat, operation, statement),
        Err(Failure::Ours(_)) => counters::refused(binding.stat, operation, statement),
        // An interrupt, say.
        Err(_) => {}
    }
    decision
}
