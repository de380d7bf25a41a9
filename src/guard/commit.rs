//! What happens at COMMIT, PREPARE and ABORT, in order.
//!
//! Before the commit everything that can fail: what was observed is recorded, overrides become events, kept rows are stored,
//! and the events of the transaction are made ready as bytes. After the commit record nothing may fail any more, because an
//! ERROR there is a PANIC: bytes are copied and what the transaction left is forgotten. At an abort what was noted is
//! recorded or forgotten, by what is contained.

use core::ffi::c_void;

use pgrx::pg_sys;

use super::ddl::command;
use super::limits::{charge, lost_count, observe};
use super::rehearsal::{account, policy_verdicts};
use super::verdict::{decide, expect, overrides, reviewed_objects, reviewed_rows};
use crate::event::{at_commit, store};
use crate::pg::contained::contained;
use crate::pg::ereport::{guarded, raise};
use crate::pg::ffi;
use crate::session::{actor, expectation, pooled, portal, rehearsing, statement, transaction_block, xact};
use crate::stat::counters as stat_counters;
use crate::undo::capture::row_capture;
use crate::undo::in_progress;

/// What happens at the end of a transaction, in order.
pub unsafe extern "C-unwind" fn transaction_ends(event: pg_sys::XactEvent::Type, _argument: *mut c_void) {
    match event {
        pg_sys::XactEvent::XACT_EVENT_PRE_COMMIT | pg_sys::XactEvent::XACT_EVENT_PRE_PREPARE => {
            let prepares = event == pg_sys::XactEvent::XACT_EVENT_PRE_PREPARE;
            if observe::any()
                || overrides::has_lifts()
                || row_capture::any()
                || at_commit::any()
                || pooled::ends_unused()
                || lost_count::is_lost()
            {
                before_commit(prepares);
            }
            at_commit::closes(prepares);
        }
        // The commit record is written: an ERROR would be a PANIC from here on.
        pg_sys::XactEvent::XACT_EVENT_COMMIT => {
            if at_commit::any_ready() {
                record_commit();
            }
            end_transaction(Ending::Committed);
        }
        pg_sys::XactEvent::XACT_EVENT_PREPARE => end_transaction(Ending::Prepared),
        pg_sys::XactEvent::XACT_EVENT_ABORT => {
            begin_abort();
            end_transaction(Ending::RolledBack);
        }
        _ => {}
    }
}

/// Apart, as all that few transactions come to: what stands in the callback itself each commit pays for.
#[cold]
#[inline(never)]
fn record_commit() {
    contained("recording what a commit did", at_commit::committed);
}

#[cold]
#[inline(never)]
fn begin_abort() {
    portal::rolled_back();
    contained("forgetting what a command had noted", || command::roll_back(0));
    if observe::any() {
        observe::died(charge::ledger());
    }
}

/// A transaction of which something is to be stored, or sent to the client, commits or is prepared.
#[cold]
#[inline(never)]
fn before_commit(prepares: bool) {
    // SAFETY: plain old frame; an error here still aborts the transaction.
    unsafe {
        if lost_count::is_lost() {
            raise(guarded(|| Ok(lost_count::refuse()?)));
        }
        if observe::any() {
            raise(observe::before_commit(charge::ledger()));
        }
        if overrides::awaits_rows() {
            raise(guarded(|| decide::check_rows(None)));
        }
        if overrides::has_lifts() || row_capture::any() {
            raise(guarded(|| Ok(overrides::before_commit(charge::ledger())?)));
        }
        if row_capture::any() {
            raise(guarded(|| {
                row_capture::close();
                Ok(())
            }));
        }
        if at_commit::any() {
            raise(guarded(|| {
                if prepares {
                    at_commit::write()?;
                } else {
                    at_commit::make_ready();
                }
                Ok(())
            }));
        }
        if pooled::ends_unused() {
            raise(guarded(|| Ok(pooled::before_commit()?)));
        }
    }
}

/// How a transaction ended here; a prepared one may still go either way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    Committed,
    Prepared,
    RolledBack,
}

#[inline]
fn end_transaction(ending: Ending) {
    let committed = ending == Ending::Committed;
    transaction_block::end_transaction(committed);
    at_commit::end_transaction();
    if xact::take_touched() {
        end_touched_transaction(ending);
    }
    store::end_transaction(committed);
}

/// Something was charged in it. Apart, for most transactions only read.
#[inline(never)]
fn end_touched_transaction(ending: Ending) {
    let ended = contained("forgetting a transaction", || {
        if !is_clean() {
            take_each(&RARE_ENDS, ending);
        }
        take_each(&TRANSACTION_ENDS, ending);
    });
    if !ended && !(take_each_apart(&RARE_ENDS, ending) & take_each_apart(&TRANSACTION_ENDS, ending)) {
        lost_count::lose(true);
    }
}

/// Whether none of [`RARE_ENDS`] has anything to do.
#[inline(always)]
fn is_clean() -> bool {
    decide::is_clean()
        && overrides::is_clean()
        && reviewed_rows::is_clean()
        && reviewed_objects::is_clean()
        && row_capture::is_clean()
        && account::is_clean()
        && in_progress::is_clean()
        && rehearsing::is_clean()
        && policy_verdicts::is_clean()
}

/// What is to be done where nothing may be raised: each step is one module's, can be taken twice, and needs no other one.
type Steps<T, const N: usize> = [fn(T); N];

#[inline(always)]
fn take_each<T: Copy, const N: usize>(steps: &Steps<T, N>, with: T) {
    for step in steps {
        step(with);
    }
}

/// After one of them failed: the others are taken all the same. Whether each one was, this time.
#[cold]
fn take_each_apart<T: Copy, const N: usize>(steps: &Steps<T, N>, with: T) -> bool {
    let failed = steps.iter().filter(|step| !contained("the same once more", || step(with)));
    failed.count() == 0
}

/// The end of a transaction that did more than to change rows within its limits.
const RARE_ENDS: Steps<Ending, 9> = [
    |_| decide::end_transaction(),
    |_| overrides::end_transaction(),
    |_| reviewed_rows::end_transaction(),
    |_| reviewed_objects::end_transaction(),
    |_| row_capture::end_transaction(),
    |_| account::end_transaction(),
    |_| in_progress::end_transaction(),
    |_| rehearsing::end_transaction(),
    |_| policy_verdicts::end_transaction(),
];

/// The end of a transaction in which something was charged.
const TRANSACTION_ENDS: Steps<Ending, 4> = [
    |ending| charge::end_transaction(ending != Ending::RolledBack),
    |_| {
        if statement::end_transaction() {
            stat_counters::forget_statements();
        }
    },
    |_| {
        expect::roll_back(0);
        actor::end_transaction();
    },
    |ending| {
        // SAFETY: reads the transaction's state, which is still that of what committed.
        expectation::end_transaction(ending != Ending::RolledBack && unsafe { ffi::IsTransactionBlock() });
    },
];

/// A subtransaction of that level is rolled back.
const ROLLED_BACK: Steps<i32, 12> = [
    |level| {
        portal::rolled_back();
        command::roll_back(level);
    },
    expect::roll_back,
    at_commit::roll_back,
    |_| {
        if observe::any() {
            observe::rolling_back(&charge::ledger());
        }
    },
    charge::roll_back,
    |_| {
        if observe::any() && portal::nothing_runs() {
            observe::died(charge::ledger());
        }
    },
    overrides::roll_back,
    reviewed_rows::roll_back,
    account::roll_back,
    in_progress::roll_back,
    rehearsing::roll_back,
    row_capture::roll_back,
];

/// A subtransaction of that level is released.
const RELEASED: Steps<i32, 6> = [
    |level| charge::ledger().release(level, statement::may_resume),
    overrides::release,
    reviewed_rows::release,
    account::release,
    row_capture::release,
    at_commit::release,
];

/// The same of a subtransaction.
pub unsafe extern "C-unwind" fn subtransaction_ends(
    event: pg_sys::SubXactEvent::Type,
    _mine: pg_sys::SubTransactionId,
    _parent: pg_sys::SubTransactionId,
    _argument: *mut c_void,
) {
    // SAFETY: reads a static.
    let level = unsafe { ffi::GetCurrentTransactionNestLevel() };
    match event {
        pg_sys::SubXactEvent::SUBXACT_EVENT_ABORT_SUB => {
            end_subtransaction("rolling a subtransaction's counts back", &ROLLED_BACK, level);
        }
        pg_sys::SubXactEvent::SUBXACT_EVENT_COMMIT_SUB => {
            end_subtransaction("keeping a subtransaction's counts", &RELEASED, level);
        }
        _ => {}
    }
}

#[inline(always)]
fn end_subtransaction<const N: usize>(what: &str, steps: &Steps<i32, N>, level: i32) {
    if !contained(what, || take_each(steps, level)) {
        lose_count(steps, level);
    }
}

/// After a fault in a subtransaction's end nobody knows any more what was counted how far.
#[cold]
fn lose_count<const N: usize>(steps: &Steps<i32, N>, level: i32) {
    if xact::is_touched() {
        lost_count::lose(false);
    }
    take_each_apart(steps, level);
}
